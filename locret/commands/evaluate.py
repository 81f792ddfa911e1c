"""`python -m locret evaluate`, `needle`, `grid`, `report` and `reproduce`: how well models answer.

`evaluate` asks benchmarks as a configuration says. `needle` and `grid` write such a configuration,
ask it, and print a table: needles under several policies, at one length or over a map of lengths
and depths; and under policies, bits and budgets at equal bytes. Their answers are kept beside the
file that `--json-out` names, in the folder `NAME.answers`; the same command goes on where it
stopped.
"""

import argparse
import contextlib
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locret.commands.progress import Progress
from locret.commands.shared import (
    Listed,
    add_model,
    argument,
    named,
    path_of,
    say_next,
    whole,
)
from locret.policies import POLICIES
from locret.quantities import MOST, parse_tokens
from locret.system.files import check_file, write_whole
from locret.tasks import GROUPS, TASKS
from locret.tasks.synthetic import FIRST_SEED, HAYSTACK

if TYPE_CHECKING:
    from locret.evaluation.ask import Ranks
    from locret.evaluation.config import EvalConfig
    from locret.evaluation.questions import Prepared

NAME = "evaluate"
UNFINISHED = "there are answers to give yet: run the same command again"
ABOUT = """`python -m locret evaluate`: benchmarks under several policies and budgets.

    python -m locret evaluate --config eval/ruler_smollm2.yaml --limit 10 --engine.chunk_size 256

Any value of the configuration can be overridden, as in trainings; lists are written as in YAML.

What becomes of results: `report` makes tables and figures of many, `reproduce` asks small slices of
them again, on a CPU.
"""


def add_to(commands: Any) -> None:
    _add_needle(commands)
    _add_grid(commands)
    commands.add_parser(NAME, help="benchmarks under several policies and budgets", add_help=False)
    command = commands.add_parser("report", help="tables and figures of many results")
    command.add_argument("results", nargs="+", type=named, help="JSON files of results")
    command.add_argument("--out", type=path_of, required=True, help="folder to write to")
    command.add_argument("--title", default="Results")
    command.set_defaults(run=_report)
    command = commands.add_parser("reproduce", help="run slices of committed results again")
    command.add_argument("results", nargs="+", type=path_of, help="result files, or their folders")
    command.add_argument("--data-dir", type=named, help="folder of the tasks' data files")
    command.add_argument("--output", type=path_of, default=Path("runs/reproduce"))
    command.add_argument("--limit", type=int, help="samples a task")
    command.set_defaults(run=_reproduce)


def run(args: Sequence[str]) -> None:
    """Run an evaluation, or the part of it that falls to this process."""
    from locret.evaluation.ask import Ranks
    from locret.evaluation.questions import prepare

    args = [_with_underscores(text) for text in args]
    if {"--help", "-h"} & set(args):
        _parser().print_help()
        return
    if "--list_tasks" in args:
        print(_tasks())
        return
    config, given = _configured(args)
    ranks = Ranks.of_environment()
    if given.dry_run:
        print(_plan(prepare(config)))
        return
    path = _asked(config, given, ranks)
    if path is None and ranks.world == 1:
        raise ValueError(UNFINISHED)
    if path is None:
        print(f"rank {ranks.rank} of {ranks.world}: done; other processes have questions left")
    elif ranks.world == 1 or given.processes == 1:
        _say(path)


def _asked(config: "EvalConfig", given: Any, ranks: "Ranks") -> Path | None:
    """`locret.evaluation.evaluate.run`; the first process shows how far it is."""
    from locret.evaluation import evaluate

    command = "python -m locret " + shlex.join(sys.argv[1:])
    with Progress("asking") if ranks.rank == 0 else contextlib.nullcontext() as progress:
        return evaluate.run(config, command, ranks, progress, given.processes, given.minutes)


def _configured(args: Sequence[str]) -> tuple["EvalConfig", Any]:
    """The configuration that a command line asks for, and all that it says."""
    from locret.evaluation.config import parsed, read_values

    words = [word for text in args for word in text.split("=", 1)]
    names = [name for flag, name in zip(words, words[1:], strict=False) if flag == "--config"]
    if not names:
        raise ValueError("give a configuration with --config, such as eval/ruler_smollm2.yaml")
    return parsed(_parser(), args, read_values(names[-1]))


