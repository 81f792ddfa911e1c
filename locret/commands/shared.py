"""What several commands have in common: their model, their input and output, and what can be done
next.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from locret.commands.progress import Progress
from locret.heads.heads import RetainingHeads
from locret.heads.quotas import Quotas, quotas_of
from locret.model.adapters import warn_without
from locret.model.backends import Backend
from locret.model.loading import LoadedModel, load_model
from locret.model.weights import PACKAGES
from locret.policies import POLICIES, chosen_policy, policy_in_words
from locret.quantities import BUDGET_TEXTS, parse_budget
from locret.quantization import SCHEMES, Scheme, scheme_of
from locret.system.files import EMPTY

DTYPES = ("float32", "bfloat16", "float16")
BYTES_PER_MIB = 2**20
MODEL = "Hub id, folder, .gguf file, or embedded:smollm2"


def named(text: str) -> str:
    """The type of an argument that names a file, a folder or a repository: any text but an empty
    one, which as a path would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError(f"this is {EMPTY}")
    return text


def path_of(text: str) -> Path:
    """`named`, as a path."""
    return Path(named(text))


def add_model(command: argparse.ArgumentParser, first: bool = False) -> None:
    """Arguments that name a model, and the heads and adapter for it. If `first`, the model is the
    first argument, without --model in front of it."""
    if first:
        command.add_argument("model", metavar="MODEL", type=named, help=MODEL)
    else:
        command.add_argument("--model", required=True, type=named, help=MODEL)
    command.add_argument("--heads", type=named, help="artifact folder, .bin file, or Hub id")
    command.add_argument("--adapter", type=named, help="PEFT adapter of the model: folder, Hub id")
    command.add_argument("--dtype", default="auto", choices=("auto", *DTYPES))
    command.add_argument(
        "--weights",
        choices=sorted(PACKAGES),
        help="store the model's weights in fewer bits, fp8 with products in FP8; default: as saved",
    )
    command.add_argument("--device", default=None)


Flag = tuple[str, Callable[[str], Any], Any, str, str]
"""Name, type, default, metavar and help of an argument."""


def add_flags(command: argparse.ArgumentParser, flags: Iterable[Flag]) -> None:
    """Arguments whose help tells their default, if they have one."""
    for name, kind, default, metavar, text in flags:
        shown = text if default is None else f"{text} (default: {default})"
        command.add_argument(name, type=kind, default=default, metavar=metavar, help=shown)


def add_engine(command: argparse.ArgumentParser) -> None:
    """Arguments that are settings of the engine (`checked_engine`)."""
    command.add_argument("--policy", default=None, choices=sorted(POLICIES))
    command.add_argument(
        "--budget",
        type=argument(parse_budget),
        default="auto",
        metavar="N",
        help=f"what a KV head keeps: {BUDGET_TEXTS}",
    )
    command.add_argument(
        "--quotas",
        type=argument(_quotas),
        default="auto",
        metavar="FILE",
        help="which KV heads keep more than others, as `calibrate` writes it; none = all alike; "
        "auto, the default: what the heads record",
    )
    command.add_argument(
        "--chunk-size",
        type=chunk_size,
        default="recorded",
        metavar="N",
        help="tokens read at a time; auto: what is fastest; recorded, the default: what the "
        "heads record, else auto",
    )
    for name, kind, text in (
        ("--stabilizers", whole(0, auto="auto"), "last units that survive evictions"),
        ("--local-tokens", whole(1, auto="auto"), "last tokens, read after the evictions"),
    ):
        command.add_argument(name, type=kind, default="auto", metavar="N", help=text)
    command.add_argument("--quantization", choices=sorted(SCHEMES), help="of keys and values")
    command.add_argument("--bits", type=whole(1), help="of the quantization")
    command.add_argument(
        "--decode-interval", type=whole(1, none=None), metavar="N", help="evict in answers too"
    )
    command.add_argument("--merging", choices=("similar", "adjacent"), help="of evicted values")
    command.add_argument("--positions", default="auto", choices=("auto", "compact", "original"))
    command.add_argument("--backend", default="auto", choices=("auto", *get_args(Backend)))


def _quotas(text: str) -> Quotas | str | None:
    """The quotas that a user means; "auto" = those that the heads record."""
    words = {"none": None, "auto": "auto"}
    return words[text.lower()] if text.lower() in words else quotas_of(text)


