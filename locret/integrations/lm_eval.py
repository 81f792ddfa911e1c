"""`locret` as a model of lm-evaluation-harness: any of its tasks within a bounded cache.

    python -m locret lm_eval --model locret --tasks offline_ruler --apply_chat_template \
        --model_args pretrained=MODEL,heads=HEADS,budget=8x

Prompts, truncation, stop strings, chat templates and ranks are those of the harness's own `hf`
model, of which this is a subclass: with budget=none the scores are the same. What differs is what
reads and answers: `locret.Engine`.

A prompt is compressed up to the end of its context: where the text of the document's
`context_field` ends in it, else where `question_marker` begins. The rest, its question, is never
evicted. protocol=query_agnostic compresses the context unseen of the question, and refuses prompts
whose context cannot be told. query_aware, the default, lets the policy see the question before the
final eviction; where the context cannot be told, the last `local_tokens` tokens are the question.

Log-likelihoods: the context is read and compressed once for all its continuations; each is scored
in one forward over the compressed cache. Rolling log-likelihoods read the text in chunks; a token
is scored over its chunk and what was kept of the text before.

Importing this file registers the model.
"""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm
from transformers import StoppingCriteria

from locret.cache.cache import RetainedCache
from locret.engine.arguments import filler
from locret.engine.engine import Engine
from locret.evaluation.ask import Engines, Ranks, sizes_of
from locret.evaluation.config import Protocol, Setup, are_query_aware, expand
from locret.evaluation.questions import source
from locret.evaluation.records import commit, versions
from locret.heads.heads import RetainingHeads
from locret.integrations.lm_eval_tasks import context_end, tokens_after
from locret.model.adapters import Adapter, warn_without
from locret.model.hooks import as_argument
from locret.model.loading import LoadedModel, load_model
from locret.model.weights import Quantization
from locret.policies import LocretPolicy, chosen_policy
from locret.system.files import check_named

LOCAL_TOKENS = 64
"""Tokens at the end of a prompt that count as its question, where nothing tells what it is."""

UNLIMITED = 2**30
"""Tokens of a prompt where the cache is bounded: positions stay within the model's window."""

OF_HARNESS = (
    *("add_bos_token", "backend", "chat_template_args", "enable_thinking", "logits_cache"),
    *("max_batch_size", "prefix_token_id", "softmax_dtype", "think_end_token", "truncation"),
    "trust_remote_code",
)
"""Arguments of the harness's `hf` model that are taken: none is about how a model is loaded."""

NOTHING = ("none", "None", "")
Scored = tuple[float, bool]


class HarnessStops(StoppingCriteria):
    """Ends a batch once every row has one of the strings, as the harness's `hf` model does."""

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self._strings = list(strings)
        self._tokenizer = tokenizer
        self._criteria: Any = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if self._criteria is None:  # the first call comes after the answer's first token
            rows, length = input_ids.shape
            self._criteria = stop_sequences_criteria(
                self._tokenizer, self._strings, length - 1, rows
            )
        return self._criteria(input_ids, scores, **kwargs)


