"""The systems compared: each makes, for a model and a setting, a function that answers a prompt.

That function reads token ids [B, n], puts every new token into the clock as it comes, and returns
the cache it ends with. A new system is one function and its name in `SYSTEMS`.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

from benchmarks.answer_clock import AnswerClock
from benchmarks.transformers_backends import transformers_backends
from locret import Engine, HeadsConfig, RetainingHeads
from locret.model.backbone import Backbone
from locret.model.hooks import as_argument, as_before, cache_of
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
        return cache_of(output)

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
                input_ids=ids, cache_position=positions, **as_argument(model.model, cache)
            ).last_hidden_state
        tokens = model.lm_head(hidden[:, -1]).argmax(-1)
        del hidden
        clock.put(tokens.cpu())
        for position in range(ids.shape[1], ids.shape[1] + setting.new_tokens - 1):
            logits = model(
                input_ids=tokens[:, None],
                **as_argument(model, cache),
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
        mask = torch.ones_like(ids)  # random tokens: one of them may be the padding token
        return cache_of(engine.generate(ids, mask, streamer=clock, **setting.stock()))

    return answer


def locret_4bit(model: Any, setting: Setting) -> Answer:
    """`locret.Engine` with four times the units in 4 bits (KIVI)."""
    engine = {"quantization": "kivi"} | dict(setting.engine)
    return locret(model, replace(setting, budget=4 * setting.budget, engine=engine))


def stock_4bit(backend: str) -> Callable[[Any, Setting], Answer]:
    """Stock generate with transformers' own quantized cache, which keeps every token in 4 bits.

    Args:
        backend: of `transformers.QuantizedCache`.
    """

    def make(model: Any, setting: Setting) -> Answer:
        refusal = transformers_backends()[backend]
        if refusal is not None:
            raise ValueError(f"system {backend} cannot run here: {refusal}")

        def answer(ids: Tensor, clock: AnswerClock) -> Any:
            cache = QuantizedCache(
                backend, model.config, nbits=4, axis_key=0, axis_value=0, q_group_size=64
            )
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **as_argument(model, cache, "generate"),
                streamer=clock,
                **setting.stock(),
            )
            return cache_of(output)

        return answer

    return make


SYSTEMS: dict[str, Callable[[Any, Setting], Answer]] = {
    "full": full,
    "kvpress": kvpress,
    "locret": locret,
    "locret-4bit": locret_4bit,
    "quanto-4bit": stock_4bit("quanto"),
    "hqq-4bit": stock_4bit("hqq"),
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
        raise ValueError("system kvpress needs the package kvpress: pip install 'locret[bench]'")
    name = "kvpress.presses.snapkv_press"
    if "kvpress" in sys.modules:
        return _knows_new_names(importlib.import_module(name).SnapKVPress)
    bare = types.ModuleType("kvpress")
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules["kvpress"] = bare
    try:
        return _knows_new_names(importlib.import_module(name).SnapKVPress)
    finally:  # whoever imports kvpress afterwards gets all of it
        for loaded in [m for m in sys.modules if m.partition(".")[0] == "kvpress"]:
            del sys.modules[loaded]


def _knows_new_names(press: Any) -> Any:
    """A press whose hook runs on newer transformers too."""

    class Press(press):  # type: ignore[misc]
        def forward_hook(self, module: Any, input: Any, kwargs: Any, output: Any) -> Any:
            return super().forward_hook(module, input, as_before(module, kwargs), output)

    return Press


def held(cache: Any) -> dict[str, Any]:
    """Units in each KV head of a layer, the most of all layers, and bytes of the whole cache."""
    if hasattr(cache, "report"):
        report = cache.report()
        return {"units": max(report["units"]), "cache_bytes": report["total_bytes"]}
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    parts = [getattr(layer, name, ()) for layer in cache.layers for name in names]
    return {
        "units": max(layer.get_seq_length() for layer in cache.layers),
        "cache_bytes": sum(map(_bytes, parts)),
    }


def _bytes(x: Any) -> int:
    """Of all tensors in what a cache stores, those within tensor subclasses too."""
    if isinstance(x, Mapping):
        return sum(map(_bytes, x.values()))
    if isinstance(x, (tuple, list)):
        return sum(map(_bytes, x))
    if not isinstance(x, Tensor):
        return 0
    if hasattr(x, "__tensor_flatten__"):
        return sum(_bytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.nbytes
