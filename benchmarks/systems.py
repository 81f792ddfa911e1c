"""The systems compared: each makes, for a model and a setting, a function that answers a prompt.

That function reads token ids [B, n], puts every new token into the clock as it comes, and returns
the cache it ends with. A new system is one function and its name in `SYSTEMS`.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.answer_clock import AnswerClock
from locret import Engine, HeadsConfig, RetainingHeads
from locret.backbone import Backbone
from locret.policies import LocretPolicy

Answer = Callable[[Tensor, AnswerClock], Any]
"""(ids [B, n], clock) -> the cache."""


@dataclass(frozen=True)
class Setting:
    """How a prompt is read and answered.

    Attributes:
        budget: units kept; `full` keeps all.
        chunk_size: tokens that locret reads at a time.
        new_tokens: of the answer.
        policy: of locret.
        heads_width: hidden width of locret's heads.
        engine: further arguments of `locret.Engine`.
    """

    budget: int
    chunk_size: int = 1024
    new_tokens: int = 256
    policy: str = LocretPolicy.name
    heads_width: int = 1024
    engine: Mapping[str, Any] = field(default_factory=dict)

    def stock(self) -> dict[str, Any]:
        """Arguments of stock generate: greedy, so many tokens, the cache returned."""
        return {
            "max_new_tokens": self.new_tokens,
            "do_sample": False,
            "return_dict_in_generate": True,
        }


def full(model: Any, setting: Setting) -> Answer:
    """Stock generate: the whole prompt at once, SDPA, a cache that keeps everything."""

    def answer(ids: Tensor, clock: AnswerClock) -> Any:
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, streamer=clock, **setting.stock())
        return output.past_key_values

    return answer


def kvpress(model: Any, setting: Setting) -> Answer:
    """SnapKV of NVIDIA's kvpress: the whole prompt at once, every layer compressed after it.

    Reads and decodes as kvpress's own pipeline does: the decoder without the lm_head, then one
    token after the other at the positions that follow the prompt.
    """
    press_type = snapkv_press()

    @torch.no_grad()
    def answer(ids: Tensor, clock: AnswerClock) -> Any:
        cache = DynamicCache()
        positions = torch.arange(ids.shape[1], device=ids.device)
        # Half a unit more, for the press rounds down.
        ratio = max(0.0, 1 - (setting.budget + 0.5) / ids.shape[1])
        with press_type(compression_ratio=ratio)(model):
            hidden = model.model(
                input_ids=ids, past_key_values=cache, cache_position=positions
            ).last_hidden_state
        tokens = model.lm_head(hidden[:, -1]).argmax(-1)
        del hidden
        clock.put(tokens.cpu())
        for position in range(ids.shape[1], ids.shape[1] + setting.new_tokens - 1):
            logits = model(
                input_ids=tokens[:, None],
                past_key_values=cache,
                position_ids=torch.full_like(tokens[:, None], position),
            ).logits
            tokens = logits[:, -1].argmax(-1)
            clock.put(tokens.cpu())
        return cache

    return answer


def locret(model: Any, setting: Setting) -> Answer:
    """`locret.Engine`, with random heads if the policy needs some."""
    heads = random_heads(model, setting) if setting.policy == LocretPolicy.name else None
    engine = Engine(
        model,
        setting.policy,
        heads=heads,
        **{"budget": setting.budget, "chunk_size": setting.chunk_size} | dict(setting.engine),
    )

    def answer(ids: Tensor, clock: AnswerClock) -> Any:
        engine.progress = clock.check
        return engine.generate(ids, streamer=clock, **setting.stock()).past_key_values

    return answer


SYSTEMS: dict[str, Callable[[Any, Setting], Answer]] = {
    "full": full,
    "kvpress": kvpress,
    "locret": locret,
}


def random_heads(model: Any, setting: Setting) -> RetainingHeads:
    """Untrained heads on the model's device and in its dtype."""
    config = HeadsConfig.for_geometry(Backbone(model).geometry, setting.heads_width)
    with torch.device(model.device):
        heads = RetainingHeads(config)
    return heads.to(model.dtype).requires_grad_(False).eval()


def snapkv_press() -> Any:
    """kvpress's SnapKVPress, without running kvpress's `__init__`.

    That would patch every attention function of transformers and import what only other presses
    need; SnapKV uses neither.

    Raises:
        ValueError: kvpress is not installed.
    """
    spec = importlib.util.find_spec("kvpress")
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(
            "system kvpress needs the package kvpress: pip install 'locret[bench]', or the newest "
            "by pip install --no-deps kvpress"
        )
    name = "kvpress.presses.snapkv_press"
    if "kvpress" in sys.modules:
        return importlib.import_module(name).SnapKVPress
    bare = types.ModuleType("kvpress")
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules["kvpress"] = bare
    try:
        return importlib.import_module(name).SnapKVPress
    finally:  # whoever imports kvpress afterwards gets all of it
        for loaded in [m for m in sys.modules if m.partition(".")[0] == "kvpress"]:
            del sys.modules[loaded]


def held(cache: Any) -> dict[str, Any]:
    """Units in each KV head of a layer, the most of all layers, and bytes of the whole cache."""
    if hasattr(cache, "report"):
        report = cache.report()
        return {"units": max(report["units"]), "cache_bytes": report["total_bytes"]}
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return {
        "units": max(keys.shape[2] for keys, _ in layers),
        "cache_bytes": sum(keys.nbytes + values.nbytes for keys, values in layers),
    }
