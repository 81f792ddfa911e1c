"""What users give `prefill` and `generate`: what is refused, and how stock `generate` takes it."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from locret.cache.cache import DECODE_ROOM, RetainedCache
from locret.cache.files import check_model, describe
from locret.engine.config import EngineConfig
from locret.model.backbone import Backbone

BRANCHING = ("num_beams", "num_return_sequences")
"""Arguments that let stock `generate` run several sequences for one prompt."""

REFUSED = (
    "assistant_model",
    "adapter_names",
    "guidance_scale",
    "inputs_embeds",
    "output_attentions",
    "position_ids",
    "prompt_lookup_num_tokens",
)
"""Arguments of stock `generate` that need a cache of their own, roll ours back, or ask for what is
not there: weights of all tokens, or positions other than the cache's."""

SURELY_REPEATED = 4
"""Tokens of a context from which on a question that begins with all of them repeats it. Shorter
ones may be no more than the first token and a role's header, with which any question begins."""


def check_ids(input_ids: Tensor, goes_on: bool = False) -> None:
    """Refuse (ValueError) what is no tensor of whole numbers, not [batch, tokens], or nothing; but
    not [batch, 0] where an answer `goes_on`."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(
            f"input_ids is a {type(input_ids).__name__}; expected a tensor [batch, tokens]: take "
            "tokenizer(..., return_tensors='pt').input_ids"
        )
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids holds {input_ids.dtype}; expected token ids, of torch.long")
    if input_ids.dim() != 2 or 0 in input_ids.shape[: 1 if goes_on else 2]:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; expected [batch, tokens] with at least "
            "one token"
        )


def left_padding(
    attention_mask: Tensor | None, input_ids: Tensor, context_length: int = 0
) -> list[int]:
    """How many leading tokens of each row are padding.

    Args:
        attention_mask: of `input_ids` [B, n], or of as many tokens of a context before them too.

    Raises:
        ValueError: no tensor, a mask of another shape, zeros elsewhere than on the left, or a row
            of nothing.
    """
    rows, new = input_ids.shape
    if attention_mask is None:
        return [0] * rows
    if not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"attention_mask is a {type(attention_mask).__name__}; expected a tensor of the shape "
            f"of input_ids, {tuple(input_ids.shape)}"
        )
    if attention_mask.shape not in ((rows, new), (rows, context_length + new)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected that of input_ids, "
            f"{tuple(input_ids.shape)}"
        )
    if not new:
        return [0] * rows
    mask = attention_mask[:, -new:].bool()
    if not _only_on_the_left(mask):
        raise ValueError(
            "attention_mask holds zeros after ones, or nothing else in a row: pad prompts on the "
            "left (tokenizer.padding_side = 'left')"
        )
    return (~mask).sum(dim=1).tolist()


def inferred_mask(model: Any, kwargs: dict[str, Any], input_ids: Tensor) -> Tensor | None:
    """The mask [B, n] that stock `generate` infers for `input_ids` where none is given: zeros where
    `pad_token_id` is, unless that may also end an answer. None = no padding. ValueError: it is not
    padding on the left."""
    pads, ends = (_token_ids(setting(model, kwargs, f"{name}_token_id")) for name in ("pad", "eos"))
    if not pads or set(pads) & set(ends):
        return None
    mask = ~torch.isin(input_ids, torch.tensor(pads, device=input_ids.device))
    if bool(mask.all()):
        return None
    if not _only_on_the_left(mask):
        raise ValueError(
            f"input_ids holds pad_token_id ({pads[0]}) after other tokens, or nothing else in a "
            "row, and no attention_mask is given, so that stock generate would take it for "
            "padding; pass attention_mask, ones if it counts, or pad prompts on the left"
        )
    return mask


def _only_on_the_left(mask: Tensor) -> bool:
    """Whether zeros of a mask, bool [B, n], come before all ones, and no row is all zeros."""
    return bool((mask[:, 1:] | ~mask[:, :-1]).all()) and bool(mask[:, -1].all())


def _token_ids(value: Any) -> list[int]:
    """Token ids given as a number, several, a tensor or None."""
    return [] if value is None else torch.as_tensor(value).flatten().tolist()


def check_not_repeated(cache: RetainedCache, input_ids: Tensor, padding: Sequence[int]) -> None:
    """Refuse a question that begins with all that its cache has read.

    Args:
        input_ids: [B, n] long, rows with so much `padding` on the left.

    Raises:
        ValueError: says how many tokens would be read twice.
    """
    assert cache.token_ids is not None
    skips = cache.padding or (0,) * len(padding)
    # A question in front of the context is no part of what the user has given as context.
    contexts = [
        ids[skip + cache.query_length :] for ids, skip in zip(cache.token_ids, skips, strict=True)
    ]
    if input_ids.shape[1] < min(map(len, contexts)):
        return  # the usual case: nothing is fetched from the device
    questions = [ids[skip:] for ids, skip in zip(input_ids.cpu(), padding, strict=True)]
    repeated = max(map(_repeated, contexts, questions))
    what = f"input_ids begins with all {repeated} tokens that the cache has read"
    if repeated >= SURELY_REPEATED:
        raise ValueError(f"{what}, so that they would be read twice; give only what follows them")
    if repeated:
        # The caller of `Engine.generate` and of what wraps it.
        warnings.warn(f"{what}; they are read again. Give only what follows them", stacklevel=5)


def _repeated(context: Tensor, question: Tensor) -> int:
    """Tokens of a context, if a question begins with all of them; else 0."""
    count = len(context)
    return count if count <= len(question) and torch.equal(question[:count], context) else 0


def checked_query(
    config: EngineConfig, backbone: Backbone, query_ids: Tensor | None, input_ids: Tensor
) -> Tensor | None:
    """The query to read in front of a context, or behind it, if any."""
    tokens, aware = config.recorded.query_tokens, config.reading.query_aware
    evicts = config.reading.budget is not None
    if query_ids is None:
        if aware and evicts:
            raise ValueError(
                "the engine is query_aware, so that a context is compressed for a question: "
                "pass query_ids, or leave query_aware out"
            )
        if tokens and evicts:
            raise ValueError(
                f"these heads are query-aware (they learned with {tokens} tokens of the "
                "question in front): pass query_ids, or use heads with query_tokens 0"
            )
        return None
    check_ids(query_ids)
    if not tokens and not aware:
        raise ValueError(
            "query_ids given, but the policy's heads are not query-aware, nor was the engine "
            "made with query_aware=True"
        )
    if query_ids.shape[0] != input_ids.shape[0]:
        raise ValueError(
            f"query_ids has {query_ids.shape[0]} rows and input_ids {input_ids.shape[0]}; they "
            "must match"
        )
    if not evicts or not backbone.retained:
        return None
    # All of it behind the context, as much as the heads learned with in front.
    return query_ids[:, -tokens:].to(input_ids.device)


def context_ids(cache: RetainedCache, backbone: Backbone, input_ids: Tensor) -> Tensor:
    """Tokens that the cache has seen or was answered, for stock generate's bookkeeping."""
    ids = _known_ids(cache, len(backbone.layers))
    if ids.shape[0] != input_ids.shape[0]:
        raise ValueError(
            f"the cache has {ids.shape[0]} rows and input_ids {input_ids.shape[0]}; they must match"
        )
    _check_belong([cache], backbone)
    if not input_ids.shape[1] + cache.unread_ids.shape[1]:
        raise ValueError(
            "input_ids holds no token, and the cache has no answer to go on with: ask a question "
            "of at least one token"
        )
    return torch.cat([ids, cache.unread_ids], dim=1).to(input_ids.device)


