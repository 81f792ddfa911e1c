"""Engine: read a prompt of any length within a budget, then generate with stock `generate()`.

The paper's algorithm (section 3.3): the prompt but its last `local_tokens` tokens is read in
chunks; after each chunk every KV head keeps its `budget` best units, the last `stabilizers` of them
whatever they scored, except after the last chunk. Then the local tokens and the answer run without
eviction.
"""

import contextlib
import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from locret.cache.cache import DECODE_ROOM, Eviction, Positions, RetainedCache
from locret.cache.files import check_model, describe
from locret.cache.merging import MergingChoice, merging_of
from locret.cache.recall import Recall, recall_of
from locret.cache.sizing import Sizing
from locret.engine.arguments import (
    BRANCHING,
    ShowingPrompt,
    after_questions,
    check_decoding,
    check_ids,
    check_not_repeated,
    inferred_mask,
    left_mask,
    left_padding,
    longest,
    prompt_lengths,
    setting,
    stock_settings,
    unpadded,
)
from locret.engine.attention import RetainedAttention
from locret.engine.config import Auto, Budget, Settings, memory_budget
from locret.engine.reading import Progress, Reader, one_if_equal
from locret.engine.steps import (
    GraphedSteps,
    StepCounts,
    seen_through,
    why_not_graphed,
    without_mask,
)
from locret.heads.heads import RetainingHeads
from locret.kernels.dispatch import AVAILABLE
from locret.model.attend import Backend, available, fastest
from locret.model.backbone import Backbone
from locret.model.cache_names import as_argument
from locret.model.hooks import without_autocast
from locret.model.rotary import LongRopeRule
from locret.policies import POLICIES, LocretPolicy, Policy
from locret.quantization import Quantization, scheme_of
from locret.quantization.fp8 import Fp8Scheme, key_bias_warning

DEFAULT_NEW_TOKENS = 64
MOST_ROOM = 8192  # tokens of an answer for which storage is made at once


