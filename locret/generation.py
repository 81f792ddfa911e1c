"""Engine: read a prompt of any length within a budget, then generate with stock `generate()`.

The paper's algorithm (section 3.3): the prompt but its last `local_tokens` tokens is read in
chunks; after each chunk every KV head keeps its `budget` best units, the last `stabilizers` of them
whatever they scored, except after the last chunk. Then the local tokens and the answer run without
eviction.
"""

import contextlib
import copy
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from locret.attention import RetainedAttention
from locret.backbone import Backbone
from locret.cache import Eviction, Positions, RetainedCache
from locret.heads import RetainingHeads
from locret.policies import POLICIES, LocretPolicy, Policy
from locret.rotary import LongRopeRule

Auto = Literal["auto"]
Progress = Callable[[int, int], None]
"""Called after every chunk with the tokens read so far and the tokens to read in all."""

PAPER = {"budget": 16384, "chunk_size": 3072, "stabilizers": 2500, "local_tokens": 100}
"""The engine settings of the paper, where neither the user nor the heads say otherwise."""

DEFAULT_NEW_TOKENS = 64

MANY_ROWS = ("num_beams", "num_return_sequences")
"""Arguments that let stock `generate` run several sequences for one prompt."""

REFUSED_ARGUMENTS = (
    "assistant_model",
    "cache_implementation",
    "guidance_scale",
    "inputs_embeds",
    "prompt_lookup_num_tokens",
)
"""Arguments of stock `generate` that bring a cache of their own or roll ours back."""


