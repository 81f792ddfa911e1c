"""`python -m locret convert`, `inspect` and `push`: what is done with trained heads."""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, constants

from locret.commands.shared import size_of
from locret.heads import files as artifact
from locret.heads import hub
from locret.heads.heads import RetainingHeads
from locret.heads.hub import quota_words

CARD_LINES = 16  # of the card, shown before a push
ODD_RATIO = 10  # norms further than this from the layers' median are remarked on


def add_to(commands: Any) -> None:
    command = commands.add_parser("convert", help="artifact folder <-> released .bin")
    command.add_argument("source", help="a folder, a .bin file, or a Hub id")
    command.add_argument("target", type=Path, help="a .bin file to write, or else a folder")
    command.set_defaults(run=_convert)
    command = commands.add_parser("inspect", help="print an artifact's record and figures")
    command.add_argument("source", help="a folder, a .bin file, or a Hub id")
    command.add_argument("--revision", help="of the Hub repository")
    command.add_argument("--token", help="for a private Hub repository")
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    command.set_defaults(run=_inspect)
    command = commands.add_parser("push", help="upload an artifact folder to the Hub")
    command.add_argument("folder", type=Path, help="an artifact folder")
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
        "weights": f"{', '.join(found['dtypes'])}, {size_of(found['bytes'])}",
        "files": {name: size_of(size) for name, size in found["files"].items()},
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
    sizes = {file.path_in_repo: size_of(file.upload_info.size) for file in files}
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
