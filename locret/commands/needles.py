"""`python -m locret needle` and `grid`: needles under several policies, at one length or over a map
of lengths and depths; and under policies, bits and budgets at equal bytes.

Both write a configuration of `evaluate`, ask it, and print a table. Answers are kept beside the
file that `--json-out` names, in the folder `NAME.answers`; the same command goes on where it
stopped.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from locret.commands import evaluate
from locret.commands.shared import Listed, add_model, argument, say_next, whole
from locret.policies import POLICIES
from locret.quantities import MOST, parse_tokens
from locret.tasks import GROUPS
from locret.tasks.synthetic import FIRST_SEED, HAYSTACK

FULL_BITS = 16
GENERATE = ("model", "adapter", "heads")


def add_to(commands: Any) -> None:
    _add_needle(commands)
    _add_grid(commands)


def _add_needle(commands: Any) -> None:
    command = commands.add_parser("needle", help="needles under several policies")
    _add_arguments(command, ["full", "streaming_llm", "locret"], ratios=[8], tokens=3000)
    command.add_argument("--json-out", type=Path, help="write the result to this file")
    grid = command.add_argument_group("map of lengths and depths (--json-out is needed)")
    grid.add_argument("--grid", action="store_true", help="ask at --lengths x --depths")
    grid.add_argument(
        "--lengths",
        action=Listed,
        each=parse_tokens,
        help="of the prompts, such as 1024,2K; default 1K,2K,4K",
    )
    grid.add_argument("--depths", type=whole(1), help="default 10")
    grid.add_argument("--plot", type=Path, help="write the maps to this file")
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
    command.add_argument("--json-out", type=Path, required=True, help="the result")
    command.add_argument("--plot", type=Path, help="quality against bytes")
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
    command.add_argument("--haystack", default="noise", help="noise, reference, or a text file")
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
    config = {
        "model": given.model,
        "adapter": given.adapter,
        "heads": given.heads,
        "dtype": given.dtype,
        "device": given.device,
        "tasks": given.tasks,
        "setups": list(setups),
        "full": "full" in given.policies,
        "lengths": [given.tokens],
        "depths": count,
        "limit": count,
        "answer_prefix": not given.no_answer_prefix,
        "max_new_tokens": given.max_new_tokens,
        "seed": given.seed - FIRST_SEED,
        "data": {HAYSTACK: given.haystack},
        # The full cache meets prompts beyond the model's window too, whole: that is what maps show.
        "max_length": MOST,
        "batch_size": given.batch_size,
        "engine": {"chunk_size": 512},
    }
    config |= values
    return {name: value for name, value in config.items() if value is not None}


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
    given: argparse.Namespace,
    config: dict[str, Any],
    draw: Callable[[Mapping[str, Any]], Any] | None = None,
) -> None:
    """Ask a configuration, print its table, and write the files that were asked for; `draw` makes
    the figure of `--plot`."""
    from locret.evaluation.report import check_figure, save_figure
    from locret.system.files import check_file

    check_file(given.json_out, "--json-out")
    if given.plot:
        check_figure(given.plot)
    if given.minutes is not None and given.json_out is None:
        raise ValueError("--minutes needs --json-out FILE: answers are kept beside it")
    with tempfile.TemporaryDirectory() as temporary:
        out: Path | None = given.json_out
        folder = out.with_name(f"{out.stem}.answers") if out else Path(temporary)
        result = _asked(given, config | {"output": str(folder)})
    if given.plot:
        assert draw is not None
        print(f"figure   {save_figure(draw(result), given.plot).resolve()}")
    commands = []
    if given.heads:
        named = [(f"--{name}", getattr(given, name)) for name in GENERATE if getattr(given, name)]
        words = [word for pair in named for word in pair]
        commands.append(["generate", *words, "--prompt-file", "FILE"])
    if given.json_out:
        report = given.json_out.with_name(f"{given.json_out.stem}-report")
        commands.append(["report", str(given.json_out), "--out", str(report)])
    say_next(commands)


def _asked(given: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, Any]:
    """The result, written to `--json-out` and shown."""
    from locret.evaluation import tables
    from locret.evaluation.ask import Ranks
    from locret.evaluation.config import EvalConfig
    from locret.system.files import write_whole

    made = EvalConfig.from_dict(config)
    path = evaluate.ask(made, Ranks.of_environment(), given.processes, given.minutes)
    if path is None:
        raise ValueError("there are answers to give yet: run the same command again")
    text = path.read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(text)
    prompts = [cell["prompt_tokens"] for cell in result["cells"] if cell["prompt_tokens"]]
    print(
        f"{made.limit} samples of {', '.join(made.tasks)} in prompts of up to "
        f"{max((spread['max'] for spread in prompts), default=0):,} tokens ({made.model})\n"
    )
    print(f"{tables.as_text(result)}\n")
    if given.heads:
        print(f"heads    {Path(given.heads).resolve()}")
    if given.json_out:
        write_whole(given.json_out, text)
        print(f"result   {given.json_out.resolve()}")
        print(f"answers  {path.parent.resolve()}")
    return result