@register_model("locret")
class LocretLM(HFLM):
    """A model of the harness that reads and answers through `locret.Engine`.

    Args:
        pretrained: Hub id, folder, or embedded:smollm2; or a loaded model.
        heads, adapter, weights: as for `python -m locret generate`.
        policy: default locret with heads, else full.
        budget: as the engine's: 512, 0.125, 8x, 2GiB, none.
        protocol, context_field, question_marker, local_tokens: see the file's head.
        chunk_size, stabilizers, positions, quantization: of the engine.
        max_length: of prompts; default the model's window, or no limit where the cache is bounded.
        batch_size: rows of a batch.
        **kwargs: of the harness's `hf` model (`OF_HARNESS`).

    Raises:
        ValueError: unknown arguments, settings that cannot be, heads or adapter that are not there;
            before the model is loaded.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel,
        heads: str | None = None,
        adapter: str | None = None,
        policy: str | None = None,
        budget: int | float | str | None = None,
        protocol: Protocol = "query_aware",
        context_field: str = "context",
        question_marker: str | None = None,
        local_tokens: int = LOCAL_TOKENS,
        chunk_size: int | str | None = "recorded",
        stabilizers: int | str = "auto",
        positions: str = "auto",
        quantization: str | None = None,
        dtype: str = "auto",
        weights: Quantization | None = None,
        device: str | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 1,
        **kwargs: Any,
    ) -> None:
        _check_known(kwargs)
        for name, path in {"pretrained": pretrained, "heads": heads, "adapter": adapter}.items():
            check_named(path, name)
        budget = None if budget in NOTHING else budget
        need = None if budget is None else f"budget is {budget}"
        policy = chosen_policy(policy, heads is not None, need)
        entry = {"policy": policy, "budget": budget, "protocol": protocol}
        self.setup = expand([entry | {"quantization": quantization}])[-1]
        settings = {"chunk_size": chunk_size, "stabilizers": stabilizers, "positions": positions}
        settings = {name: None if v in NOTHING else v for name, v in settings.items()}
        self.setup.check(settings | {"local_tokens": local_tokens})
        own = _checked_heads(self.setup, heads)
        if adapter:
            Adapter.find(adapter)
        self._ranks = Ranks.of_environment()
        if isinstance(pretrained, str):
            for each in own.values():
                warn_without(each, bool(adapter))
            chosen = {"attn_implementation": attn_implementation} if attn_implementation else {}
            pretrained = load_model(
                pretrained,
                dtype=dtype,  # type: ignore[arg-type]
                device=self._ranks.device(device),
                revision=revision,
                adapter=adapter,
                quantization=None if weights in NOTHING else weights,
                **chosen,
            )
        bounded = not self.setup.keeps_all and positions != "original"
        super().__init__(
            pretrained=pretrained.model,
            tokenizer=pretrained.tokenizer,
            batch_size=batch_size,
            max_length=max_length or (UNLIMITED if bounded else None),
            **kwargs,
        )
        self._engines = Engines(pretrained, own, heads, settings)
        self._context_field, self._question_marker = context_field, question_marker
        self._local_tokens = local_tokens
        self._loaded = pretrained
        self._heads_source, self._adapter_source = source(heads), source(adapter)
        self._context_ends: dict[str, int] = {}
        self._rests: list[int] = []
        self._sizes: list[dict[str, Any]] = []
        self._truncated = 0
        self._join_ranks()

    def _join_ranks(self) -> None:
        """Share the requests as accelerate and the harness do."""
        if self._ranks.world > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=self.device.type == "cpu")
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes

    # ---- what is asked ---------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._find_contexts(requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Scored]:
        self._find_contexts(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    @torch.no_grad()
    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        if self.setup.keeps_all:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        found = []
        for request in tqdm(requests, disable=disable_tqdm or self.rank != 0):
            (text,) = request.args
            ids = [self.prefix_token_id, *self.tok_encode(text)]
            engine = self._engines.get(self.setup, self.setup.engine_budget(None))
            score, cache = text_log_likelihood(engine, self._tensor(ids))
            self._note(cache, 1)
            found.append(score)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), score)
        return found

    def _find_contexts(self, requests: Sequence[Instance]) -> None:
        """Where contexts end, of all prompts before any is read: mistakes show at once."""
        self._context_ends = {}
        for request in requests:
            prompt = request.args[0]
            if not prompt:
                continue
            end = context_end(prompt, request.doc, self._context_field, self._question_marker)
            if end is not None:
                self._context_ends[prompt] = end
            elif self.setup.protocol == "query_agnostic" and not self.setup.keeps_all:
                raise ValueError(
                    f"task {request.task_name}: the context cannot be told from the question, "
                    f"because its documents have no {self._context_field!r} whose text stands in "
                    f"the prompt (they have {', '.join(sorted(request.doc))}); give context_field, "
                    "or question_marker: the text with which questions begin; or "
                    "protocol=query_aware"
                )

    def _rest_of(self, prompt: str, text: str | None = None) -> int:
        """Tokens at the end of a prompt that are not compressed, at least 1; of `text`, where no
        more of the prompt is read."""
        if prompt not in self._context_ends:
            return max(1, self._local_tokens)
        text = prompt if text is None else text
        return max(1, tokens_after(self.tokenizer, text, self._context_ends[prompt]))

    # ---- generation ------------------------------------------------------------------------------

    def tok_batch_encode(
        self, strings: list[str], left_truncate_len: int | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        ids, mask = super().tok_batch_encode(strings, left_truncate_len=left_truncate_len, **kwargs)
        self._rests = [self._rest_of(prompt) for prompt in strings]
        if left_truncate_len and left_truncate_len == ids.shape[1]:
            lengths = [len(row) for row in self.tokenizer(strings, verbose=False)["input_ids"]]
            self._truncated += sum(length > left_truncate_len for length in lengths)
        return ids, mask

    @torch.no_grad()
    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any
    ) -> Tensor:
        mask = kwargs.pop("attention_mask", torch.ones_like(context)).bool()
        new = max_length - context.shape[1]
        pad, done = self.tokenizer.pad_token_id, filler(self.model, self.tokenizer)
        answers = torch.full((len(context), new), pad, device=context.device)
        for rows in self._together(mask):
            ids = torch.stack([context[i][mask[i]] for i in rows])
            stops = HarnessStops(stop, self.tokenizer)
            settings = _decoding(kwargs) | {"stopping_criteria": [stops], "pad_token_id": done}
            found = self._answers(ids, self._rests[rows[0]], new, settings)
            answers[rows, : found.shape[1]] = found
        return torch.cat([context, answers], dim=1)

    def _together(self, mask: Tensor) -> list[list[int]]:
        """Rows that one call of the engine answers: alike in length and in what is compressed."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, length in enumerate(mask.sum(1).tolist()):
            groups.setdefault((length, self._rests[i]), []).append(i)
        return list(groups.values())

    def _answers(self, ids: Tensor, rest: int, new: int, settings: dict[str, Any]) -> Tensor:
        """What follows prompts [B, n] of which all but `rest` tokens are compressed."""
        engine = self._engines.get(self.setup, self.setup.engine_budget(None))
        rest = min(rest, ids.shape[1])
        cache = self._compressed(engine, ids, rest) if rest < ids.shape[1] else None
        given: dict[str, Any] = {} if cache is None else {"cache": cache}
        asked = ids if cache is None else ids[:, -rest:]
        # Every token counts, the padding token too: rows are asked without their padding.
        mask = torch.ones_like(asked)
        output = engine.generate(asked, mask, max_new_tokens=new, **given, **settings)
        return output[:, asked.shape[1] :]

    def _compressed(self, engine: Engine, ids: Tensor, rest: int) -> RetainedCache:
        aware = self.setup.protocol == "query_aware" and not self.setup.keeps_all
        query = {"query_ids": ids[:, -rest:]} if aware else {}
        context = ids[:, :-rest]
        cache = engine.prefill(context, torch.ones_like(context), **query)
        self._note(cache, len(ids))
        return cache

    # ---- log-likelihoods -------------------------------------------------------------------------

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Scored]:
        by_context: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, _) in enumerate(requests):
            by_context.setdefault(tuple(context), []).append(i)
        scores: list[Scored] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0)
        for same in by_context.values():
            for i, score in zip(same, self._continued([requests[i] for i in same]), strict=True):
                scores[i] = score
                if requests[i][0] is not None:  # a rolling window has no text of its own
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
            bar.update(len(same))
        bar.close()
        return scores

    def _continued(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[Scored]:
        """Scores of continuations of one context."""
        longest = max(len(continuation) for _, _, continuation in requests)
        context = requests[0][1][-max(1, self.max_length + 1 - longest) :]
        self._truncated += len(requests) * (len(context) < len(requests[0][1]))
        key = requests[0][0]
        # The harness reads white space at a prompt's end with the continuations.
        rest = min(self._rest_of(key[0], key[0].rstrip()) if key else 1, len(context))
        if rest == len(context):
            return [self._scored(context, continuation, None) for _, _, continuation in requests]
        engine = self._engines.get(self.setup, self.setup.engine_budget(None))
        with engine:
            cache = self._compressed(engine, self._tensor(context), rest)
            untouched, scores = cache.snapshot(), []
            for _, _, continuation in requests:
                cache.restore(untouched)
                scores.append(self._scored(context[-rest:], continuation, cache))
            return scores

    def _scored(
        self, before: list[int], continuation: list[int], cache: RetainedCache | None
    ) -> Scored:
        """Log-likelihood of a continuation of `before`, and whether greedy decoding gives it."""
        ids = self._tensor([*before, *continuation][:-1])
        given = {} if cache is None else as_argument(self.model, cache)
        logits = self.model(ids, use_cache=cache is not None, **given).logits
        logs = log_softmax(logits[0, -len(continuation) :], dim=-1, dtype=self.softmax_dtype)
        wanted = torch.tensor(continuation, device=logs.device)
        found = logs.gather(1, wanted[:, None]).sum()
        return float(found), bool((logs.argmax(-1) == wanted).all())

    def _tensor(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.device)

    # ---- what is told ----------------------------------------------------------------------------

    def _note(self, cache: RetainedCache, rows: int) -> None:
        self._sizes += [sizes_of(cache, row, rows) for row in range(rows)]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the scores."""
        return {
            "model_num_parameters": self._loaded.model.num_parameters(),
            "model_dtype": self._loaded.model.dtype,
            "model_revision": self._loaded.revision or "",
            "model_sha": "",
            "locret": {
                **self.setup.to_dict(),
                "heads": self._heads_source,
                "adapter": self._adapter_source,
                "weights": self._loaded.quantization,
                "attention": self._loaded.model.config._attn_implementation,
                "engines": self._engines.used,
                "prompts_cut": self._truncated,
                "held": _summary(self._sizes),
                "versions": versions(),
                "commit": commit(),
            },
        }


def _check_known(given: Iterable[str]) -> None:
    unknown = [name for name in given if name not in OF_HARNESS]
    if unknown:
        own = [name for name in inspect.signature(LocretLM).parameters if name != "kwargs"]
        known = ", ".join([*own, *OF_HARNESS])
        raise ValueError(f"{', '.join(unknown)}: unknown arguments; expected some of {known}")


def _checked_heads(setup: Setup, name: str | None) -> dict[str, RetainingHeads]:
    """The heads by their name."""
    if name is None:
        if setup.policy == LocretPolicy.name:
            raise ValueError("policy locret needs trained heads: give heads=FOLDER")
        return {}
    heads = RetainingHeads.from_pretrained(name)
    if setup.protocol == "query_agnostic" and are_query_aware(setup, heads):
        raise ValueError(f"heads {name} are query-aware; use protocol=query_aware")
    return {name: heads}


def _decoding(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The harness's decoding arguments in transformers' terms: temperature 0 is greedy."""
    greedy = not kwargs.get("do_sample") and not kwargs.get("temperature")
    left_out = {"temperature"} if greedy else set()
    return {name: v for name, v in kwargs.items() if name not in left_out} | {
        "do_sample": bool(kwargs.get("do_sample", not greedy))
    }


def _summary(prompts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Units and bytes of a prompt after its compression."""
    if not prompts:
        return None
    units, sizes = [one["units"] for one in prompts], [one["bytes"] for one in prompts]
    return {
        "prompts": len(prompts),
        "units_mean": round(sum(mean for mean, _ in units) / len(units), 1),
        "units_max": max(most for _, most in units),
        "bytes_mean": round(sum(sizes) / len(sizes)),
        "bytes_max": max(sizes),
    }


@torch.no_grad()
def text_log_likelihood(engine: Engine, ids: Tensor) -> tuple[float, RetainedCache]:
    """Sum of the log-probabilities of all tokens but the first.

    Every token is predicted from its chunk and what was kept of the chunks before, so that the
    memory is bounded however long the text is.

    Args:
        engine: with a budget; says how the text is read.
        ids: [1, n] long.

    Returns:
        The sum, and the cache after the last token but one.
    """
    model: Any = engine.model
    length = ids.shape[1]
    cache, counts = engine.new_cache(length)
    assert counts is not None, "without a budget the text is scored as it stands"
    cache.prompt_lengths = (length,)
    total, size = 0.0, engine.config.reading.chunk or length
    with engine, engine.reading_into(cache, counts):
        for start in range(0, length - 1, size):
            chunk = ids[:, start : min(start + size, length - 1)]
            following = ids[0, start + 1 : start + 1 + chunk.shape[1]]
            logits = model(input_ids=chunk, use_cache=True, **as_argument(model, cache)).logits[0]
            logs = log_softmax(logits.float(), dim=-1)
            total += float(logs.gather(1, following[:, None]).sum())
    return total, cache