class Engine:
    """Generation within a bounded cache, for a stock model.

    Attached to the model only while a call runs, or inside `with engine:` (where
    `model.generate(..., past_key_values=cache)` works too). One engine serves any number of
    requests in turn: all state of a request lives in its cache.

    "auto" takes what the heads record, else the paper's value. With a smaller budget than recorded,
    `stabilizers="auto"` keeps the recorded proportion of stabilizers to budget.

    Args:
        model: a stock transformers causal language model.
        policy: a name of `locret.policies.POLICIES`, or a `Policy`.
        heads: retaining heads; the policy "locret" needs them.
        budget: units every KV head keeps; None = nothing is ever evicted.
        chunk_size: tokens of the prompt read at a time; None = all at once.
        stabilizers: last units that survive every eviction but the final one.
        local_tokens: last tokens of the prompt that are read after the final eviction.
        positions: "compact" or "original" (`locret.cache`).
        longrope: "long" or "by_length" (`locret.rotary`).
        progress: called after every chunk.

    Raises:
        ValueError: an unsupported model, heads of another backbone, or settings that cannot work
            together; says what to change.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: str | Policy = "locret",
        *,
        heads: RetainingHeads | None = None,
        budget: int | None | Auto = "auto",
        chunk_size: int | None | Auto = "auto",
        stabilizers: int | Auto = "auto",
        local_tokens: int | Auto = "auto",
        positions: Positions | Auto = "auto",
        longrope: LongRopeRule | Auto = "auto",
        progress: Progress | None = None,
    ) -> None:
        record = heads.config if heads is not None else None
        if longrope == "auto":
            longrope = record.longrope if record else "long"  # type: ignore[assignment]
        if positions == "auto":
            positions = record.positions if record else "compact"  # type: ignore[assignment]
        self.model = model
        self.backbone = Backbone(model, longrope)  # type: ignore[arg-type]
        self.policy = _make_policy(policy, heads, self.backbone)
        recorded = _recorded(record.defaults if record else {})
        self.budget, self.stabilizers = _budget_and_stabilizers(budget, stabilizers, recorded)
        if not self.policy.evicts:
            self.budget = None
        self.chunk_size = recorded["chunk_size"] if chunk_size == "auto" else chunk_size
        self.local_tokens = recorded["local_tokens"] if local_tokens == "auto" else local_tokens
        self.query_tokens = 0
        if isinstance(self.policy, LocretPolicy):
            self.query_tokens = self.policy.heads.config.query_tokens
        self.positions: Positions = positions  # type: ignore[assignment]
        self.progress = progress
        self._check_settings()
        self._attached: contextlib.ExitStack | None = None
        self._depth = 0

    def _check_settings(self) -> None:
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions is {self.positions!r}; expected 'compact' or 'original'")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget is {self.budget}; expected at least 1, or None for no limit")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size is {self.chunk_size}; expected at least 1, or None")
        if self.local_tokens < 1:
            raise ValueError(
                f"local_tokens is {self.local_tokens}; expected at least 1: the answer starts from "
                "the last token of the prompt, which is read after the final eviction"
            )
        if self.stabilizers < 0:
            raise ValueError(f"stabilizers is {self.stabilizers}; expected zero or more")
        if self.budget is not None and self.stabilizers + self.query_tokens > self.budget:
            query = f" and the heads keep {self.query_tokens} query tokens" * bool(
                self.query_tokens
            )
            raise ValueError(
                f"stabilizers is {self.stabilizers}{query} but the budget is {self.budget}: they "
                "are kept within the budget; lower stabilizers or raise the budget"
            )

    def __enter__(self) -> "Engine":
        if self._depth == 0:
            stack = contextlib.ExitStack()
            run = RetainedAttention(self.policy, self.backbone.backend)
            stack.enter_context(self.backbone.attached(run))
            self._attached = stack
        self._depth += 1
        return self

    def __exit__(self, *exception: Any) -> None:
        self._depth -= 1
        if self._depth <= 0:  # below zero after a close() within the block
            self.close()

    def close(self) -> None:
        """Detach from the model, if attached. The engine can be used again."""
        self._depth = 0
        if self._attached is not None:
            stack, self._attached = self._attached, None
            stack.close()

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        query_ids: Tensor | None = None,
    ) -> RetainedCache:
        """Read a whole context in chunks and compress it to the budget.

        Args:
            input_ids: [B, n] long, rows of equal length.
            attention_mask: [B, n], all ones, or None.
            query_ids: [B, q] long: what will be asked. Query-aware heads (Locret-Q) need it: it is
                read in front of the context, once more, and never evicted. Without a budget nothing
                is scored, and it is not read.

        Returns:
            The cache, to go on from with `generate(question_ids, cache=cache)`.

        Raises:
            ValueError: an empty prompt, padding, or a query missing or given to no use.
        """
        _check_ids(input_ids)
        _check_mask(attention_mask, input_ids, context_length=0)
        query_ids = self._checked_query(query_ids, input_ids)
        with self:
            return self._prefill(input_ids, input_ids.shape[1], query_ids)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: RetainedCache | None = None,
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate after a prompt, or after a question about a context read before.

        Args:
            input_ids: [B, n] long: the prompt, or with `cache` only what follows its context.
            attention_mask: all ones, or None.
            cache: a cache of `prefill` or of an earlier `generate`. It goes on from where it is,
                and holds question and answer afterwards.
            max_new_tokens: default 64, unless `max_length` or a `generation_config` is given.
            **kwargs: of stock `generate`: streamer, sampling, stopping criteria, ...

        Returns:
            What stock `generate` returns: `input_ids` followed by the answer.

        Raises:
            ValueError: an empty prompt, padding, or a decoding method that needs to roll back the
                cache.
        """
        _check_ids(input_ids)
        context = input_ids[:, :0] if cache is None else self._context_ids(cache, input_ids)
        _check_mask(attention_mask, input_ids, context.shape[1])
        _check_decoding(self.model, kwargs, with_cache=cache is not None)
        if max_new_tokens is None and not any(map(kwargs.get, ("max_length", "generation_config"))):
            max_new_tokens = DEFAULT_NEW_TOKENS
        if max_new_tokens is not None:
            kwargs["max_new_tokens"] = max_new_tokens
        with self:
            if cache is None:
                cache = self._read_prompt(input_ids)
                # What was read in front of the prompt, for stock generate's bookkeeping.
                context = input_ids[:, input_ids.shape[1] - cache.query_length :]
                limit = kwargs.get("max_length") or getattr(
                    kwargs.get("generation_config"), "max_length", None
                )
                if limit and cache.query_length:
                    kwargs["max_length"] = limit + cache.query_length
            sequence = torch.cat([context, input_ids], dim=1)
            return self._generate(sequence, cache, context.shape[1], kwargs)

    def _read_prompt(self, input_ids: Tensor) -> RetainedCache:
        """The cache after all of the prompt but its local tokens."""
        length = input_ids.shape[1]
        context = input_ids[:, : max(length - self.local_tokens, 0)]
        query_ids = None
        if self.query_tokens and self.budget is not None and context.shape[1]:
            query_ids = input_ids[:, -self.query_tokens :]
        return self._prefill(context, length, query_ids)

    def _prefill(
        self, input_ids: Tensor, prompt_length: int, query_ids: Tensor | None
    ) -> RetainedCache:
        cache = RetainedCache(self.backbone.geometry.num_layers, self.budget, self.positions)
        cache.prompt_length = prompt_length
        query = 0
        if query_ids is not None:
            query = cache.query_length = query_ids.shape[1]
            input_ids = torch.cat([query_ids, input_ids], dim=1)
        total = input_ids.shape[1]
        for start in range(0, total, self.chunk_size or max(total, 1)):
            chunk = input_ids[:, start : start + (self.chunk_size or total)]
            end = start + chunk.shape[1]
            if self.budget is not None:
                stabilizers = self.stabilizers if end < total else 0
                cache.eviction = Eviction(self.budget, stabilizers, query)
            self.backbone.decoder(input_ids=chunk, past_key_values=cache, use_cache=True)
            if self.progress is not None:
                self.progress(end, total)
        cache.eviction = None
        cache.token_ids = input_ids.cpu()
        cache.unread_ids = cache.token_ids[:, :0]
        return cache

    def _checked_query(self, query_ids: Tensor | None, input_ids: Tensor) -> Tensor | None:
        """The query to read in front of a context, if any."""
        if query_ids is None:
            if self.query_tokens and self.budget is not None:
                raise ValueError(
                    f"these heads are query-aware (they learned with {self.query_tokens} tokens of "
                    "the question in front): pass query_ids, or use heads with query_tokens 0"
                )
            return None
        _check_ids(query_ids)
        if not self.query_tokens:
            raise ValueError("query_ids given, but the policy's heads are not query-aware")
        if query_ids.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"query_ids has {query_ids.shape[0]} rows and input_ids {input_ids.shape[0]}; they "
                "must match"
            )
        if self.budget is None:
            return None
        return query_ids[:, -self.query_tokens :].to(input_ids.device)

    def _context_ids(self, cache: RetainedCache, input_ids: Tensor) -> Tensor:
        """Tokens that the cache has seen or was answered, for stock generate's bookkeeping."""
        layers = self.backbone.geometry.num_layers
        if not isinstance(cache, RetainedCache) or len(cache.layers) != layers:
            raise ValueError(
                f"cache is a {type(cache).__name__} of {len(cache.layers)} layers; expected one of "
                f"engine.prefill for this model, of {layers}"
            )
        ids = cache.token_ids
        if ids is None or ids.shape[1] != cache.seen:
            known = 0 if ids is None else ids.shape[1]
            raise ValueError(
                f"the cache has seen {cache.seen} tokens but knows the ids of {known}: it was "
                "advanced outside the engine, or by beams; make a fresh one with engine.prefill"
            )
        if ids.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"the cache has {ids.shape[0]} rows and input_ids {input_ids.shape[0]}; they must "
                "match"
            )
        return torch.cat([ids, cache.unread_ids], dim=1).to(input_ids.device)

    def _generate(
        self, sequence: Tensor, cache: RetainedCache, context: int, kwargs: dict[str, Any]
    ) -> Any:
        """Stock generate over a sequence whose first tokens `cache` has seen."""
        beams, returned = (_setting(self.model, kwargs, name) or 1 for name in MANY_ROWS)
        if max(beams, returned) > 1:
            cache.token_ids = None  # of no use to another call, should this one fail
            cache.batch_repeat_interleave(max(beams, returned))
        if _setting(self.model, kwargs, "use_cache") is False:
            kwargs = kwargs | {"use_cache": True}
        output = self.model.generate(  # type: ignore[operator]
            sequence,
            attention_mask=torch.ones_like(sequence),
            past_key_values=cache,
            **kwargs,
        )
        plain = isinstance(output, Tensor)
        sequences = output if plain else output.sequences
        if beams == 1:  # else the cache's rows are the last beams, not the sequences returned
            cache.token_ids = sequences[:, : cache.seen].cpu()
            cache.unread_ids = sequences[:, cache.seen :].cpu()
        if plain:
            return sequences[:, context:]
        output.sequences = sequences[:, context:]
        return output


