"""Retaining heads as a press of NVIDIA's kvpress, for its pipelines, wrappers and leaderboard.

    from locret.integrations.kvpress import LocretPress

    press = LocretPress(compression_ratio=0.875, heads="runs/phi3/heads")
    with press(model):
        model(input_ids, past_key_values=cache)

kvpress reads the whole context at once, compresses each layer after its attention, and leaves the
keys rotated at their source positions: `locret.Engine` with `chunk_size=None`, `stabilizers=0` and
`positions="original"` keeps the same units. The bounded peak memory is the engine's alone.

Written for kvpress 0.5. Version 0.5.2 installs beside locret (extra `bench`); newer ones ask for a
transformers below 5.3, which other presses and wrappers (AdaKVPress, ChunkPress, ...) need to run.
LocretPress, in kvpress's pipeline too, runs on the transformers that locret needs.
Importing kvpress wraps the attention functions of transformers, for all models.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from locret.engine.engine import Engine
from locret.heads.heads import FEATURES, RetainingHeads
from locret.model.hooks import as_before
from locret.policies import LocretPolicy

if importlib.util.find_spec("kvpress") is None:
    raise ImportError("LocretPress needs the package kvpress: pip install 'locret[bench]'")

from kvpress import ScorerPress
from kvpress.presses.base_press import SUPPORTED_MODELS
from kvpress.utils import get_prerope_key_states, get_prerope_query_states


@dataclass
class LocretPress(ScorerPress):
    """Keeps what the retaining heads score highest. Cost: the heads, and with the tap `qkv` the
    layer's query and key projections once more, because kvpress keeps neither.

    Args:
        compression_ratio: share of the context's units to remove, 0 to 1.
        heads: retaining heads, or where they are (`RetainingHeads.from_pretrained`). They must be
            query-agnostic: kvpress shows a press no question.

    Raises:
        ValueError: no heads or query-aware ones; when used, a model that they do not fit.
    """

    heads: RetainingHeads | str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is None:
            raise ValueError("LocretPress needs heads: heads=RetainingHeads, a folder or a Hub id")
        if not isinstance(self.heads, RetainingHeads):
            self.heads = RetainingHeads.from_pretrained(self.heads)
        if self.heads.config.query_tokens:
            raise ValueError(
                f"these heads are query-aware ({self.heads.config.query_tokens} tokens of the "
                "question in front), and kvpress shows a press no question; use other heads"
            )

    def post_init_from_model(self, model: Any) -> None:
        """Check that the heads fit, and bring them to the model's device and dtype."""
        if not isinstance(model, SUPPORTED_MODELS):
            known = ", ".join(kind.__name__ for kind in SUPPORTED_MODELS)
            raise ValueError(f"kvpress does not cover {type(model).__name__}; it covers {known}")
        policy = Engine(model, heads=self.heads, budget=None).policy  # type: ignore[arg-type]
        assert isinstance(policy, LocretPolicy)
        self.heads = policy.heads

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Scores [B, H, T] of the context's units; higher = keep.

        Args:
            hidden_states: [B, T, hidden size], the attention layer's input.
            keys, values: [B, H, T, D]; the keys are rotated and not used.
        """
        assert isinstance(self.heads, RetainingHeads)
        features = FEATURES[self.heads.config.tap]
        read = features(_Layer(module, hidden_states, values))
        return self.heads[module.layer_idx](read)  # type: ignore[index]

    def forward_hook(
        self, module: nn.Module, input: list[Tensor], kwargs: dict[str, Any], output: list[Any]
    ) -> list[Any]:
        """As kvpress does it, on newer transformers too."""
        return super().forward_hook(module, input, as_before(module, kwargs), output)


@dataclass(frozen=True)
class _Layer:
    """A layer's tensors for `FEATURES`, queries and keys before RoPE, made when asked."""

    module: nn.Module
    hidden: Tensor
    value: Tensor

    @property
    def query(self) -> Tensor:
        return get_prerope_query_states(self.module, self.hidden)

    @property
    def key(self) -> Tensor:
        return get_prerope_key_states(self.module, self.hidden)