def check_together(caches: Sequence[RetainedCache], backbone: Backbone, evicts: bool) -> None:
    """Refuse caches that cannot be rows of one batch, which `evicts` while it answers or does not.
    ValueError: says in what they differ, or how many rows they have."""
    rows = [len(_known_ids(cache, len(backbone.layers))) for cache in caches]
    if not rows or {*rows} != {1}:
        raise ValueError(
            f"together takes one or more caches of one row each; got {len(rows)}, with {rows} "
            "rows: take them apart with cache.rows"
        )
    _check_belong(caches, backbone)
    settings = [cache.settings for cache in caches]
    if evicts:
        for each, cache in zip(settings, caches, strict=True):
            each["tokens of the question in front"] = cache.query_length
            each["whether a budget holds"] = cache.budget is not None
    for name, value in settings[0].items():
        if any(each[name] != value for each in settings):
            found = ", ".join(dict.fromkeys(repr(each[name]) for each in settings))
            raise ValueError(
                f"the caches differ in {name}: {found}; ask them apart, or read their contexts "
                "with one engine"
            )


def _known_ids(cache: RetainedCache, layers: int) -> Tensor:
    """Tokens [B, n] that a cache of so many layers has seen."""
    had = len(getattr(cache, "layers", ()))
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
    return ids


def _check_belong(caches: Sequence[RetainedCache], backbone: Backbone) -> None:
    model = describe(backbone.model)
    for cache in caches:
        check_model("the cache", cache.model, model)
        if cache.longrope != backbone.longrope:
            raise ValueError(
                f"the cache was read with longrope={cache.longrope!r} and this engine has "
                f"{backbone.longrope!r}; use one with the same"
            )


