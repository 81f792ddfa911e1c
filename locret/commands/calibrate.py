"""`python -m locret calibrate`: measure which KV heads need to keep more than others.

    python -m locret calibrate --model M --heads runs/heads --data synthetic
    python -m locret calibrate --model M --policy keydiff --data book.txt --out keydiff_quotas.json

Every context is read once and nothing is evicted. Quotas of the heads' own scores go into their
folder, where the engine finds them; those of any policy into a file, for `quotas=FILE`. They are
written after the last context: a run that is stopped leaves nothing, and begins anew.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from locret.commands import shared
from locret.commands.progress import Progress
from locret.heads import files as artifact
from locret.heads.heads import RetainingHeads
from locret.heads.quotas import COMPRESSIONS, checked_sharpness, in_words
from locret.model.loading import load_config, load_tokenizer
from locret.policies import POLICIES, LocretPolicy, policy_in_words
from locret.policies.kvzip import Wording
from locret.quantities import parse_tokens
from locret.system.files import as_json, check_file, write_whole

NAME = "calibrate"
SYNTHETIC = "synthetic"
CONTEXTS = 60
TOKENS = 4096
FEWEST_TOKENS = 128
"""Shorter contexts say too little: at 32x, every head would keep 4 units of them."""
FIRST_SEED = 1_000_000  # of synthetic samples: far from those that trainings count up from


def add_to(commands: Any) -> None:
    command = commands.add_parser(
        NAME,
        help="measure which heads need to keep more",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared.add_model(command)
    command.add_argument(
        "--policy",
        choices=sorted(POLICIES),
        metavar="NAME",
        help="whose scores say what to keep, such as keydiff; default: locret, with --heads",
    )
    command.add_argument(
        "--data",
        required=True,
        nargs="+",
        help=f'text files, JSON Lines with "context" or "text", or {SYNTHETIC} samples',
    )
    command.add_argument(
        "--contexts", type=shared.whole(1), default=CONTEXTS, help=f"default {CONTEXTS}"
    )
    command.add_argument(
        "--tokens",
        type=shared.argument(parse_tokens),
        help=f"of a context at most; default {TOKENS}, or the window",
    )
    command.add_argument(
        "--compressions",
        action=shared.Listed,
        each=_compression,
        default=list(COMPRESSIONS),
        metavar="R",
        help="tokens for a unit kept, default 2 4 8 16 32",
    )
    command.add_argument(
        "--sharpness",
        type=shared.argument(_sharpness),
        default=1.0,
        help="power that heads' shares are raised to; above 1 = more unequal; default 1",
    )
    command.add_argument(
        "--out", type=Path, help="a .json file; default, for --heads alone: the heads' folder"
    )
    command.set_defaults(run=run)


def _compression(text: str) -> float:
    try:
        compression = float(text.removesuffix("x"))
    except ValueError:
        compression = 0
    if not 1 <= compression < math.inf:
        raise ValueError(f"{text!r} is not a compression; expected a number of at least 1, as 8")
    return compression


def _sharpness(text: str) -> float:
    try:
        return checked_sharpness(float(text))
    except ValueError:
        raise ValueError(f"{text!r} is not a sharpness; expected a number above 0") from None


def run(given: argparse.Namespace) -> None:
    """Measure quotas, and write them."""
    import torch

    from locret.engine.budgets import Calibration
    from locret.engine.engine import Engine

    heads = shared.load_heads(given)
    policy = _checked(given, heads)
    # Texts are looked at before weights are loaded, which takes longer.
    window = load_config(given.model).max_position_embeddings
    if given.tokens is not None and given.tokens > window:
        raise ValueError(
            f"tokens is {given.tokens:,} and the model's window {window:,}: contexts are read at "
            "once, so that they must fit; lower --tokens"
        )
    tokens = given.tokens or min(TOKENS, window)
    contexts = list(_contexts(given.data, load_tokenizer(given.model), tokens, given.contexts))
    loaded = shared.load(given)
    # An engine of quotas that are measured anew needs no old ones.
    made = policy_in_words(policy, loaded.tokenizer)
    engine = Engine(loaded.model, made, heads=heads, quotas=None)
    calibration = Calibration(engine.backbone, engine.policy, sorted(set(given.compressions)))
    with Progress("scoring", "contexts") as progress:
        for done, ids in enumerate(contexts):
            progress(done, len(contexts))
            calibration.add(torch.tensor([ids], device=loaded.model.device))
        progress(len(contexts), len(contexts))
    quotas = calibration.quotas(given.sharpness)
    written = _written(given, heads, quotas)
    read = sum(map(len, contexts))
    print(f"quotas of {policy}, from {len(contexts)} contexts of {read // len(contexts):,} tokens:")
    if len(contexts) < given.contexts:
        print(f"         (the data has no more; {given.contexts} were asked for)")
    for compression, table in quotas.items():
        print(f"{compression:>5}x  {in_words(table)}")
    print(f"wrote    {written.resolve()}")
    if given.out is None:
        shared.say_next([["inspect", given.heads]])
        return
    print(f'next     Engine(model, "{policy}", quotas="{given.out}")')
    named = {"--heads": given.heads, "--adapter": given.adapter}
    words = [word for name, value in named.items() if value for word in (name, value)]
    words += ["--policy", policy, "--quotas", str(given.out), "--budget", "8x"]
    shared.say_next([["generate", "--model", given.model, *words, "--prompt-file", "FILE"]])


def _checked(given: argparse.Namespace, heads: RetainingHeads | None) -> str:
    """The policy's name, once what is cheap to get wrong was looked at."""
    from locret.engine.budgets import why_not_calibrated

    policy = given.policy or (LocretPolicy.name if heads else None)
    if policy is None:
        raise ValueError(
            "nothing scores units; give --heads, or a --policy that needs none, such as keydiff"
        )
    if policy == LocretPolicy.name and heads is None:
        raise ValueError(f"policy {policy!r} scores with heads; give --heads")
    made = LocretPolicy(heads) if heads and policy == LocretPolicy.name else POLICIES[policy]
    reason = why_not_calibrated(made)
    if reason is not None:
        raise ValueError(f"policy {policy!r} cannot be calibrated: {reason}")
    if given.out is None and policy != LocretPolicy.name:
        raise ValueError(
            f"quotas of policy {policy!r} need a file to go into: give --out FILE.json (a heads' "
            f"folder takes those of policy {LocretPolicy.name!r})"
        )
    if given.out is None and not (Path(given.heads) / artifact.WEIGHTS).is_file():
        raise ValueError(
            f"heads {given.heads!r} are not in an artifact folder here, which quotas could go "
            f"into; give --out FILE.json, or python -m locret convert {given.heads} FOLDER"
        )
    if given.out is not None and given.out.suffix != ".json":
        raise ValueError(f"out is {str(given.out)!r}; expected a .json file")
    check_file(given.out, "out")
    for name in given.data:
        if name != SYNTHETIC and not Path(name).is_file():
            raise ValueError(f"data {name!r} is not a file; expected text, JSON Lines, {SYNTHETIC}")
    return policy