class Engine:
    """Generation within a bounded cache, for a stock model.

    Attached to the model only while a call runs, or inside `with engine:` (where
    `model.generate(..., cache=cache)` works too; before transformers 5.24 it is called
    `past_key_values`). One engine serves any number of requests in turn: all state of a request
    lives in its cache.

    "auto" takes what the heads record, else the paper's value. With a smaller budget than recorded,
    `stabilizers="auto"` keeps the recorded proportion of stabilizers to budget.

    Args:
        model: a stock transformers causal language model.
        policy: a name of `locret.policies.POLICIES`, or a `Policy`.
        heads: retaining heads; the policy "locret" needs them.
        budget: units every KV head keeps: a whole number; a share of the context (0.25); one number
            for each layer; None = nothing is ever evicted.
        budget_bytes: the budget as memory instead, a number of bytes or "2GiB": what fits into it
            of one row's keys, values, scores and source positions, in all layers, as they are
            stored. Outliers (kvquant), what is recalled, the local tokens and the answer come on
            top.
        chunk_size: tokens of the prompt read at a time; None = all at once.
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
        backend: "auto" or a name of `locret.model.attend`: how attention is computed. "minference"
            needs policy="full" and chunk_size=None.
        graphs: run the steps of an answer from a CUDA graph; "auto" = where that works.
        progress: called after every chunk.

    Attributes:
        last_steps: how the one-token steps of the last answer ran
            (`locret.engine.steps.StepCounts`); None before the first.

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
        budget: Budget | Auto = "auto",
        budget_bytes: int | str | None = None,
        chunk_size: int | None | Auto = "auto",
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
        core = policy.core if isinstance(policy, Policy) else None
        scoring = core.heads if isinstance(core, LocretPolicy) else heads
        record = scoring.config if scoring is not None else None
        if longrope == "auto":
            longrope = record.longrope if record else "long"  # type: ignore[assignment]
        if positions == "auto":
            positions = record.positions if record else "compact"  # type: ignore[assignment]
        self.model = model
        self.backbone = Backbone(model, longrope)  # type: ignore[arg-type]
        self.policy = _make_policy(policy, heads, self.backbone)
        budget = memory_budget(budget, budget_bytes)
        if not self.policy.evicts:
            budget = decode_interval = None
        self.settings = Settings.resolve(
            record.defaults if record else {},
            budget,
            chunk_size,
            stabilizers,
            local_tokens,
            positions,  # type: ignore[arg-type]
            decode_interval,
        )
        self.query_tokens = 0
        if isinstance(self.policy.core, LocretPolicy):
            self.query_tokens = self.policy.core.heads.config.query_tokens
        self.merging = merging_of(merging)
        shape = self.backbone.geometry
        self.settings.check(self.query_tokens, shape.num_layers)
        self.sizing = Sizing(
            scheme_of(quantization),
            shape.num_layers,
            shape.num_kv_heads,
            shape.head_size,
            self.backbone.model.dtype.itemsize,
            self.merging is not None,
            tuple(window for window in self.backbone.windows if window),
        )
        if isinstance(self.sizing.scheme, Fp8Scheme):
            told = key_bias_warning(self.backbone.key_biases)
            if told is not None:
                warnings.warn(told, stacklevel=2)
        self.recall = recall_of(recall)
        RetainedCache(  # do they agree?
            0,
            positions=self.positions,
            scheme=self.sizing.scheme,
            merging=self.merging,
            recall=self.recall,
        )
        self.query_aware = query_aware
        if query_aware and self.query_tokens:
            raise ValueError(
                "query_aware=True, but these heads read the question in front of the prompt "
                "already; leave it out"
            )
        if backend == "minference" and (self.budget is not None or self.chunk_size is not None):
            raise ValueError(
                "backend 'minference' reads a whole prompt at once and evicts nothing; use it with "
                "policy='full' and chunk_size=None"
            )
        self.backend: Backend = _backend(backend, self.backbone)
        self.graphs = _graphs(graphs, self.backbone, self.recall)
        self._reader = Reader(
            self.backbone,
            self.policy,
            self.settings,
            self.sizing,
            self.merging,
            self.recall,
            query_aware,
            progress,
        )
        self.last_steps: StepCounts | None = None
        self._attached: contextlib.ExitStack | None = None
        self._depth = 0

    @property
    def budget(self) -> Budget:
        """Units every KV head keeps; see the class."""
        return self.settings.budget

    @property
    def chunk_size(self) -> int | None:
        """Tokens of the prompt read at a time; None = all at once."""
        return self.settings.chunk_size

    @property
    def stabilizers(self) -> int | Auto:
        """Last units that survive every eviction but the final one; "auto" beside a share."""
        return self.settings.stabilizers

    @property
    def local_tokens(self) -> int:
        """Last tokens of the prompt that are read after the final eviction."""
        return self.settings.local_tokens

    @property
    def positions(self) -> Positions:
        """ "compact" or "original"."""
        return self.settings.positions

    @property
    def progress(self) -> Progress | None:
        """Called after every chunk."""
        return self._reader.progress

    @progress.setter
    def progress(self, progress: Progress | None) -> None:
        self._reader.progress = progress

    def __enter__(self) -> "Engine":
        if self._depth == 0:
            stack = contextlib.ExitStack()
            run = RetainedAttention(self.policy, self.backend, self.backbone.surprise)
            finish = run.finish if self.policy.waits else None
            stack.enter_context(self.backbone.attached(run, run.rotation, finish))
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

    def new_cache(self, context: int) -> tuple[RetainedCache, tuple[int, ...] | None]:
        """An empty cache for a context of that many tokens, and what each layer keeps of it."""
        return self._reader.new_cache(context)

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
        query_ids = self._checked_query(query_ids, input_ids)
        rows = unpadded(input_ids, padding)
        lengths = [row.shape[1] for row in rows]
        with self:
            if len(set(lengths)) == 1:
                return self._reader.read(torch.cat(rows), lengths[0], query_ids)
            queries = [None] * len(rows) if query_ids is None else query_ids.split(1)
            return self._reader.read_rows(rows, lengths, queries, input_ids.shape[1])

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
                of different lengths are padded on the left.
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
        check_ids(input_ids)
        context = input_ids[:, :0] if cache is None else self._context_ids(cache, input_ids)
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
            if cache is None:
                return self._answer_prompt(input_ids, padding, kwargs)
            untouched = cache.snapshot()
            try:
                return self._answer_questions(input_ids, padding, cache, context, kwargs)
            except BaseException:  # an interrupt too: the context may have taken minutes to read
                cache.restore(untouched)
                raise

    def _answer_prompt(self, prompt: Tensor, padding: list[int], kwargs: dict[str, Any]) -> Any:
        """What stock generate returns for a prompt [B, n]."""
        cache, tokens = self._read_prompt(prompt, padding), prompt.shape[1]
        # What was read in front of the prompt, for stock generate's bookkeeping.
        front = cache.seen - (tokens - min(self._unread, tokens))
        self._lengthen(kwargs, front)
        sequence = torch.cat([prompt[:, tokens - front :], prompt], dim=1)
        # What stands in front of padding is repeated behind it, and need not count.
        leading = [count + front if count else 0 for count in padding]
        return self._generate(sequence, cache, front, leading, kwargs)

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
        self._lengthen(kwargs, cache.query_length)
        if any(padding):
            sequence = self._read_questions(cache, questions, padding)
            output = self._generate(
                sequence, cache, sequence.shape[1], cache.padding or padding, kwargs
            )
            return after_questions(questions, output)
        sequence = torch.cat([context, questions], dim=1)
        padding = list(cache.padding or padding)
        return self._generate(sequence, cache, context.shape[1], padding, kwargs)

    def _lengthen(self, kwargs: dict[str, Any], front: int) -> None:
        """Make lengths that count the prompt count `front` tokens read in front of it too."""
        if front:
            for name, length in prompt_lengths(self.model, kwargs).items():
                kwargs[name] = length + front

    @property
    def asks_together(self) -> bool:
        """Whether questions of different lengths about contexts can be asked together: all but
        their last tokens are read before, which is not the same to eviction and recall."""
        return self.settings.decode_interval is None and self.recall is None

    def _read_questions(
        self, cache: RetainedCache, questions: Tensor, padding: list[int]
    ) -> Tensor:
        """Read questions of different lengths, all but their last tokens.

        Returns:
            [B, n] long: all that the cache knows then, padded on the left, and the last tokens.
        """
        one = questions.shape[1] - max(padding) + cache.unread_ids.shape[1] == 1
        if one or not self.asks_together or cache.recall is not None:
            what = "a question of one token" if one else "with decode_interval or recall, questions"
            raise ValueError(
                f"attention_mask holds zeros: {what} cannot be asked together with longer ones; "
                "ask rows of equal length, or one row at a time"
            )
        rows: dict[int, RetainedCache] = {}
        for skip in sorted(set(padding)):
            alike = [i for i, length in enumerate(padding) if length == skip]
            part = cache.rows(alike)
            assert part.token_ids is not None
            new = torch.cat([part.unread_ids.to(questions.device), questions[alike, skip:]], dim=1)
            self._reader.take_in(new[:, :-1], part)
            part.token_ids = torch.cat([part.token_ids, new[:, :-1].cpu()], dim=1)
            rows |= {i: part.rows([place]) for place, i in enumerate(alike)}
        stacked = self._reader.stacked([rows[i] for i in range(len(padding))], 0)
        cache.restore(stacked.snapshot())
        assert cache.token_ids is not None
        return torch.cat([cache.token_ids.to(questions.device), questions[:, -1:]], dim=1)

    @property
    def _unread(self) -> int:
        """Last tokens of a prompt that are read after the final eviction."""
        return 1 if self.query_aware else self.local_tokens

    def _read_prompt(self, input_ids: Tensor, padding: list[int]) -> RetainedCache:
        """The cache after all of the prompt but its local tokens, or the last one of them."""
        width = input_ids.shape[1]
        unread = min(self._unread, width)
        if not any(padding):
            context = input_ids[:, : width - unread]
            return self._reader.read(context, width, self._query_of(input_ids, context))
        rows = unpadded(input_ids, padding)
        contexts = [row[:, : max(row.shape[1] - unread, 0)] for row in rows]
        queries = [self._query_of(row, c) for row, c in zip(rows, contexts, strict=True)]
        if (
            self.settings.decode_interval
            and len({0 if q is None else q.shape[1] for q in queries}) > 1
        ):
            raise ValueError(
                "decode_interval: some rows are too short for query-aware heads to read a question "
                "in front, which is never evicted, and others are not; ask one row at a time"
            )
        lengths = [row.shape[1] for row in rows]
        cache = self._reader.read_rows(contexts, lengths, queries, width - unread)
        heads, device = self.backbone.geometry.num_kv_heads, input_ids.device
        # Rows shorter than the local tokens are padded within these.
        within = [max(unread - length, 0) for length in lengths]
        if cache.padding is not None:
            cache.padding = tuple(map(sum, zip(cache.padding, within, strict=True)))
        for layer in cache.layers:
            layer.add_empty(within, heads, device)
        return cache

    def _query_of(self, prompt: Tensor, context: Tensor) -> Tensor | None:
        """What query-aware heads read in front of a prompt's context, if there is any."""
        if self.query_tokens and self.budget is not None and context.shape[1]:
            return prompt[:, -self.query_tokens :]
        return None

    def _checked_query(self, query_ids: Tensor | None, input_ids: Tensor) -> Tensor | None:
        """The query to read in front of a context, or behind it, if any."""
        if query_ids is None:
            if self.query_aware and self.budget is not None:
                raise ValueError(
                    "the engine is query_aware, so that a context is compressed for a question: "
                    "pass query_ids, or leave query_aware out"
                )
            if self.query_tokens and self.budget is not None:
                raise ValueError(
                    f"these heads are query-aware (they learned with {self.query_tokens} tokens of "
                    "the question in front): pass query_ids, or use heads with query_tokens 0"
                )
            return None
        check_ids(query_ids)
        if not self.query_tokens and not self.query_aware:
            raise ValueError(
                "query_ids given, but the policy's heads are not query-aware, nor was the engine "
                "made with query_aware=True"
            )
        if query_ids.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"query_ids has {query_ids.shape[0]} rows and input_ids {input_ids.shape[0]}; they "
                "must match"
            )
        if self.budget is None or not self.sizing.num_layers:
            return None
        # All of it behind the context, as much as the heads learned with in front.
        return query_ids[:, -self.query_tokens :].to(input_ids.device)

    def _context_ids(self, cache: RetainedCache, input_ids: Tensor) -> Tensor:
        """Tokens that the cache has seen or was answered, for stock generate's bookkeeping."""
        layers, had = len(self.backbone.layers), len(getattr(cache, "layers", ()))
        if not isinstance(cache, RetainedCache) or had != layers:
            raise ValueError(
                f"cache is a {type(cache).__name__} of {had} layers; expected one of "
                f"engine.prefill for this model, of {layers}"
            )
        ids = cache.token_ids
        if ids is None and not cache.seen:
            raise ValueError("the cache has read nothing yet; make one with engine.prefill")
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
        check_model("the cache", cache.model, describe(self.backbone.model))
        if cache.longrope != self.backbone.longrope:
            raise ValueError(
                f"the cache was read with longrope={cache.longrope!r} and this engine has "
                f"{self.backbone.longrope!r}; use one with the same"
            )
        return torch.cat([ids, cache.unread_ids], dim=1).to(input_ids.device)

    def _generate(
        self,
        sequence: Tensor,
        cache: RetainedCache,
        context: int,
        padding: Sequence[int],
        kwargs: dict[str, Any],
    ) -> Any:
        """Stock generate over a sequence [B, n] whose first tokens `cache` has seen.

        Args:
            context: first tokens that are not returned.
            padding: how many leading tokens of each row stand for nothing.
        """
        beams, returned = (setting(self.model, kwargs, name) or 1 for name in BRANCHING)
        last = longest(self.model, kwargs, sequence)
        self._bound_answer(cache, last)
        if max(beams, returned) > 1:
            cache.batch_repeat_interleave(max(beams, returned))
            cache.token_ids = None  # whose rows are the beams' no more
        kwargs = kwargs | stock_settings(self.model, kwargs)
        cache.room = min(max(last - cache.seen, DECODE_ROOM), MOST_ROOM)
        model, steps = self._answering(cache, any(padding), beams)
        seen = cache.seen
        output = model.generate(
            sequence,
            attention_mask=left_mask(sequence, padding),
            **as_argument(self.backbone.model, cache, "generate"),
            **kwargs,
        )
        with without_autocast(sequence.device):
            for layer in cache.layers:
                layer.units.settle()
        # Beside those of new tokens, the call that reads what is left of a prompt, if that is one.
        taken = cache.seen - sequence.shape[1] + (sequence.shape[1] - seen == 1)
        self.last_steps = StepCounts(taken, *((steps.fast, steps.replayed) if steps else ()))
        plain = isinstance(output, Tensor)
        sequences = output if plain else output.sequences
        if beams == 1:  # else the cache's rows are the last beams, not the sequences returned
            cache.token_ids = sequences[:, : cache.seen].cpu()
            cache.unread_ids = sequences[:, cache.seen :].cpu()
        if plain:
            return sequences[:, context:]
        output.sequences = sequences[:, context:]
        return output

    def _answering(
        self, cache: RetainedCache, padded: bool, beams: int
    ) -> tuple[Any, GraphedSteps | None]:
        """The model whose `generate` answers, and what takes its one-token steps, if anything."""
        takes_steps = all(layer.takes_steps for layer in cache.layers)
        if beams == 1 and cache.eviction is None and takes_steps and self.fast_steps:
            steps = GraphedSteps(self.backbone, cache, self.graphs)
            return seen_through(self.backbone.model, steps), steps
        return seen_through(self.backbone.model, without_mask) if padded else self.model, None

    @property
    def fast_steps(self) -> bool:
        """Whether one-token steps run with counters on the device (`locret.engine.steps`)."""
        backbone, fused = self.backbone, self.backend != "eager" and AVAILABLE
        return fused and backbone.plain and [d.type for d in backbone.devices] == ["cuda"]

    def _bound_answer(self, cache: RetainedCache, last: int) -> None:
        """Let the layers evict while the answer comes, of at most `last` tokens with all before
        it, if that was asked for."""
        cache.eviction = None
        interval = self.settings.decode_interval
        if interval is None or cache.budget is None:
            return
        if cache.answered:
            raise ValueError(
                "decode_interval: this cache answered without eviction before, so that it holds "
                "units without a score; go on with the engine it came from, or read its context "
                "again"
            )
        whole = max(cache.prompt_lengths)
        budgets = self.settings.answer_budgets(self.policy, self.sizing, whole, last)
        if budgets is None:
            layers = self.backbone.geometry.num_layers
            budgets = cache.budget if isinstance(cache.budget, tuple) else (cache.budget,) * layers
        cache.budget = one_if_equal(budgets)
        stabilizers = self.settings.stabilizers_for(budgets)
        cache.eviction = Eviction(
            budgets, stabilizers, cache.query_length, interval - 1, merging=cache.merging
        )