def left_mask(ids: Tensor, padding: Sequence[int]) -> Tensor:
    """[B, n] long: zeros for so many leading tokens of each row of `ids`, ones for the others."""
    token = torch.arange(ids.shape[1], device=ids.device)
    return (token >= torch.tensor(padding, device=ids.device)[:, None]).long()


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of rows as `input_ids` [B, n], padded on the left, and their attention mask."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + [*row] for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def unpadded(input_ids: Tensor, padding: list[int]) -> list[Tensor]:
    """Each row [1, n] without its padding."""
    return [input_ids[row : row + 1, skip:] for row, skip in enumerate(padding)]


def check_decoding(model: Any, kwargs: dict[str, Any], with_cache: bool) -> None:
    """Refuse ways to generate that a compressed cache cannot follow. ValueError: says which
    argument, and what to do instead."""
    wanted = {name: setting(model, kwargs, name) for name in REFUSED}
    wanted["cache_implementation"] = given(kwargs, "cache_implementation")
    for name, value in wanted.items():
        harmless = value is False or (name == "guidance_scale" and value == 1)
        if value is not None and not harmless:
            raise ValueError(f"{name} does not work with a compressed cache; leave it out")
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache=False leaves nothing to compress; leave it out")
    if "past_key_values" in kwargs:
        raise ValueError("pass the cache as cache=..., not past_key_values=...")
    if with_cache and (setting(model, kwargs, "num_beams") or 1) > 1:
        raise ValueError("beam search would mix up the cache given; pass the whole prompt instead")


def setting(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """What stock `generate` goes by: its argument, else that of the configuration passed to it,
    else the model's own."""
    value = given(kwargs, name)
    if value is not None or name in kwargs:  # an argument of None overrides what is configured
        return value
    return getattr(model.generation_config, name, None)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the model's, else the tokenizer's."""
    found = _token_ids(model.generation_config.eos_token_id)
    return found or _token_ids(tokenizer.eos_token_id)


def filler(model: Any, tokenizer: Any) -> int:
    """What rows of a batch that are done are filled up with: the tokenizer's padding, or else its
    end, which decoding leaves out too; 0 where the embedding has neither."""
    known = len(model.get_input_embeddings().weight)
    wanted = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in wanted if token is not None and token < known)


def prompt_lengths(model: Any, kwargs: dict[str, Any]) -> dict[str, int]:
    """What counts the prompt's tokens too, of what stock `generate` goes by."""
    names = ["min_length"]
    if setting(model, kwargs, "max_new_tokens") is None:  # else max_length gives way to it
        names.append("max_length")
    counts = {name: setting(model, kwargs, name) for name in names}
    return {name: count for name, count in counts.items() if count}


def given(kwargs: dict[str, Any], name: str) -> Any:
    """What the call itself says: its argument, else that of the configuration passed to it."""
    if name in kwargs:
        return kwargs[name]
    return getattr(kwargs.get("generation_config"), name, None)


def stock_settings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that keep configurations from asking for no cache, or another, or for what is left
    of a prompt in chunks: some versions would read it from its beginning then."""
    kept: dict[str, Any] = {}
    if not setting(model, kwargs, "use_cache"):
        kept["use_cache"] = True
    for name in ("cache_implementation", "prefill_chunk_size"):
        if setting(model, kwargs, name) is not None:
            kept[name] = None
    return kept


class ShowingPrompt:
    """A streamer that is first given the prompt, as it was given to us: the last `tokens` ones of
    what stock `generate` begins with, which may be a whole context and more."""

    def __init__(self, streamer: Any, tokens: int) -> None:
        self._streamer = streamer
        self._tokens: int | None = tokens

    def put(self, value: Tensor) -> None:
        if self._tokens is not None:
            value, self._tokens = value[..., value.shape[-1] - self._tokens :], None
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()


def longest(model: Any, kwargs: dict[str, Any], sequence: Tensor) -> int:
    """Tokens of the longest sequence that stock `generate` may make after one [B, n]."""
    new = setting(model, kwargs, "max_new_tokens")
    if new is not None:
        return int(sequence.shape[1] + new)
    return int(setting(model, kwargs, "max_length") or sequence.shape[1] + DECODE_ROOM)


def after_questions(questions: Tensor, output: Any) -> Any:
    """What stock `generate` returned for answers alone, with the questions [B, q] before them."""
    plain = isinstance(output, Tensor)
    answers = output if plain else output.sequences
    asked = questions.repeat_interleave(len(answers) // len(questions), dim=0)
    answers = torch.cat([asked, answers], dim=1)
    if plain:
        return answers
    output.sequences = answers
    return output
