"""What users give `prefill` and `generate`: what is refused, and how stock `generate` takes it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from locret.cache import DECODE_ROOM

BRANCHING = ("num_beams", "num_return_sequences")
"""Arguments that let stock `generate` run several sequences for one prompt."""

REFUSED = (
    "assistant_model",
    "adapter_names",
    "guidance_scale",
    "inputs_embeds",
    "prompt_lookup_num_tokens",
)
"""Arguments of stock `generate` that need a cache of their own or roll ours back."""


def check_ids(input_ids: Tensor) -> None:
    """
    Raises:
        ValueError: no tensor of whole numbers, not [batch, tokens], or nothing at all.
    """
    if not isinstance(input_ids, Tensor):
        raise ValueError(
            f"input_ids is a {type(input_ids).__name__}; expected a tensor [batch, tokens]: take "
            "tokenizer(..., return_tensors='pt').input_ids"
        )
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids holds {input_ids.dtype}; expected token ids, of torch.long")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
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
        ValueError: a mask of another shape, zeros elsewhere than on the left, or a row of nothing.
    """
    rows, new = input_ids.shape
    if attention_mask is None:
        return [0] * rows
    if attention_mask.shape not in ((rows, new), (rows, context_length + new)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected that of input_ids, "
            f"{tuple(input_ids.shape)}"
        )
    mask = attention_mask[:, -new:].bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()) or not bool(mask[:, -1].all()):
        raise ValueError(
            "attention_mask holds zeros after ones: pad prompts on the left "
            "(tokenizer.padding_side = 'left')"
        )
    return (~mask).sum(dim=1).tolist()


def left_mask(ids: Tensor, padding: Sequence[int]) -> Tensor:
    """[B, n] long: zeros for so many leading tokens of each row of `ids`, ones for the others."""
    columns = torch.arange(ids.shape[1], device=ids.device)
    return (columns >= torch.tensor(padding, device=ids.device)[:, None]).long()


def unpadded(input_ids: Tensor, padding: list[int]) -> list[Tensor]:
    """Each row [1, n] without its padding."""
    return [input_ids[row : row + 1, skip:] for row, skip in enumerate(padding)]


def check_decoding(model: Any, kwargs: dict[str, Any], with_cache: bool) -> None:
    """Refuse ways to generate that a compressed cache cannot follow.

    Raises:
        ValueError: says which argument, and what to do instead.
    """
    wanted = {name: setting(model, kwargs, name) for name in REFUSED}
    wanted["cache_implementation"] = given(kwargs, "cache_implementation")
    for name, value in wanted.items():
        harmless = name == "guidance_scale" and value == 1
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
    return value if value is not None else getattr(model.generation_config, name, None)


def prompt_lengths(model: Any, kwargs: dict[str, Any]) -> dict[str, int]:
    """What counts the prompt's tokens too, of what stock `generate` goes by."""
    # A model's own max_length gives way to max_new_tokens, which the engine always has then.
    counts = {
        "max_length": given(kwargs, "max_length"),
        "min_length": setting(model, kwargs, "min_length"),
    }
    return {name: count for name, count in counts.items() if count}


def given(kwargs: dict[str, Any], name: str) -> Any:
    """What the call itself says: its argument, else that of the configuration passed to it."""
    value = kwargs.get(name)
    return value if value is not None else getattr(kwargs.get("generation_config"), name, None)


def stock_settings(model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that keep the model's own configuration from asking for no cache, or another."""
    kept: dict[str, Any] = {}
    if setting(model, kwargs, "use_cache") is False:
        kept["use_cache"] = True
    if setting(model, kwargs, "cache_implementation") is not None:
        kept["cache_implementation"] = None
    return kept


class ShowingPrompt:
    """A streamer that is first given the prompt, as it was given to us: the last `tokens` ones of
    what stock `generate` begins with, which may be a whole context and more."""

    def __init__(self, streamer: Any, tokens: int) -> None:
        self._streamer = streamer
        self._tokens: int | None = tokens

    def put(self, value: Tensor) -> None:
        if self._tokens is not None:
            value, self._tokens = value[..., -self._tokens :], None
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
