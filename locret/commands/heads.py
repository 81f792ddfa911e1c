"""`python -m locret calibrate`, `convert`, `inspect` and `push`: what is done with trained heads.

`locret.heads.files` counts what `inspect` shows and chooses what `push` uploads;
`locret.engine.budgets` measures quotas.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, constants

from locret.commands import shared
from locret.commands.progress import Progress
from locret.heads import files as artifact
from locret.heads import hub
from locret.heads.heads import RetainingHeads, is_logarithm
from locret.heads.hub import quota_words
from locret.heads.quotas import COMPRESSIONS, checked_sharpness, in_words
from locret.model.loading import load_config, load_tokenizer
from locret.policies import POLICIES, LocretPolicy, policy_in_words
from locret.policies.kvzip import Wording
from locret.quantities import parse_tokens
from locret.system.files import as_json, check_file, write_whole

CARD_LINES = 16  # of the card, shown before a push
ODD_RATIO = 10  # norms further than this from the layers' median are remarked on


def add_to(commands: Any) -> None:
    _add_calibrate(commands)
    command = commands.add_parser("convert", help="artifact folder <-> released .bin")
    command.add_argument("source", type=shared.named, help="a folder, a .bin file, or a Hub id")
    command.add_argument(
        "target", type=shared.path_of, help="a .bin file to write, or else a folder"
    )
    command.set_defaults(run=_convert)
    command = commands.add_parser("inspect", help="print an artifact's record and figures")
    command.add_argument("source", type=shared.named, help="a folder, a .bin file, or a Hub id")
    command.add_argument("--revision", help="of the Hub repository")
    command.add_argument("--token", help="for a private Hub repository")
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    command.set_defaults(run=_inspect)
    command = commands.add_parser("push", help="upload an artifact folder to the Hub")
    command.add_argument("folder", type=shared.path_of, help="an artifact folder")
    command.add_argument("repo_id", help="OWNER/NAME; made if it does not exist")
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.add_argument("--dry-run", action="store_true", help="only show what would be uploaded")
    command.add_argument("--token", help="default: HF_TOKEN, or what `hf auth login` stored")
    command.add_argument("--revision", "--branch", help="commit to this branch, made if need be")
    command.set_defaults(run=_push)


def _convert(given: argparse.Namespace) -> None:
    heads = RetainingHeads.from_pretrained(given.source)
    save = heads.save_released if given.target.suffix == ".bin" else heads.save_pretrained
    written = save(given.target)
    config = heads.config
    shape = f"width {config.width}" if config.width else config.kind
    print(f"wrote {written}: {config.num_layers} layers, {shape}")


def _inspect(given: argparse.Namespace) -> None:
    path = artifact.locate(given.source, revision=given.revision, token=given.token)
    heads = RetainingHeads.from_pretrained(path)
    found = artifact.inventory(path, heads.state_dict())
    if given.json:
        print(json.dumps({"source": given.source, "record": heads.config.to_dict(), **found}))
        return
    record = heads.config.to_dict()
    rows = record | {
        "quotas": {f"{key}x": words for key, words in quota_words(record).items()},
        "parameters": f"{found['parameters']:,}",
        "weights": f"{', '.join(found['dtypes'])}, {shared.size_of(found['bytes'])}",
        "files": {name: shared.size_of(size) for name, size in found["files"].items()},
    }
    for name, value in rows.items():
        print(f"{name:<18} {_words(value)}")
    names = [name for name in found["layers"][0] if name != "layer"]
    print("\nlayer" + "".join(f"{f'norm {name}':>{_width(name)}}" for name in names))
    for layer in found["layers"]:
        norms = "".join(f"{layer[name]:>{_width(name)}.4g}" for name in names)
        print(f"{layer['layer']:>5}{norms}   {_remark(layer, found['layers'])}".rstrip())


def _width(name: str) -> int:
    """Characters of a tensor's norms in the table."""
    return max(11, len(f"  norm {name}"))


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _remark(layer: dict[str, Any], layers: list[dict[str, Any]]) -> str:
    """What is odd about the norms of a layer beside those of the others."""
    odd = []
    for name in (name for name in layer if name != "layer"):
        usual = statistics.median(other[name] for other in layers)
        if layer[name] == 0:
            odd.append(f"{name} is zero")
        elif not usual / ODD_RATIO <= layer[name] <= usual * ODD_RATIO:
            odd.append(f"{name} is far from the median {usual:.4g}")
    return "; ".join(odd)