def _parser() -> Any:
    from locret.evaluation.config import parser

    made = parser(prog="locret evaluate", description=ABOUT)
    made.add_argument("--processes", type=int, default=1, help="that share the questions")
    made.add_argument("--minutes", type=float, help="ask no more after that time")
    made.add_argument("--dry_run", action="store_true", help="only show what would be asked")
    made.add_argument("--list_tasks", action="store_true", help="show the tasks there are")
    return made


def _with_underscores(text: str) -> str:
    """`--data-dir` as `--data_dir`."""
    name, equals, value = text.partition("=")
    is_name = name.startswith("--")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if is_name else text


def _tasks() -> str:
    groups = [f"{name:<28} {names[0]} ... {names[-1]}" for name, names in GROUPS.items()]
    tasks = [f"{name:<28} scored by {', '.join(task.metrics)}" for name, task in TASKS.items()]
    return "\n".join(groups + tasks)


def _plan(prepared: "Prepared") -> str:
    asked = prepared.asked
    setups = dict.fromkeys(question.setup.label for question in asked)
    counts: dict[str, list[int]] = {}
    for question in asked:
        if question.setup.label == next(iter(setups)):
            counts.setdefault(question.task.label, []).append(len(question.prompt.ids))
    lines = [f"{len(setups)} setups: {', '.join(setups)}"]
    lines += [
        f"{label:<34} {len(sizes):>5} samples of {min(sizes)} to {max(sizes)} tokens"
        for label, sizes in counts.items()
    ]
    return "\n".join([*lines, f"{len(asked)} answers, into {prepared.output.resolve()}"])


def _say(path: Path) -> None:
    """What was made, and where."""
    from locret.evaluation import tables

    result = json.loads(path.read_text(encoding="utf-8"))
    print(tables.as_markdown(result))
    print(f"table        {path.with_suffix('.md').resolve()}")
    print(f"figures      {path.resolve()}")
    print(f"predictions  {(path.parent / 'predictions').resolve()}")


# ---- results: report and reproduce ---------------------------------------------------------------

MARK = ".reproduced"
"""A file that tells a reproduction's folder from one of `evaluate`, whose answers took hours."""

MADE = {"predictions", "sessions", "result.json", "result.md", "config.yaml", ".lock"}
"""What a reproduction leaves in its folder beside the mark."""


def _report(given: argparse.Namespace) -> None:
    from locret.evaluation.report import MARKDOWN, make_report

    page = make_report(given.results, given.out, given.title)
    print(f"report   {page.with_name(MARKDOWN).resolve()}")
    print(f"page     {page.resolve()}")


def _reproduce(given: argparse.Namespace) -> None:
    from locret.evaluation import evaluate as again
    from locret.evaluation.evaluate import Comparison, as_table

    changes = {"data_dir": given.data_dir, "limit": given.limit}
    changes = {name: value for name, value in changes.items() if value is not None}
    compared: list[Comparison] = []
    left_out: list[str] = []
    paths = again.result_files(given.results)
    for path in paths:
        _check_own(given.output / again.name_of(path), paths)
    for path in paths:
        name = again.name_of(path)
        folder = _cleared(given.output / name)
        with Progress(name) as progress:
            found = again.reproduce(path, folder, changes, progress)
        compared += found.compared
        left_out += [f"{name}: {reason}" for reason in found.left_out]
    for reason in left_out:
        print(f"left out  {reason}")
    print(as_table(compared))
    print(f"answers   {given.output.resolve()}")
    if not compared:
        raise ValueError("nothing could be run again; give the data with --data-dir")
    wrong = [f"{one.table}, {one.setup}" for one in compared if not one.reproduced]
    if wrong:
        raise ValueError(f"not reproduced: {'; '.join(wrong)}")
    print(f"all {len(compared)} setups reproduced")


def _check_own(folder: Path, results: Sequence[Path]) -> None:
    """Refuse a folder with anything but an earlier reproduction in it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give another one as --output")
    there = {path.name for path in folder.iterdir()}
    foreign = sorted(there - MADE - {MARK} if MARK in there else there)
    foreign += [path.name for path in results if folder.resolve() in path.resolve().parents]
    if foreign:
        raise ValueError(
            f"{folder} would be emptied, but holds {', '.join(dict.fromkeys(foreign))}; give "
            "another folder as --output"
        )


def _cleared(folder: Path) -> Path:
    """The folder without what an earlier reproduction made there: all is run from scratch."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / MARK).touch()
    return folder


# ---- needles -------------------------------------------------------------------------------------