def _make_policy(policy: str | Policy, heads: RetainingHeads | None, backbone: Backbone) -> Policy:
    if heads is not None:
        _check_fit(heads, backbone)
    if isinstance(policy, Policy):
        if isinstance(policy.core, LocretPolicy):
            _check_fit(policy.core.heads, backbone)
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
    """The heads, each on its layer's device, in the backbone's dtype."""
    dtype: Any = backbone.model.dtype
    places = [(layer.device, dtype) for layer in backbone.retained]
    if any(
        (p.device, p.dtype) != place
        for head, place in zip(heads.layers, places, strict=True)
        for p in head.parameters()
    ):
        heads = copy.deepcopy(heads)  # the caller's stay as they are
        for head, place in zip(heads.layers, places, strict=True):
            head.to(*place)
    return heads


def _backend(backend: Backend | Auto, backbone: Backbone) -> Backend:
    model, size = backbone.model, backbone.geometry.head_size
    device = backbone.layers[0].device
    if backend == "auto":
        if backbone.backend == "eager":
            return "eager"
        return fastest(device, model.dtype, size)
    reason = available(backend, device, model.dtype, size)
    if reason is not None:
        raise ValueError(f"backend {backend!r} does not work here: {reason}; leave it 'auto'")
    return backend


def _graphs(graphs: bool | Auto, backbone: Backbone, recall: Recall | None) -> bool:
    reason = why_not_graphed(backbone)
    if recall is not None:
        reason = "recall chooses blocks on the host at every step"
    if graphs is True and reason is not None:
        raise ValueError(f"graphs=True does not work here: {reason}; leave it 'auto'")
    return reason is None and graphs is not False