def _push(given: argparse.Namespace) -> None:
    hub.check_repo_id(given.repo_id)
    files, left_out = artifact.publishable(given.folder, given.repo_id)
    RetainingHeads.from_pretrained(given.folder)
    has_token = hub.has_token(given.token)
    if given.dry_run or not has_token:
        print(_upload_plan(given, files, left_out))
    if not has_token:
        missing = f"no token was found: {hub.HOW_TO_GET_A_TOKEN}"
        if not given.dry_run:
            raise ValueError(f"nothing was uploaded, {missing}")
        print(missing)
    if not given.dry_run:
        options = {name: getattr(given, name) for name in ("private", "token", "revision")}
        address = hub.upload(given.repo_id, files, **options)
        print(f"pushed {len(files)} files to {address}")


def _upload_plan(
    given: argparse.Namespace, files: list[CommitOperationAdd], left_out: dict[str, str]
) -> str:
    visibility = "private" if given.private else "public"
    own = hub.has_own_card(given.folder)
    sizes = {file.path_in_repo: shared.size_of(file.upload_info.size) for file in files}
    lines = [
        f"would go to {constants.ENDPOINT}/{given.repo_id} in one commit ({visibility} if it is "
        f"made new, branch {given.revision or 'main'}):",
        *(f"  {name:<24} {size:>10}" for name, size in sizes.items()),
        *(f"  {name:<24} {'stays':>10}: {reason}" for name, reason in left_out.items()),
        f"the card, {'your own' if own else 'generated'}, begins:",
    ]
    card = files[0].path_or_fileobj
    assert isinstance(card, bytes)
    shown = card.decode("utf-8", errors="replace").splitlines()[:CARD_LINES]
    return "\n".join([*lines, *(f"  | {line}" for line in shown)])


# ---- calibrate -----------------------------------------------------------------------------------

CALIBRATE = "calibrate"
ABOUT = """`python -m locret calibrate`: measure which KV heads need to keep more than others.

    python -m locret calibrate --model M --heads runs/heads --data synthetic
    python -m locret calibrate --model M --policy keydiff --data book.txt --out keydiff_quotas.json

Every context is read once and nothing is evicted. Quotas of the heads' own scores go into their
folder, where the engine finds them; those of any policy into a file, for `quotas=FILE`. They are
written after the last context: a run that is stopped leaves nothing, and begins anew.
"""
SYNTHETIC = "synthetic"
CONTEXTS = 60
TOKENS = 4096
FEWEST_TOKENS = 128
"""Shorter contexts say too little: at 32x, every head would keep 4 units of them."""
FIRST_SEED = 1_000_000  # of synthetic samples: far from those that trainings count up from


def _add_calibrate(commands: Any) -> None:
    command = commands.add_parser(
        CALIBRATE,
        help="measure which heads need to keep more",
        description=ABOUT,
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
        type=shared.named,
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
        "--out", type=shared.path_of, help="a .json file; default, for --heads alone: their folder"
    )
    command.set_defaults(run=calibrate)


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


def calibrate(given: argparse.Namespace) -> None:
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
    if heads is not None and policy == LocretPolicy.name and not is_logarithm(heads.config.label):
        print(
            f"         (heads that learned {heads.config.label} may score on another scale in each "
            "KV head: compare answers with those of --quotas none)"
        )
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