def _make_policy(policy: str | Policy, heads: RetainingHeads | None, backbone: Backbone) -> Policy:
    if heads is not None:
        _check_fit(heads, backbone)
    if isinstance(policy, LocretPolicy):
        _check_fit(policy.heads, backbone)
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is unknown; expected one of {sorted(POLICIES)}")
    if policy != LocretPolicy.name:
        return POLICIES[policy]()
    if heads is None:
        raise ValueError(
            "policy 'locret' needs trained heads: pass "
            "heads=locret.RetainingHeads.from_pretrained(...), or choose another policy"
        )
    return LocretPolicy(_fitting(heads, backbone))


def _check_fit(heads: RetainingHeads, backbone: Backbone) -> None:
    differences = heads.config.differences(backbone.geometry)
    if differences:
        raise ValueError(
            f"these heads are for another backbone ({heads.config.backbone or 'not recorded'}): "
            + "; ".join(differences)
        )


def _fitting(heads: RetainingHeads, backbone: Backbone) -> RetainingHeads:
    """The heads, on the backbone's device and in its dtype."""
    model: Any = backbone.model
    if {(p.device, p.dtype) for p in heads.parameters()} != {(model.device, model.dtype)}:
        heads = copy.deepcopy(heads).to(model.device, model.dtype)  # the caller's stay as they are
    return heads