FULL_BITS = 16
GENERATE = ("model", "adapter", "heads", "weights")


def _add_needle(commands: Any) -> None:
    command = commands.add_parser("needle", help="needles under several policies")
    _add_arguments(command, ["full", "streaming_llm", "locret"], ratios=[8], tokens=3000)
    command.add_argument("--json-out", type=path_of, help="write the result to this file")
    grid = command.add_argument_group("map of lengths and depths (--json-out is needed)")
    grid.add_argument("--grid", action="store_true", help="ask at --lengths x --depths")
    grid.add_argument(
        "--lengths",
        action=Listed,
        each=parse_tokens,
        help="of the prompts, such as 1024,2K; default 1K,2K,4K",
    )
    grid.add_argument("--depths", type=whole(1), help="default 10")
    grid.add_argument("--plot", type=path_of, help="write the maps to this file")
    command.set_defaults(run=needle)


def needle(given: argparse.Namespace) -> None:
    from locret.evaluation.report import needle_map

    if given.plot and not given.grid:
        raise ValueError("--plot draws a map: give --grid and --json-out too, or leave --plot out")
    if given.grid and given.json_out is None:
        raise ValueError("a map needs --json-out FILE: answers are kept beside it as they come")
    values: dict[str, Any] = {}
    if given.grid:
        depths = given.depths or 10
        lengths = given.lengths or [1024, 2048, 4096]
        values = {"lengths": lengths, "depths": depths, "limit": depths * (given.count or 1)}
    elif given.lengths or given.depths:
        raise ValueError("--lengths and --depths are those of a map: give --grid too")
    setups = _setups_of(given.policies, [f"{ratio}x" for ratio in given.ratios])
    _ask(given, _config_of(given, setups, **values), needle_map)


def _add_grid(commands: Any) -> None:
    command = commands.add_parser("grid", help="policies, bits and budgets at equal bytes")
    policies = ["full", "snapkv", "locret"]
    _add_arguments(command, policies, ratios=[128, 64, 32], tokens=4096)
    command.add_argument("--bits", action=Listed, each=whole(1), default=[16, 8, 4])
    command.add_argument("--quantization", default="kivi", help="the scheme below 16 bits")
    command.add_argument("--group", type=int, default=64)
    command.add_argument("--residual", type=int, default=0, help="units in full precision")
    command.add_argument(
        "--query-aware", action="store_true", help="policies see the question before they evict"
    )
    command.add_argument(
        "--one-shot",
        action="store_true",
        help="read the prompt at once, not in chunks within the budget",
    )
    command.add_argument("--json-out", type=path_of, required=True, help="the result")
    command.add_argument("--plot", type=path_of, help="quality against bytes")
    command.set_defaults(run=grid)


def grid(given: argparse.Namespace) -> None:
    from locret.evaluation.report import against_bytes

    options = {"group": given.group, "residual": given.residual}
    schemes = [
        None if bits == FULL_BITS else {"name": given.quantization, "bits": bits, **options}
        for bits in given.bits
    ]
    setups = _setups_of(
        given.policies,
        [f"{ratio}x bytes" for ratio in given.ratios],
        quantization=schemes,
        protocol="query_aware" if given.query_aware else "query_agnostic",
    )
    engine = {"chunk_size": None if given.one_shot else 512}
    _ask(given, _config_of(given, setups, engine=engine), against_bytes)


def _add_arguments(
    command: argparse.ArgumentParser, policies: list[str], ratios: list[int], tokens: int
) -> None:
    """The flags of both, with their defaults."""
    add_model(command)
    command.add_argument("--policies", action=Listed, default=policies)
    command.add_argument("--tasks", action=Listed, default=["niah_single"])
    command.add_argument(
        "--tokens", type=argument(parse_tokens), default=tokens, help="length of the prompts"
    )
    command.add_argument("--count", type=whole(1), help="samples a task, spread over depths")
    command.add_argument(
        "--ratios", action=Listed, each=whole(2), default=ratios, help="tokens a budget unit"
    )
    command.add_argument("--seed", type=whole(FIRST_SEED), default=FIRST_SEED)
    command.add_argument("--max-new-tokens", type=whole(1), default=32)
    command.add_argument(
        "--haystack", type=named, default="noise", help="noise, reference, or a text file"
    )
    command.add_argument(
        "--no-answer-prefix", action="store_true", help="do not give the answer's first words"
    )
    command.add_argument("--batch-size", type=whole(1), default=1, help="samples asked together")
    command.add_argument("--processes", type=whole(1), default=1, help="that share the samples")
    command.add_argument("--minutes", type=float, help="ask no more after that time")