def _written(
    given: argparse.Namespace, heads: RetainingHeads | None, quotas: dict[str, list[list[float]]]
) -> Path:
    if given.out is not None:
        write_whole(given.out, as_json(quotas))
        return given.out
    assert heads is not None
    folder = Path(given.heads)
    artifact.save_record(folder, replace(heads.config, quotas=quotas).to_dict())
    return folder / artifact.RECORD


# ---- contexts ------------------------------------------------------------------------------------


def _contexts(data: Sequence[str], tokenizer: Any, tokens: int, count: int) -> Iterator[list[int]]:
    """Token ids of `count` contexts of `tokens` tokens at most, fewer if the data has no more, each
    as a prompt begins: of all documents the first piece, then the second of those that go on."""
    opening = Wording.of(tokenizer).opening
    room = tokens - len(opening)
    if room < FEWEST_TOKENS:
        raise ValueError(f"tokens is {tokens}; expected at least {FEWEST_TOKENS + len(opening)}")
    documents = [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for text in _texts(data, tokenizer, room, count)
    ]
    longest = max(map(len, documents), default=0)
    pieces = [
        [*opening, *document[start : start + room]]
        for start in range(0, longest, room)
        for document in documents
        if len(document) - start >= FEWEST_TOKENS
    ]
    if not pieces:
        raise ValueError(
            f"data {', '.join(data)}: the longest of {len(documents)} texts has {longest} tokens; "
            f"expected one of at least {FEWEST_TOKENS}"
        )
    yield from pieces[:count]


def _texts(data: Sequence[str], tokenizer: Any, tokens: int, count: int) -> Iterator[str]:
    from locret.tasks.base import read_rows
    from locret.tasks.synthetic import TASKS, make_sample

    names = list(TASKS)
    for name in data:
        if name == SYNTHETIC:
            for i in range(count):
                task = names[i % len(names)]
                yield make_sample(task, tokens, tokenizer, FIRST_SEED + i).context
        elif ".jsonl" in Path(name).suffixes:
            for place, row in read_rows(name):
                text = row.get("context", row.get("text"))
                if not isinstance(text, str):
                    raise ValueError(
                        f'{place} has no text in "context" or "text"; its fields: {sorted(row)}'
                    )
                yield text
        else:
            yield shared.read_text(name)