def _quantization(given: argparse.Namespace) -> Scheme | None:
    if given.quantization is None:
        if given.bits is not None:
            raise ValueError("--bits are of a --quantization; name one, such as kivi")
        return None
    options = {} if given.bits is None else {"bits": given.bits}
    return scheme_of({"name": given.quantization} | options)


def load_heads(given: argparse.Namespace) -> RetainingHeads | None:
    """The heads named, if any."""
    if not given.heads:
        return None
    heads = RetainingHeads.from_pretrained(given.heads)
    warn_without(heads, bool(given.adapter))
    return heads


Checked = tuple[str, dict[str, Any], RetainingHeads | None]
"""Policy, settings and heads of an engine."""


def checked_engine(given: argparse.Namespace, **more: Any) -> Checked:
    """What an engine is made of, checked before a model is loaded for it. `more` are settings that
    are no arguments of every command. ValueError: settings that cannot work, or a budget without
    anything to keep it."""
    from locret.engine.config import EngineConfig

    names = ["budget", "quotas", "chunk_size", "stabilizers", "local_tokens"]
    names += ["decode_interval", "merging", "positions", "backend"]
    settings = {name: getattr(given, name) for name in names} | more
    settings["quantization"], heads = _quantization(given), load_heads(given)
    need = None if given.budget in (None, "auto") else "--budget is given"
    policy = chosen_policy(given.policy, heads is not None, need)
    EngineConfig.of(policy, heads.config if heads else None, **settings)
    return policy, settings, heads


def make_engine(given: argparse.Namespace, checked: Checked, chat: bool = True) -> tuple[Any, Any]:
    """The engine of the model named, and its tokenizer."""
    from locret.engine.engine import Engine

    policy, settings, heads = checked
    loaded = load(given)
    in_words = policy_in_words(policy, loaded.tokenizer, chat)
    return Engine(loaded.model, in_words, heads=heads, **settings), loaded.tokenizer


def load(given: argparse.Namespace) -> LoadedModel:
    """The model named, with its adapter."""
    with Progress(f"loading {given.model}"):
        return load_model(
            given.model,
            dtype=given.dtype,
            device=given.device,
            adapter=given.adapter,
            quantization=given.weights,
        )


def read_text(source: str) -> str:
    """The text of a file; of standard input for `-`."""
    if source != "-":
        name, content = source, Path(source).read_bytes()
    elif sys.stdin is None:  # a process that was started without one
        raise ValueError("there is no standard input to read; name a file instead of -")
    else:
        name, content = "standard input", sys.stdin.buffer.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def replace_unprintable() -> None:
    """Let standard output show `?` for what the terminal's encoding lacks, not end the command."""
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` as the type of an argument: a ValueError of it ends the command with its reason."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def whole(least: int, **words: Any) -> Callable[[str], Any]:
    """The type of an argument: a whole number of at least `least`, or a word that stands for a
    value."""
    forms = ", ".join([f"a whole number of at least {least}", *list(words)[:-1]])
    forms += "".join(f" or {word}" for word in list(words)[-1:])

    def parse(text: str) -> Any:
        if text.lower() in words:
            return words[text.lower()]
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise ValueError(f"{text!r} is not {forms}")
        return value

    return argument(parse)


chunk_size = whole(1, none=None, auto="auto", recorded="recorded")
"""The type of `--chunk-size`, wherever there is one."""


class Listed(argparse.Action):
    """An argument of several values, with spaces or commas between them; given twice, it goes on.

    Args:
        each: makes a value of its text; a ValueError or ArgumentTypeError of it ends the command
            with usage and reason.
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
        except (ValueError, argparse.ArgumentTypeError) as error:
            parser.error(f"argument {option_string}: {error}")
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, made if before is self.default else [*before, *made])


def size_of(size: int) -> str:
    """A number of bytes in words."""
    if size < BYTES_PER_MIB:
        return f"{size:,} B"
    return f"{size / BYTES_PER_MIB:,.1f} MiB"


# ---- what next ---------------------------------------------------------------------------------


def say_next(commands: Sequence[Sequence[str]]) -> None:
    """Print commands that go on from here, each given as the words behind `python -m locret`."""
    for place, words in enumerate(commands):
        print(f"{'' if place else 'next':<9}python -m locret {shlex.join(words)}")