def _recorded(defaults: dict[str, int]) -> dict[str, int]:
    """The heads' settings, the paper's for those not recorded; its stabilizers in proportion."""
    settings = PAPER | defaults
    if "stabilizers" not in defaults and settings["budget"] < PAPER["budget"]:
        settings["stabilizers"] = PAPER["stabilizers"] * settings["budget"] // PAPER["budget"]
    return settings


def _budget_and_stabilizers(
    budget: int | None | Auto, stabilizers: int | Auto, recorded: dict[str, int]
) -> tuple[int | None, int]:
    if stabilizers == "auto":
        stabilizers = recorded["stabilizers"]
        if isinstance(budget, int) and budget < recorded["budget"]:
            stabilizers = stabilizers * budget // recorded["budget"]
    if budget == "auto":
        budget = recorded["budget"]
    return budget, stabilizers


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; expected [batch, tokens] with at least "
            "one token"
        )


def _check_mask(attention_mask: Tensor | None, input_ids: Tensor, context_length: int) -> None:
    if attention_mask is None:
        return
    rows, new = input_ids.shape
    if attention_mask.shape not in ((rows, new), (rows, context_length + new)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected that of input_ids, "
            f"{tuple(input_ids.shape)}"
        )
    if not attention_mask.bool().all():
        raise ValueError(
            "attention_mask holds zeros: padding is not supported; batch rows of equal length, or "
            "generate one prompt at a time"
        )


def _check_decoding(model: Any, kwargs: dict[str, Any], with_cache: bool) -> None:
    for name in REFUSED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} does not work with a compressed cache; leave it out")
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False leaves nothing to compress; leave it out")
    if "past_key_values" in kwargs:
        raise ValueError("pass the cache as cache=..., not past_key_values=...")
    if with_cache and (_setting(model, kwargs, "num_beams") or 1) > 1:
        raise ValueError("beam search would mix up the cache given; pass the whole prompt instead")


def _setting(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """What stock generate goes by: its argument, else its configuration's."""
    config = kwargs.get("generation_config") or model.generation_config
    return kwargs.get(name) or getattr(config, name, None)