def _config_of(
    given: argparse.Namespace, setups: Sequence[Mapping[str, Any]], **values: Any
) -> dict[str, Any]:
    """A configuration of `evaluate` with these setups, and values of its own."""
    unknown = sorted(set(given.policies) - set(POLICIES))
    if unknown:
        raise ValueError(f"policies {unknown} are unknown; expected some of {sorted(POLICIES)}")
    if not given.heads and "locret" in given.policies:
        raise ValueError("policy locret needs --heads; train some with python -m trainers.fit")
    others = sorted(set(given.tasks) - set(GROUPS["needles"]))
    if others:
        raise ValueError(
            f"tasks {', '.join(others)} are no needles; expected some of "
            f"{', '.join(GROUPS['needles'])}; `locret evaluate` asks the others"
        )
    count = given.count or 10
    same = [*GENERATE, "dtype", "device", "tasks", "max_new_tokens", "batch_size"]
    config = {name: getattr(given, name) for name in same} | {
        "setups": list(setups),
        "full": "full" in given.policies,
        "lengths": [given.tokens],
        "depths": count,
        "limit": count,
        "answer_prefix": not given.no_answer_prefix,
        "seed": given.seed - FIRST_SEED,
        "data": {HAYSTACK: given.haystack},
        # The full cache meets prompts beyond the model's window too, whole: that is what maps show.
        "max_length": MOST,
        "engine": {"chunk_size": 512},
    }
    return {name: value for name, value in (config | values).items() if value is not None}


def _setups_of(
    policies: Sequence[str], budgets: Sequence[str], **values: Any
) -> list[dict[str, Any]]:
    """A setup for every policy, at every budget if it evicts."""
    return [
        {"policy": policy, "budget": list(budgets), **values}
        if policy not in POLICIES or POLICIES[policy].evicts
        else {"policy": policy, **values}
        for policy in policies
    ]


def _ask(
    given: argparse.Namespace, config: dict[str, Any], draw: Callable[[Mapping[str, Any]], Any]
) -> None:
    """Ask a configuration, print its table, and write the files that were asked for; `draw` makes
    the figure of `--plot`."""
    from locret.evaluation.config import EvalConfig
    from locret.evaluation.report import check_figure, save_figure

    out: Path | None = given.json_out
    check_file(out, "--json-out")
    if given.plot:
        check_figure(given.plot)
    if given.minutes is not None and out is None:
        raise ValueError("--minutes needs --json-out FILE: answers are kept beside it")
    with tempfile.TemporaryDirectory() as temporary:
        folder = out.with_name(f"{out.stem}.answers") if out else Path(temporary)
        result = _shown(given, EvalConfig.from_dict(config | {"output": str(folder)}))
    if given.plot:
        print(f"figure   {save_figure(draw(result), given.plot).resolve()}")
    commands = []
    if given.heads:
        pairs = [(f"--{name}", getattr(given, name)) for name in GENERATE if getattr(given, name)]
        words = [word for pair in pairs for word in pair]
        commands.append(["generate", *words, "--prompt-file", "FILE"])
    if out:
        commands.append(["report", str(out), "--out", str(out.with_name(f"{out.stem}-report"))])
    say_next(commands)


def _shown(given: argparse.Namespace, config: "EvalConfig") -> dict[str, Any]:
    """The result, asked, shown, and written to `--json-out`."""
    from locret.evaluation import tables
    from locret.evaluation.ask import Ranks

    path = _asked(config, given, Ranks.of_environment())
    if path is None:
        raise ValueError(UNFINISHED)
    text = path.read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(text)
    prompts = [cell["prompt_tokens"] for cell in result["cells"] if cell["prompt_tokens"]]
    print(
        f"{config.limit} samples of {', '.join(config.tasks)} in prompts of up to "
        f"{max((spread['max'] for spread in prompts), default=0):,} tokens ({config.model})\n"
    )
    print(f"{tables.as_text(result)}\n")
    if given.heads:
        print(f"heads    {Path(given.heads).resolve()}")
    if given.json_out:
        write_whole(given.json_out, text)
        print(f"result   {given.json_out.resolve()}")
        print(f"answers  {path.parent.resolve()}")
    return result
