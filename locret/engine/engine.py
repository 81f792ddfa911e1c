"""Engine: read a prompt of any length within a budget, then generate with stock `generate()`.

The paper's algorithm (section 3.3): the prompt but its last `local_tokens` tokens is read in
chunks; after each chunk every KV head keeps its `budget` best units, the last `stabilizers` of them
whatever they scored, except after the last chunk. Then the local tokens and the answer run without
eviction.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from locret.cache.cache import Positions, RetainedCache
from locret.cache.context import Counts
from locret.cache.merging import MergingChoice
from locret.cache.recall import Recall
from locret.engine.answering import Answering
from locret.engine.arguments import (
    ShowingPrompt,
    after_questions,
    check_decoding,
    check_ids,
    check_not_repeated,
    checked_query,
    context_ids,
    inferred_mask,
    left_padding,
    setting,
)
from locret.engine.attention import RetainedAttention
from locret.engine.config import Auto, EngineConfig
from locret.engine.contexts import Progress, Reader, read_questions, together
from locret.engine.reading import ChunkCounts, ChunkForward
from locret.engine.scoring import make_policy, scoring_heads
from locret.engine.steps import StepCounts
from locret.engine.stock_calls import StockCalls, doing
from locret.heads.heads import RetainingHeads
from locret.heads.quotas import QuotasChoice
from locret.model.backbone import Backbone
from locret.model.backends import Backend
from locret.model.rotary import LongRopeRule
from locret.policies import Policy
from locret.quantities import BudgetChoice
from locret.quantization import Quantization

DEFAULT_NEW_TOKENS = 64


class Engine:
    """Generation within a bounded cache, for a stock model.

    Attached to the model only while a call runs, or inside `with engine:` (where
    `model.generate(..., cache=cache)` works too; before transformers 5.24 it is called
    `past_key_values`). One engine serves any number of requests in turn: all state of a request
    lives in its cache.

    "auto" takes what the heads record, else the paper's value, but for `chunk_size`. With a smaller
    budget than recorded, `stabilizers="auto"` keeps the recorded proportion of stabilizers to it.

    Args:
        model: a stock transformers causal language model.
        policy: a name of `locret.policies.POLICIES`, or a `Policy`.
        heads: retaining heads; the policy "locret" needs them.
        budget: units a KV head keeps on average: a whole number; a share of the context, 0.25 or
            "8x", an eighth; one number for each layer; memory, "2GiB"; "8x bytes", at most an
            eighth of the bytes that keys and values of the whole context take in 16 bits; None =
            nothing is ever evicted. Into bytes goes what fits of one row's keys, values, scores and
            source positions, in all layers, as they are stored ("8x bytes": layers with a sliding
            window aside, and at least one unit a head). Outliers (kvquant), what is recalled, the
            local tokens and the answer come on top.
        quotas: which KV heads keep more than the average and which less: numbers [layers, KV heads]
            on any scale, such tables by compression ({"2": ..., "8": ...}), or a .json or .npy file
            of either, as `python -m locret calibrate` writes them; None = all heads alike. "auto" =
            what the heads record, where the policy scores with them. The total is the budget's:
            `locret.heads.quotas`.
        budget_bytes: the old name of a budget that is memory; use budget="2GiB".
        chunk_size: tokens of the prompt read at a time; None = all at once; "auto" = the fastest on
            the model's device that fits (`locret.engine.chunk_size`); "recorded" = what the heads
            record, else "auto".
        stabilizers: last units that survive every eviction but the final one.
        local_tokens: last tokens of the prompt that are read after the final eviction.
        positions: "compact" or "original" (`locret.cache.cache`).
        longrope: "long" or "by_length" (`locret.model.rotary`).
        query_aware: let the policy see the question before the final eviction. `generate`: the last
            `local_tokens` tokens of the prompt belong to its last chunk, which is ranked and
            evicted as a whole; only the very last token, from which the answer starts, is read
            afterwards. With `chunk_size=None` that is the published one-shot form of the policies
            that look from the prompt's end. `prefill` needs `query_ids`: they are read behind the
            context, in its last chunk, and given up again, to be asked with `generate` later.
            Earlier chunks are evicted without the question. Query-aware heads need no switch.
        decode_interval: also evict while answering, back to the budget every so many tokens, so
            that answers of any length stay bounded; None = answers are kept whole. Rows of a batch
            evict at the same steps.
        quantization: how keys and values are stored: a name of `locret.quantization.SCHEMES`, a
            mapping of name and options ({"name": "kivi", "bits": 2}), or a scheme; None = as they
            are (`docs/quantization.md`). "layerquant" moves a budget given as one number between
            layers.
        merging: how the values of evicted units are merged into units that stay: "similar",
            "adjacent", a mapping of options or a `locret.cache.merging.Merging`; None = they are
            lost. Does not go with quantization (`docs/policies.md`).
        recall: let evicted units wait in host memory and the most relevant blocks of them come back
            for every chunk and step: a `Recall` or its options as a mapping, {} for the defaults;
            None = what is evicted is gone. What comes back is beside the budget
            (`docs/policies.md`). Not for quantized caches, and not with merging.
        backend: "auto" or a name of `locret.model.backends`: how attention is computed.
            "minference" needs policy="full" and chunk_size=None.
        graphs: run the steps of an answer from a CUDA graph; "auto" = where that works.
        progress: called after every chunk.

    Attributes:
        config: the settings, "auto" replaced (`locret.engine.config`).

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
        budget: BudgetChoice | Auto = "auto",
        quotas: QuotasChoice | Auto = "auto",
        budget_bytes: int | str | None = None,
        chunk_size: int | None | Auto | Literal["recorded"] = "recorded",
        stabilizers: int | Auto = "auto",
        local_tokens: int | Auto = "auto",
        positions: Positions | Auto = "auto",
        longrope: LongRopeRule | Auto = "auto",
        query_aware: bool = False,
        decode_interval: int | None = None,
        quantization: Quantization = None,
        merging: MergingChoice = None,
        recall: Recall | Mapping[str, int] | None = None,
        backend: Backend | Auto = "auto",
        graphs: bool | Auto = "auto",
        progress: Progress | None = None,
    ) -> None:
        scoring = scoring_heads(policy, heads)
        config = EngineConfig.of(
            policy,
            scoring.config if scoring else None,
            budget=budget,
            quotas=quotas,
            budget_bytes=budget_bytes,
            chunk_size=chunk_size,
            stabilizers=stabilizers,
            local_tokens=local_tokens,
            positions=positions,
            longrope=longrope,
            query_aware=query_aware,
            decode_interval=decode_interval,
            quantization=quantization,
            merging=merging,
            recall=recall,
            backend=backend,
            graphs=graphs,
        )
        self.model = model
        self.backbone = Backbone(model, config.reading.longrope)
        self.policy = make_policy(policy, heads, self.backbone)
        self.config = config = config.for_model(self.backbone)
        self.sizing = sizing = config.sizing(self.backbone)
        chosen: Any = config.compute.backend  # "auto" no more
        self._attention = RetainedAttention(chosen)
        self._forward = forward = ChunkForward(self.backbone, self._attention, self.policy)
        self._reader = Reader(self.backbone, forward, config, sizing, progress)
        self._answering = Answering(model, self.backbone, forward, config, sizing)
        self._stock_calls = StockCalls()
        self._attached: contextlib.ExitStack | None = None
        self._depth = 0

    @property
    def progress(self) -> Progress | None:
        """Called after every chunk."""
        return self._reader.progress

    @progress.setter
    def progress(self, progress: Progress | None) -> None:
        self._reader.progress = progress

    @property
    def last_chunks(self) -> ChunkCounts:
        """How the chunks that the last call read ran."""
        return self._forward.counts

    @property
    def last_steps(self) -> StepCounts | None:
        """How the one-token steps of the last answer ran; None before the first."""
        return self._answering.last_steps

    @property
    def fast_steps(self) -> bool:
        """Whether one-token steps run with counters on the device (`locret.engine.steps`)."""
        return self._answering.fast_steps

    @property
    def asks_together(self) -> bool:
        """Whether questions of different lengths can be asked together (`Reader`)."""
        return self._reader.asks_together

    def __enter__(self) -> "Engine":
        if self._depth == 0:
            stack, run = contextlib.ExitStack(), self._attention
            finish = run.finish if self.policy.waits else None
            stack.enter_context(self.backbone.attached(run, run.rotation, finish))
            stack.enter_context(self._stock_calls.watched(self.backbone))
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

    def new_cache(self, context: int) -> tuple[RetainedCache, Counts | None]:
        """An empty cache for a context of that many tokens, and what each head keeps of it."""
        return self._reader.new_cache(context)

    def reading_into(
        self, cache: RetainedCache, counts: Counts
    ) -> contextlib.AbstractContextManager[None]:
        """While it is entered, the attached model reads what it is called with into `cache`, of
        which every head keeps so many units: for callers who need the model's outputs. The cache
        is as it was before if it ends by an exception. ValueError: the policy scores nothing before
        it has reread the whole context."""
        if self.policy.rereads:
            raise ValueError(
                f"policy {self.policy.name!r} scores a context by reading it again, so that it "
                "cannot evict while the model's outputs are asked for; choose another policy"
            )
        slots = self.sizing.head_slots(max(cache.prompt_lengths))
        return doing(self._forward.reading(self.config.eviction(counts, slots=slots)), cache)

    @torch.compiler.disable
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
            input_ids: [B, n] long; rows of different lengths are padded on the left.
            attention_mask: [B, n], zeros where a row is padded; None = where `pad_token_id` is, if
                stock `generate` would infer that.
            query_ids: [B, q] long: what will be asked. Query-aware heads (Locret-Q) need it: it is
                read in front of the context, once more, and never evicted; and so does an engine
                with `query_aware`, which reads it behind the context and does not keep it. Without
                a budget nothing is scored, and it is not read.

        Returns:
            The cache, to go on from with `generate(question_ids, cache=cache)`.

        Raises:
            ValueError: an empty prompt, padding elsewhere than on the left, or a query missing or
                given to no use.
        """
        check_ids(input_ids)
        if attention_mask is None:
            attention_mask = inferred_mask(self.model, {}, input_ids)
        padding = left_padding(attention_mask, input_ids)
        query_ids = checked_query(self.config, self.backbone, query_ids, input_ids)
        with self:
            self._forward.begin()
            return self._reader.read_context(input_ids, padding, query_ids)

    @torch.compiler.disable
    @torch.no_grad()
    def together(
        self, caches: Sequence[RetainedCache], questions: Sequence[Tensor] = ()
    ) -> RetainedCache:
        """Contexts of one row each, of equal settings, as one batch to be asked together.

        Args:
            caches: they stay as they are; the batch has a copy of their units.
            questions: tokens [1, n] long for each, at least one, that are read after it; empty =
                none. That takes less memory than to `generate` with questions of different lengths.

        Raises:
            ValueError: caches that differ in model or settings; other than one question for each;
                or, with `decode_interval`, any question, or asked contexts beside fresh ones.
        """
        self._stock_calls.put_back()
        with self:
            self._forward.begin()
            return together(self._reader, caches, questions)

    @torch.compiler.disable
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
            input_ids: [B, n] long: the prompt, or with `cache` only what follows its context. Rows
                of different lengths are padded on the left. [B, 0] = the cache's last answer goes
                on.
            attention_mask: [B, n], zeros where a row is padded; None = where `pad_token_id` is, if
                stock `generate` would infer that.
            cache: a cache of `prefill` or of an earlier `generate`. It goes on from where it is,
                and holds question and answer afterwards; if the call fails, what it held before.
            max_new_tokens: None = what the `generation_config` passed or the model's own says, 64
                if neither has `max_new_tokens` nor `max_length`. The latter counts the whole
                sequence, as stock does: what the cache has read, too.
            **kwargs: of stock `generate`: streamer, sampling, stopping criteria, ... Hidden states
                are those of the local tokens (the question, with `cache`) and the answer.

        Returns:
            What stock `generate` returns: `input_ids` followed by the answer.

        Raises:
            ValueError: an empty prompt, padding elsewhere than on the left, questions of lengths
                that do not go together or that repeat what the cache has read, or a decoding method
                that needs to roll back the cache.
        """
        self._stock_calls.put_back()
        check_ids(input_ids, goes_on=cache is not None)
        context = (
            input_ids[:, :0] if cache is None else context_ids(cache, self.backbone, input_ids)
        )
        if attention_mask is None:
            attention_mask = inferred_mask(self.model, kwargs, input_ids)
        padding = left_padding(attention_mask, input_ids, context.shape[1])
        if cache is not None:
            check_not_repeated(cache, input_ids, padding)
        check_decoding(self.model, kwargs, with_cache=cache is not None)
        if max_new_tokens is not None:
            kwargs["max_new_tokens"] = max_new_tokens
        elif not any(
            setting(self.model, kwargs, name) for name in ("max_new_tokens", "max_length")
        ):
            kwargs["max_new_tokens"] = DEFAULT_NEW_TOKENS
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = ShowingPrompt(kwargs["streamer"], input_ids.shape[1])
        with self:
            self._forward.begin()
            if cache is None:
                return self._answer_prompt(input_ids, padding, kwargs)
            with cache.as_it_was():
                return self._answer_questions(input_ids, padding, cache, context, kwargs)

    def _answer_prompt(self, prompt: Tensor, padding: list[int], kwargs: dict[str, Any]) -> Any:
        """What stock generate returns for a prompt [B, n]."""
        cache, tokens = self._reader.read_prompt(prompt, padding), prompt.shape[1]
        # What was read in front of the prompt, for stock generate's bookkeeping.
        front = cache.query_length
        self._answering.lengthen(kwargs, front)
        sequence = torch.cat([prompt[:, tokens - front :], prompt], dim=1)
        # What stands in front of padding is repeated behind it, and need not count.
        leading = [count + front if count else 0 for count in padding]
        return self._answering.generate(sequence, cache, front, leading, kwargs)

    def _answer_questions(
        self,
        questions: Tensor,
        padding: list[int],
        cache: RetainedCache,
        context: Tensor,
        kwargs: dict[str, Any],
    ) -> Any:
        """What stock generate returns for questions [B, n] about what `cache` has read, of which
        the tokens are `context`."""
        self._answering.lengthen(kwargs, cache.query_length)
        if any(padding):
            sequence = read_questions(self._reader, cache, questions, padding)
            output = self._answering.generate(
                sequence, cache, sequence.shape[1], cache.padding or padding, kwargs
            )
            return after_questions(questions, output)
        sequence = torch.cat([context, questions], dim=1)
        padding = list(cache.padding or padding)
        return self._answering.generate(sequence, cache, context.shape[1], padding, kwargs)
