"""Command line: `python -m locret COMMAND --help`.

generate   answer a prompt of any length within a budget
needle     needle in a haystack under several policies, at one length or over a grid
grid       policies, bits and budgets at equal bytes, on synthetic retrieval
evaluate   benchmarks under several policies and budgets, with a manifest
reproduce  small slices of committed results again, on a CPU
lm_eval    lm-evaluation-harness with `--model locret` and our task files
convert    between the artifact folder and the released .bin format
inspect    what an artifact records, and whether its weights look sound
push       an artifact to the Hugging Face Hub
report     tables and figures of many results, as Markdown and HTML
plan       what fits into a given memory, from a model's config alone
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locret import artifact, hub
from locret.heads import RetainingHeads
from locret.models import LoadedModel, load_config, load_model
from locret.policies import POLICIES

HARNESS = "lm_eval"
BYTES_PER_MIB = 2**20
CARD_LINES = 16  # of the card, shown before a push
ODD_RATIO = 10  # norms further than this from the layers' median are remarked on


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors of the user print one line to stderr."""
    given = _parsed(sys.argv[1:] if args is None else args)
    try:
        given.run(given)
    except (ValueError, OSError) as error:
        print(f"locret {given.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _parsed(args: Sequence[str]) -> argparse.Namespace:
    if args[:1] == [HARNESS]:  # its arguments are the harness's own
        return argparse.Namespace(command=HARNESS, run=lambda _: _lm_eval(args[1:]))
    return _parser().parse_args(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="locret", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_generate(commands)
    _add_needle(commands)
    _add_grid(commands)
    _add_evaluate(commands)
    _add_convert(commands)
    _add_inspect(commands)
    _add_push(commands)
    _add_report(commands)
    _add_plan(commands)
    return parser


def _add_generate(commands: Any) -> None:
    command = commands.add_parser("generate", help="answer a prompt within a budget")
    _add_model(command)
    command.add_argument("--prompt-file", required=True, help="a text file; - for standard input")
    command.add_argument("--policy", default=None, choices=sorted(POLICIES))
    auto = {"type": _setting, "default": "auto", "metavar": "N"}
    command.add_argument("--budget", **auto, help="units a KV head keeps, or none")
    command.add_argument("--chunk-size", **auto, help="tokens read at a time, or none")
    command.add_argument("--stabilizers", **auto, help="last units that survive evictions")
    command.add_argument("--local-tokens", **auto, help="last tokens, read after the evictions")
    command.add_argument("--max-new-tokens", type=int, default=128)
    command.add_argument("--raw", action="store_true", help="do not apply the chat template")
    command.add_argument("--json", action="store_true", help="print one JSON object at the end")
    command.set_defaults(run=_generate)


def _add_needle(commands: Any) -> None:
    command = commands.add_parser("needle", help="needles under several policies")
    _add_model(command)
    command.add_argument(
        "--policies", nargs="+", type=_names, default=[["full", "streaming_llm", "locret"]]
    )
    command.add_argument("--tasks", nargs="+", default=["niah_single"])
    command.add_argument("--tokens", type=int, default=3000, help="length of the prompts")
    command.add_argument("--count", type=int, help="samples a task, spread over depths")
    command.add_argument("--ratios", nargs="+", type=int, default=[8], help="tokens a budget unit")
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
    grid.add_argument("--lengths", default="1K,2K,4K", help="of the prompts, such as 1024,2K")
    grid.add_argument("--depths", type=int, default=10)
    grid.add_argument("--plot", type=Path, help="write the heat maps to this file")
    command.set_defaults(run=_needle)


def _add_grid(commands: Any) -> None:
    from locret.evaluation import byte_grid_command

    command = commands.add_parser("grid", help="policies, bits and budgets at equal bytes")
    _add_model(command)
    byte_grid_command.add_arguments(command)

    def run(given: argparse.Namespace) -> None:
        byte_grid_command.run(given, lambda: (_load_model(given), _load_heads(given)), _Bar)

    command.set_defaults(run=run)


def _add_evaluate(commands: Any) -> None:
    from locret.evaluation import command, reproduce_command

    added = commands.add_parser("evaluate", help="benchmarks under several policies and budgets")
    command.add_arguments(added)
    added.set_defaults(run=lambda given: command.run(given, _Bar))
    again = commands.add_parser("reproduce", help="run slices of committed results again")
    reproduce_command.add_arguments(again)
    again.set_defaults(run=lambda given: reproduce_command.run(given, _Bar))
    commands.add_parser(HARNESS, help="lm-evaluation-harness with --model locret")


def _lm_eval(args: Sequence[str]) -> None:
    from locret.evaluation import harness_command

    harness_command.run(args)


def _add_convert(commands: Any) -> None:
    command = commands.add_parser("convert", help="artifact folder <-> released .bin")
    command.add_argument("source", help="a folder, a .bin file, or a Hub id")
    command.add_argument("target", type=Path, help="a .bin file to write, or else a folder")
    command.set_defaults(run=_convert)


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser("inspect", help="print an artifact's record and figures")
    command.add_argument("source", help="a folder, a .bin file, or a Hub id")
    command.add_argument("--revision", help="of the Hub repository")
    command.add_argument("--token", help="for a private Hub repository")
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    command.set_defaults(run=_inspect)


def _add_push(commands: Any) -> None:
    command = commands.add_parser("push", help="upload an artifact folder to the Hub")
    command.add_argument("folder", type=Path, help="an artifact folder")
    command.add_argument("repo_id", help="OWNER/NAME; made if it does not exist")
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.add_argument("--dry-run", action="store_true", help="only show what would be uploaded")
    command.add_argument("--token", help="default: HF_TOKEN, or what `hf auth login` stored")
    command.add_argument("--revision", "--branch", help="commit to this branch, made if need be")
    command.set_defaults(run=_push)


def _add_report(commands: Any) -> None:
    command = commands.add_parser("report", help="tables and figures of many results")
    command.add_argument("results", nargs="+", help="JSON files of results")
    command.add_argument("--out", type=Path, required=True, help="folder to write to")
    command.add_argument("--title", default="Results")
    command.set_defaults(run=_report)


def _add_plan(commands: Any) -> None:
    command = commands.add_parser("plan", help="what fits into a given memory")
    command.add_argument("--model", required=True, help="Hub id, folder, or embedded:smollm2")
    command.add_argument("--revision", help="of the Hub repository")
    command.add_argument("--memory", required=True, help="such as 24GiB")
    command.add_argument("--context", required=True, help="tokens, such as 128K")
    command.add_argument("--chunk-size", type=int, help="tokens read at a time")
    command.add_argument("--new-tokens", type=int, help="answer tokens to leave room for")
    command.add_argument("--head-width", type=int, help="of the retaining heads; 0 = none")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    command.set_defaults(run=_plan)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="Hub id, folder, or embedded:smollm2")
    command.add_argument("--heads", help="artifact folder, .bin file, or Hub id")
    command.add_argument("--adapter", help="PEFT adapter of the model: folder or Hub id")
    command.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    command.add_argument("--device", default=None)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _setting(text: str) -> int | None | str:
    """An engine setting: a number, none, or auto (what the heads record, else the paper's)."""
    words: dict[str, str | None] = {"none": None, "auto": "auto"}
    return words[text.lower()] if text.lower() in words else int(text)


def _load_heads(given: argparse.Namespace) -> RetainingHeads | None:
    return RetainingHeads.from_pretrained(given.heads) if given.heads else None


def _load_model(given: argparse.Namespace) -> LoadedModel:
    return load_model(given.model, dtype=given.dtype, device=given.device, adapter=given.adapter)


def _generate(given: argparse.Namespace) -> None:
    from transformers import TextStreamer

    from locret.generation import Engine

    # What is cheap to get wrong is checked before a model is loaded.
    text = sys.stdin.read() if given.prompt_file == "-" else _read_text(given.prompt_file)
    heads = _load_heads(given)
    loaded = _load_model(given)
    engine = Engine(
        loaded.model,
        given.policy or ("locret" if heads else "full"),
        heads=heads,
        budget=given.budget,
        chunk_size=given.chunk_size,
        stabilizers=given.stabilizers,
        local_tokens=given.local_tokens,
        progress=_Bar("reading"),
    )
    ids = _prompt_ids(loaded.tokenizer, text, raw=given.raw).to(loaded.model.device)
    started = time.perf_counter()
    output = engine.generate(
        ids,
        max_new_tokens=given.max_new_tokens,
        streamer=None if given.json else TextStreamer(loaded.tokenizer, skip_prompt=True),
        do_sample=False,
        return_dict_in_generate=True,
    )
    answer = output.sequences[0, ids.shape[1] :]
    result = {
        "answer": loaded.tokenizer.decode(answer, skip_special_tokens=True),
        "policy": engine.policy.name,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(answer),
        "seconds": round(time.perf_counter() - started, 3),
        "cache": output.past_key_values.report(),
    }
    print(json.dumps(result) if given.json else _generate_summary(result))


def _generate_summary(result: dict[str, Any]) -> str:
    report = result["cache"]
    return (
        f"\n[{result['policy']}: {result['prompt_tokens']} prompt tokens, {result['new_tokens']} "
        f"new ones, {result['seconds']:.1f} s; cache {report['total_bytes'] / BYTES_PER_MIB:.1f} "
        f"MiB, a full one {report['full_cache_bytes'] / BYTES_PER_MIB:.1f} MiB]"
    )


def _needle(given: argparse.Namespace) -> None:
    from locret.evaluation import needle

    policies = [name for names in given.policies for name in names]
    unknown = sorted(set(policies) - set(POLICIES))
    if unknown:
        raise ValueError(f"policies {unknown} are unknown; expected some of {sorted(POLICIES)}")
    if not given.heads and "locret" in policies:
        raise ValueError("policy locret needs --heads; train some with python -m trainers.fit")
    if given.batch_size < 1:
        raise ValueError(f"batch_size is {given.batch_size}; expected at least 1")
    settings = needle.NeedleSettings(
        tasks=tuple(given.tasks),
        tokens=given.tokens,
        count=given.count or needle.NeedleSettings.count,
        ratios=tuple(given.ratios),
        seed=given.seed,
        haystack=None if given.haystack == "reference" else given.haystack,
        answer_prefix=not given.no_answer_prefix,
        max_new_tokens=given.max_new_tokens,
    )
    heads = _load_heads(given)
    if given.grid:
        _needle_grid(given, policies, settings, heads)
        return
    loaded = _load_model(given)
    total = len(needle.runs(policies, settings.ratios)) * settings.count * len(settings.tasks)
    bar, results = _Bar("asking"), []
    for result in needle.run_needles(loaded, policies, settings, heads, given.batch_size):
        results.append(result)
        bar(len(results), total)
    print(
        f"{settings.count} samples of {', '.join(settings.tasks)} in prompts of "
        f"{results[0].prompt_tokens} tokens ({given.model})\n"
    )
    print(needle.as_table(needle.summarize(results)))
    if given.heads:
        print(f"\nheads    {Path(given.heads).resolve()}")
    if given.json_out:
        given.json_out.parent.mkdir(parents=True, exist_ok=True)
        given.json_out.write_text(json.dumps(needle.as_json(settings, results), indent=1))
        print(f"answers  {given.json_out.resolve()}")


def _needle_grid(
    given: argparse.Namespace, policies: list[str], settings: Any, heads: RetainingHeads | None
) -> None:
    from locret.evaluation import figures, grid, heatmap
    from locret.quantities import parse_tokens

    if given.json_out is None:
        raise ValueError("a grid needs --json-out FILE: answers are kept there as they come")
    if given.plot:
        figures.plotting()  # missing: better now than after hours
    asked = grid.GridSettings(
        lengths=tuple(parse_tokens(length) for length in given.lengths.split(",")),
        depths=given.depths,
        samples_per_cell=given.count or 1,
        needle=settings,
    )
    loaded = _load_model(given)
    record = grid.run_grid(
        loaded,
        policies,
        asked,
        given.json_out,
        heads,
        manifest=grid.manifest_of(loaded, given.heads),
        progress=_Bar("asking"),
        batch_size=given.batch_size,
    )
    print(grid.as_table(record))
    print(f"\nanswers  {given.json_out.resolve()}")
    if given.plot:
        print(f"figure   {heatmap.draw(record, given.plot).resolve()}")


def _convert(given: argparse.Namespace) -> None:
    heads = RetainingHeads.from_pretrained(given.source)
    save = heads.save_released if given.target.suffix == ".bin" else heads.save_pretrained
    written = save(given.target)
    print(f"wrote {written}: {heads.config.num_layers} layers, width {heads.config.width}")


def _inspect(given: argparse.Namespace) -> None:
    path = artifact.locate(given.source, revision=given.revision, token=given.token)
    heads = RetainingHeads.from_pretrained(path)
    found = artifact.inventory(path, heads.state_dict())
    if given.json:
        print(json.dumps({"source": given.source, "record": heads.config.to_dict(), **found}))
        return
    rows = heads.config.to_dict() | {
        "parameters": f"{found['parameters']:,}",
        "weights": f"{', '.join(found['dtypes'])}, {_size(found['bytes'])}",
        "files": {name: _size(size) for name, size in found["files"].items()},
    }
    for name, value in rows.items():
        print(f"{name:<18} {_words(value)}")
    print("\nlayer   norm fc1   norm fc2")
    for layer in found["layers"]:
        print(f"{layer['layer']:>5} {layer['fc1']:>10.4g} {layer['fc2']:>10.4g}", end="")
        print(f"   {_remark(layer, found['layers'])}".rstrip())


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _remark(layer: dict[str, Any], layers: list[dict[str, Any]]) -> str:
    """What is odd about the norms of a layer beside those of the others."""
    odd = []
    for name in ("fc1", "fc2"):
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
        address = artifact.push(
            given.repo_id,
            given.folder,
            private=given.private,
            token=given.token,
            revision=given.revision,
        )
        print(f"pushed {len(files)} files to {address}")


def _report(given: argparse.Namespace) -> None:
    from locret.evaluation.report import MARKDOWN, make_report

    page = make_report(given.results, given.out, given.title)
    print(f"report   {page.with_name(MARKDOWN).resolve()}")
    print(f"page     {page.resolve()}")


def _plan(given: argparse.Namespace) -> None:
    import torch

    from locret import plan
    from locret.quantities import parse_bytes, parse_tokens

    asked = {"memory": parse_bytes(given.memory), "context": parse_tokens(given.context)}
    for name in ("chunk_size", "new_tokens", "head_width"):
        if getattr(given, name) is not None:
            asked[name] = getattr(given, name)
    config = load_config(given.model, revision=given.revision)
    dtype = getattr(torch, given.dtype) if given.dtype else None
    made = plan.make_plan(config, dtype=dtype, **asked)
    print(json.dumps(made.to_dict()) if given.json else plan.as_text(made, given.model))


def _upload_plan(
    given: argparse.Namespace, files: list[hub.Upload], left_out: dict[str, str]
) -> str:
    visibility = "private" if given.private else "public"
    own = artifact.has_own_card(given.folder)
    lines = [
        f"would go to {hub.address(given.repo_id)} in one commit ({visibility} if it is made new, "
        f"branch {given.revision or 'main'}):",
        *(f"  {file.name:<24} {_size(file.size):>10}" for file in files),
        *(f"  {name:<24} {'stays':>10}: {reason}" for name, reason in left_out.items()),
        f"the card, {'your own' if own else 'generated'}, begins:",
    ]
    card = files[0].content
    assert isinstance(card, bytes)
    shown = card.decode("utf-8", errors="replace").splitlines()[:CARD_LINES]
    return "\n".join([*lines, *(f"  | {line}" for line in shown)])


def _size(size: int) -> str:
    if size < BYTES_PER_MIB:
        return f"{size:,} B"
    return f"{size / BYTES_PER_MIB:,.1f} MiB"


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _prompt_ids(tokenizer: Any, text: str, raw: bool) -> Any:
    import torch

    if not raw and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text)["input_ids"]
    return torch.tensor([ids], dtype=torch.long)


class _Bar:
    """A progress bar on stderr; silent where stderr is no terminal."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=total, desc=self.label, disable=None, leave=False)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()
            self.bar = None


if __name__ == "__main__":
    sys.exit(main())
