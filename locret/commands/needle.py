"""`python -m locret needle`: needles under several policies, at one length or over a grid."""

import argparse
import json
from pathlib import Path
from typing import Any

from locret.commands.progress import Progress, report_of, say_next
from locret.commands.shared import Listed, add_model, load, load_heads, whole_number
from locret.heads.heads import RetainingHeads
from locret.policies import POLICIES
from locret.quantities import parse_tokens


def add_to(commands: Any) -> None:
    command = commands.add_parser("needle", help="needles under several policies")
    add_model(command)
    command.add_argument("--policies", action=Listed, default=["full", "streaming_llm", "locret"])
    command.add_argument("--tasks", action=Listed, default=["niah_single"])
    command.add_argument("--tokens", type=int, default=3000, help="length of the prompts")
    command.add_argument("--count", type=int, help="samples a task, spread over depths")
    command.add_argument(
        "--ratios", action=Listed, each=whole_number, default=[8], help="tokens a budget unit"
    )
    command.add_argument("--seed", type=int, default=1_000_000)
    command.add_argument("--max-new-tokens", type=int, default=32)
    command.add_argument("--haystack", default="noise", help="noise, reference, or a text file")
    command.add_argument(
        "--no-answer-prefix", action="store_true", help="do not give the answer's first words"
    )
    command.add_argument("--batch-size", type=int, default=1, help="samples asked together")
    command.add_argument("--json-out", type=Path, help="write every answer to this file")
    grid = command.add_argument_group("grid of lengths and depths (--json-out is needed)")
    grid.add_argument("--grid", action="store_true", help="ask at --lengths x --depths")
    grid.add_argument(
        "--lengths",
        action=Listed,
        each=parse_tokens,
        default=[1024, 2048, 4096],
        help="of the prompts, such as 1024,2K",
    )
    grid.add_argument("--depths", type=int, default=10)
    grid.add_argument("--plot", type=Path, help="write the heat maps to this file")
    command.set_defaults(run=_needle)


def _needle(given: argparse.Namespace) -> None:
    from locret.evaluation import needle, needle_table
    from locret.system.files import check_file, write_whole

    policies = given.policies
    unknown = sorted(set(policies) - set(POLICIES))
    if unknown:
        raise ValueError(f"policies {unknown} are unknown; expected some of {sorted(POLICIES)}")
    if not given.heads and "locret" in policies:
        raise ValueError("policy locret needs --heads; train some with python -m trainers.fit")
    if given.batch_size < 1:
        raise ValueError(f"batch_size is {given.batch_size}; expected at least 1")
    if given.plot and not given.grid:
        raise ValueError("--plot draws a grid: give --grid and --json-out too, or leave --plot out")
    check_file(given.json_out, "--json-out")
    settings = needle.NeedleSettings(
        tasks=tuple(given.tasks),
        tokens=given.tokens,
        count=needle.NeedleSettings.count if given.count is None else given.count,
        ratios=tuple(given.ratios),
        seed=given.seed,
        haystack=None if given.haystack == "reference" else given.haystack,
        answer_prefix=not given.no_answer_prefix,
        max_new_tokens=given.max_new_tokens,
    )
    heads = load_heads(given)
    if given.grid:
        _needle_grid(given, policies, settings, heads)
        return
    loaded = load(given)
    total = len(needle.runs(policies, settings.ratios)) * settings.count * len(settings.tasks)
    progress, results = Progress("asking"), []
    progress(0, total)
    for result in needle.run_needles(loaded, policies, settings, heads, given.batch_size):
        results.append(result)
        progress(len(results), total)
    sizes = sorted({result.prompt_tokens for result in results})
    print(
        f"{settings.count} samples of {', '.join(settings.tasks)} in prompts of "
        f"{' to '.join(f'{size:,}' for size in dict.fromkeys((sizes[0], sizes[-1])))} tokens "
        f"({given.model})\n"
    )
    print(f"{needle_table.as_table(settings, results)}\n")
    if given.heads:
        print(f"heads    {Path(given.heads).resolve()}")
    if given.json_out:
        write_whole(given.json_out, json.dumps(needle.as_json(settings, results), indent=1))
        print(f"answers  {given.json_out.resolve()}")
    _say_next(given)


def _needle_grid(
    given: argparse.Namespace, policies: list[str], settings: Any, heads: RetainingHeads | None
) -> None:
    from locret.evaluation import figures, grid, heatmap

    if given.json_out is None:
        raise ValueError("a grid needs --json-out FILE: answers are kept there as they come")
    if given.plot:
        figures.check(given.plot)  # better now than after hours
    asked = grid.GridSettings(
        lengths=tuple(given.lengths),
        depths=given.depths,
        samples_per_cell=1 if given.count is None else given.count,
        needle=settings,
    )
    loaded = load(given)
    record = grid.run_grid(
        loaded,
        policies,
        asked,
        given.json_out,
        heads,
        manifest=grid.manifest_of(loaded, given.heads),
        progress=Progress("asking"),
        batch_size=given.batch_size,
    )
    print(grid.as_table(record))
    print(f"\nanswers  {given.json_out.resolve()}")
    if given.plot:
        print(f"figure   {heatmap.draw(record, given.plot).resolve()}")
    _say_next(given)


def _say_next(given: argparse.Namespace) -> None:
    commands = []
    if given.heads:
        names = ("model", "adapter", "heads")
        named = [(f"--{name}", getattr(given, name)) for name in names if getattr(given, name)]
        words = [word for pair in named for word in pair]
        commands.append(["generate", *words, "--prompt-file", "FILE"])
    if given.json_out:
        commands.append(report_of(given.json_out))
    say_next(commands)
