"""Needles that no policy can lose: those in the last tokens of the prompt, which are never evicted.

A policy that is asked for one of them finds it for free. So the rows of needle runs and grids say
where their needles lie (`needle_is_local`), and tables mark the figures that hold such samples.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from locret.tasks.synthetic import SyntheticSample

FIELD = "needle_is_local"
MARK = "*"
"""Stands behind a figure of samples some of which have local needles."""


def is_local(
    sample: SyntheticSample, prompt: str, tokenizer: PreTrainedTokenizerBase, local_tokens: int
) -> bool:
    """Whether a needle lies in the prompt's last tokens, wholly or partly.

    Args:
        prompt: the sample's whole prompt, chat template included.
        local_tokens: how many last tokens are never evicted.

    Returns:
        Whether a token of a string that is asked for is one of them; of a string that stands in
        the text several times, the last one counts.
    """
    question = prompt.rfind(sample.question)
    end = question if question >= 0 else len(prompt)
    found = [(prompt.rfind(wanted, 0, end), wanted) for wanted in sample.expected]
    last = max((at + len(wanted) - 1 for at, wanted in found if at >= 0), default=None)
    if last is None:
        return False
    place, tokens = _token_at(prompt, last, tokenizer)
    return place >= tokens - local_tokens


def marked(text: str, cells: Iterable[Mapping[str, Any]]) -> str:
    """A figure, with a mark if some of its samples have local needles."""
    return text + (MARK if any(cell.get(FIELD) for cell in cells) else "")


def notes(cells: Iterable[Mapping[str, Any]], local_tokens: int) -> list[str]:
    """What is to be said below a table of samples: what its marks mean, or that nothing is known.

    Args:
        cells: rows of samples; the same sample under several policies counts once.
    """
    samples: dict[tuple[Any, ...], Any] = {}
    for cell in cells:
        key = (cell.get("length"), cell["task"], cell["seed"])
        samples[key] = cell[FIELD] if FIELD in cell else samples.get(key)
    said = [_what_marks_mean(samples, local_tokens)] if any(samples.values()) else []
    unknown = sum(value is None for value in samples.values())
    if unknown:
        said.append(
            f"Of {unknown} of {len(samples)} samples it is not recorded whether the needle lies in "
            f"the last {local_tokens} tokens of the prompt, where every policy finds it."
        )
    return said


def _what_marks_mean(samples: Mapping[tuple[Any, ...], Any], local_tokens: int) -> str:
    local = [key for key, value in samples.items() if value]
    lengths = sorted({key[0] for key in local if key[0] is not None})
    where = f" (prompts of {', '.join(f'{n:,}' for n in lengths)} tokens)" if lengths else ""
    have = "has its needle" if len(local) == 1 else "have their needles"
    return (
        f"{MARK} {len(local)} of {len(samples)} samples{where} {have}, or a part of what is asked "
        f"for, in the last {local_tokens} tokens of the prompt. No policy evicts these, so that "
        "such a find says nothing about the policy."
    )


def _token_at(text: str, character: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The number of the token that holds a character, and how many tokens there are."""
    encoding = tokenizer(text, add_special_tokens=False, verbose=False)
    place = encoding.char_to_token(character) if tokenizer.is_fast else None
    if place is None:  # a tokenizer in Python does not say where its tokens come from
        before = tokenizer(text[: character + 1], add_special_tokens=False, verbose=False)
        place = len(before["input_ids"]) - 1
    return place, len(encoding["input_ids"])
