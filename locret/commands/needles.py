"""What `needle` and `grid` share: they write a configuration of `evaluate`, ask it, and
print a table of needles.

Answers are kept beside the file that `--json-out` names, in the folder `NAME.answers`; the same
command goes on where it stopped.
"""

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from locret.commands.progress import asking
from locret.commands.shared import Listed, add_model, argument, report_of, say_next, whole
from locret.policies import POLICIES
from locret.quantities import MOST, parse_tokens
from locret.tasks import GROUPS
from locret.tasks.needle import FIRST_SEED, HAYSTACK

GENERATE = ("model", "adapter", "heads")


def add_arguments(
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


def config_of(
    given: argparse.Namespace, setups: Sequence[Mapping[str, Any]], **values: Any
) -> dict[str, Any]:
    """A configuration of `evaluate` with these setups, and values of its own.

    Raises:
        ValueError: an unknown policy, or `locret` without heads.
    """
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


def setups_of(
    policies: Sequence[str], budgets: Sequence[str], **values: Any
) -> list[dict[str, Any]]:
    """A setup for every policy, at every budget if it evicts."""
    return [
        {"policy": policy, **({"budget": list(budgets)} if _evicts(policy) else {}), **values}
        for policy in policies
    ]


def _evicts(policy: str) -> bool:
    return policy not in POLICIES or POLICIES[policy].evicts


def ask(
    given: argparse.Namespace,
    config: dict[str, Any],
    draw: Callable[[Mapping[str, Any]], Any] | None = None,
) -> None:
    """Ask a configuration, print its table, and write the files that were asked for.

    Args:
        draw: makes the figure of `--plot`.

    Raises:
        ValueError: it cannot be asked, or files cannot be written; before anything is asked.
    """
    from locret.evaluation import figures
    from locret.system.files import check_file

    check_file(given.json_out, "--json-out")
    if given.plot:
        figures.check(given.plot)
    if given.minutes is not None and given.json_out is None:
        raise ValueError("--minutes needs --json-out FILE: answers are kept beside it")
    with tempfile.TemporaryDirectory() as temporary:
        out: Path | None = given.json_out
        folder = out.with_name(f"{out.stem}.answers") if out else Path(temporary)
        result = _asked(given, config | {"output": str(folder)})
    if given.plot:
        assert draw is not None
        print(f"figure   {figures.save(draw(result), given.plot).resolve()}")
    _say_next(given)


def _asked(given: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, Any]:
    """The result, written to `--json-out` and shown.

    Raises:
        ValueError: there are answers to give yet.
    """
    from locret.evaluation import evaluate, tables
    from locret.evaluation.config import EvalConfig
    from locret.evaluation.processes import Ranks
    from locret.system.files import write_whole

    ranks = Ranks.of_environment()
    command = "python -m locret " + shlex.join(sys.argv[1:])
    made = EvalConfig.from_dict(config)
    with asking(ranks.rank) as progress:
        path = evaluate.run(made, command, ranks, progress, given.processes, given.minutes)
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


def _say_next(given: argparse.Namespace) -> None:
    commands = []
    if given.heads:
        named = [(f"--{name}", getattr(given, name)) for name in GENERATE if getattr(given, name)]
        words = [word for pair in named for word in pair]
        commands.append(["generate", *words, "--prompt-file", "FILE"])
    if given.json_out:
        commands.append(report_of(given.json_out))
    say_next(commands)
