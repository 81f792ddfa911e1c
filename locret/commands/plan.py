"""`python -m locret plan`: what fits into a given memory, from a model's config alone."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from locret.commands.shared import DTYPES, MODEL, argument, chunk_size, whole
from locret.heads.quotas import quotas_of
from locret.model.loading import load_config
from locret.quantities import parse_bytes, parse_tokens


def add_to(commands: Any) -> None:
    command = commands.add_parser("plan", help="what fits into a given memory")
    command.add_argument("--model", required=True, help=MODEL)
    command.add_argument("--revision", help="of the Hub repository")
    command.add_argument(
        "--memory", required=True, type=argument(parse_bytes), help="such as 24GiB"
    )
    command.add_argument(
        "--context", required=True, type=argument(parse_tokens), help="tokens, such as 128K"
    )
    command.add_argument(
        "--chunk-size",
        type=chunk_size,
        default="auto",
        metavar="N",
        help="tokens read at a time; none: all at once; auto, the default, and recorded, as there "
        "are no heads here: the fastest",
    )
    command.add_argument("--new-tokens", type=whole(0), help="answer tokens to leave room for")
    command.add_argument("--head-width", type=whole(0), help="of the retaining heads; 0 = none")
    command.add_argument(
        "--quotas", type=argument(quotas_of), help="of unequal heads: a .json or .npy file"
    )
    command.add_argument("--dtype", choices=DTYPES)
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    command.set_defaults(run=_plan)


def _plan(given: argparse.Namespace) -> None:
    import torch

    from locret.engine import plan

    names = ("memory", "context", "quotas", "chunk_size")
    asked = {name: getattr(given, name) for name in names}
    for name in ("new_tokens", "head_width"):
        if getattr(given, name) is not None:
            asked[name] = getattr(given, name)
    config = load_config(given.model, revision=given.revision)
    dtype = getattr(torch, given.dtype) if given.dtype else None
    made = plan.make_plan(config, dtype=dtype, **asked)
    print(json.dumps(asdict(made)) if given.json else plan.as_text(made, given.model))
