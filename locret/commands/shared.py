"""What several commands have in common: the model they are for, and how far they are."""

import argparse
from collections.abc import Callable
from typing import Any

from locret.heads import RetainingHeads
from locret.models import LoadedModel, load_model

DTYPES = ("float32", "bfloat16", "float16")
BYTES_PER_MIB = 2**20


def add_model(command: argparse.ArgumentParser) -> None:
    """Arguments that name a model, and the heads and adapter for it."""
    command.add_argument("--model", required=True, help="Hub id, folder, or embedded:smollm2")
    command.add_argument("--heads", help="artifact folder, .bin file, or Hub id")
    command.add_argument("--adapter", help="PEFT adapter of the model: folder or Hub id")
    command.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    command.add_argument("--device", default=None)


def load_heads(given: argparse.Namespace) -> RetainingHeads | None:
    """The heads named, if any."""
    return RetainingHeads.from_pretrained(given.heads) if given.heads else None


def load(given: argparse.Namespace) -> LoadedModel:
    """The model named, with its adapter."""
    return load_model(given.model, dtype=given.dtype, device=given.device, adapter=given.adapter)


class Listed(argparse.Action):
    """An argument of several values, with spaces or commas between them; given twice, it goes on.

    Args:
        each: makes a value of its text; a ValueError of it ends the command with usage and reason.
    """

    def __init__(self, *, each: Callable[[str], Any] = str, **kwargs: Any) -> None:
        super().__init__(nargs="+", **kwargs)
        self.each = each

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        texts = [text for value in values for text in value.split(",") if text]
        if not texts:
            parser.error(f"argument {option_string}: there are no {self.dest}")
        try:
            made = [self.each(text) for text in texts]
        except ValueError as error:
            parser.error(f"argument {option_string}: {error}")
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, made if before is self.default else [*before, *made])


def whole_number(text: str) -> int:
    """
    Raises:
        ValueError: it is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is no whole number") from None


def size_of(size: int) -> str:
    """A number of bytes in words."""
    if size < BYTES_PER_MIB:
        return f"{size:,} B"
    return f"{size / BYTES_PER_MIB:,.1f} MiB"


class Bar:
    """A progress bar on stderr; silent where stderr is no terminal."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.label, disable=None, leave=False)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()
            self.bar = None
