"""`python -m locret grid`: policies, bits and budgets at equal bytes."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from locret.commands.progress import Progress, report_of, say_next
from locret.commands.shared import Listed, add_model, load, load_heads, whole_number
from locret.policies import POLICIES

TEXTS = ("model", "heads", "adapter", "dtype", "device", "quantization", "haystack", "json_out")
NUMBERS = (
    "tokens",
    "count",
    "seed",
    "max_new_tokens",
    "group",
    "residual",
    "minutes",
    "batch_size",
)
LISTS = ("policies", "tasks", "ratios", "bits")
FLAGS = ("no_answer_prefix", "query_aware", "one_shot")


def add_to(commands: Any) -> None:
    command = commands.add_parser("grid", help="policies, bits and budgets at equal bytes")
    add_model(command)
    command.add_argument("--policies", action=Listed, default=["full", "snapkv", "locret"])
    command.add_argument("--bits", action=Listed, each=whole_number, default=[16, 8, 4])
    command.add_argument(
        "--ratios",
        action=Listed,
        each=whole_number,
        default=[128, 64, 32],
        help="tokens a unit of 16 bits",
    )
    command.add_argument("--quantization", default="kivi", help="the scheme below 16 bits")
    command.add_argument("--group", type=int, default=64)
    command.add_argument("--residual", type=int, default=0, help="units in full precision")
    command.add_argument("--tasks", action=Listed, default=["niah_single"])
    command.add_argument("--tokens", type=int, default=4096, help="length of the prompts")
    command.add_argument("--count", type=int, default=10, help="samples a task")
    command.add_argument("--seed", type=int, default=1_000_000)
    command.add_argument("--max-new-tokens", type=int, default=32)
    command.add_argument("--haystack", default="noise", help="noise, reference, or a text file")
    command.add_argument(
        "--no-answer-prefix", action="store_true", help="do not give the answer's first words"
    )
    command.add_argument(
        "--query-aware", action="store_true", help="policies see the question before they evict"
    )
    command.add_argument(
        "--one-shot",
        action="store_true",
        help="read the prompt at once, not in chunks within the budget",
    )
    command.add_argument("--json-out", type=Path, required=True, help="every answer")
    command.add_argument("--plot", type=Path, help="quality against bytes")
    command.add_argument("--batch-size", type=int, default=1, help="samples asked together")
    command.add_argument("--processes", type=int, default=1, help="share the samples")
    command.add_argument("--minutes", type=float, help="ask no more after that time")
    command.add_argument(
        "--merge", nargs="+", type=Path, help="ask nothing: gather the answers of these files"
    )
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    """Run a grid, a share of it, or several processes that share it.

    Raises:
        ValueError: an unknown policy, heads are missing, or files hold something else.
    """
    from locret.evaluation import byte_grid, byte_grid_figure, figures, grid
    from locret.evaluation.ranks import Ranks

    _check(given)
    if given.plot:
        figures.check(given.plot)  # better now than at the end
    ranks = Ranks.of_environment()
    out = _part(given.json_out, ranks.rank) if ranks.world > 1 else given.json_out
    if given.merge:
        record = byte_grid.merge(given.merge, given.json_out)
    elif given.processes > 1:
        record = _in_processes(given)
    else:
        if ranks.world > 1:
            given.device = given.device or ranks.device()
        loaded, heads = load(given), load_heads(given)
        record = byte_grid.run_byte_grid(
            loaded,
            given.policies,
            _settings(given),
            out,
            heads,
            manifest=grid.manifest_of(loaded, given.heads) | {"protocol": _protocol(given)},
            ranks=ranks,
            minutes=given.minutes,
            progress=Progress("asking") if ranks.rank == 0 else None,
            batch_size=given.batch_size,
        )
    print(byte_grid.as_table(record))
    print(f"\nanswers  {out.resolve()}")
    if ranks.world > 1:
        print(f"         of process {ranks.rank} of {ranks.world}; --merge gathers those of all")
        return
    if given.plot:
        print(f"figure   {byte_grid_figure.draw(record, given.plot).resolve()}")
    say_next([report_of(out)])


def _check(given: argparse.Namespace) -> None:
    from locret.evaluation import byte_grid
    from locret.system.files import check_file

    unknown = sorted(set(given.policies) - set(POLICIES))
    if unknown:
        raise ValueError(f"policies {unknown} are unknown; expected some of {sorted(POLICIES)}")
    if not given.heads and "locret" in given.policies:
        raise ValueError("policy locret needs --heads; train some with python -m trainers.fit")
    for name in ("processes", "batch_size"):
        if getattr(given, name) < 1:
            raise ValueError(f"{name} is {getattr(given, name)}; expected at least 1")
    check_file(given.json_out, "--json-out")
    settings = json.loads(json.dumps(asdict(_settings(given))))
    if given.json_out.exists() and not given.merge:
        byte_grid.check_settings(given.json_out, settings)


def _settings(given: argparse.Namespace) -> Any:
    from locret.evaluation.byte_grid import ByteGridSettings
    from locret.evaluation.needle import NeedleSettings

    asked = NeedleSettings(
        tasks=tuple(given.tasks),
        tokens=given.tokens,
        count=given.count,
        ratios=tuple(given.ratios),
        seed=given.seed,
        haystack=None if given.haystack == "reference" else given.haystack,
        answer_prefix=not given.no_answer_prefix,
        max_new_tokens=given.max_new_tokens,
    )
    if given.one_shot:
        asked = replace(asked, chunk_size=None)
    bits = tuple(given.bits)
    scheme = given.quantization, given.group, given.residual
    return ByteGridSettings(asked, bits, *scheme, given.query_aware)


def _protocol(given: argparse.Namespace) -> str:
    return "query-aware" if given.query_aware else "query-agnostic"


def _part(out: Path, rank: int) -> Path:
    """The file of one process."""
    return out.with_name(f"{out.stem}.part{rank}{out.suffix}")


def _in_processes(given: argparse.Namespace) -> dict[str, Any]:
    """Run the shares, then merge what they wrote; what earlier runs left of them counts."""
    from locret.evaluation import byte_grid
    from locret.evaluation.processes import run_together

    parts = [_part(given.json_out, rank) for rank in range(given.processes)]
    total = len(byte_grid.runs(given.policies, _settings(given))) * given.count * len(given.tasks)
    asking = Progress("asking")

    def tell() -> None:
        there = [byte_grid.read(part)["results"] for part in parts if part.exists()]
        asking(min(sum(map(len, there)), total), total)

    logs = given.json_out.with_name(f"{given.json_out.stem}.logs")
    run_together(_arguments(given), given.processes, logs, tell)
    return byte_grid.merge([f for f in (given.json_out, *parts) if f.exists()], given.json_out)


def _arguments(given: argparse.Namespace) -> list[str]:
    """The command line of one process: the same grid."""
    arguments = ["grid"]
    for name in (*TEXTS, *NUMBERS, *LISTS):
        value = getattr(given, name)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return arguments + [f"--{name.replace('_', '-')}" for name in FLAGS if getattr(given, name)]
