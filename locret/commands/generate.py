"""`python -m locret generate`, `answer` and `plan`: a model used within a budget.

`plan` says what fits into a given memory, from a model's config alone. `generate` answers a prompt
of any length. `answer` answers every prompt of a JSONL file, on this machine or on many: a line has
a "prompt" or "messages", and perhaps a "context", a text that is read once for all lines of a batch
that have it. Answers are appended as they come: the same command goes on where it stopped.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from locret.commands import serve, shared
from locret.commands.progress import Answering, Progress
from locret.commands.shared import path_of
from locret.heads.quotas import quotas_of
from locret.model.hooks import cache_of
from locret.model.loading import load_config
from locret.quantities import parse_bytes, parse_tokens
from locret.system.files import append_json, check_file

ANSWER = "answer"
BESIDE = {"prompts", "output", "batch", "memory", "device", "ray", *serve.REPLICAS, "run"}
"""Arguments of `answer` that no answer depends on."""
Record = dict[str, Any]


def add_to(commands: Any) -> None:
    _add_generate(commands)
    _add_answer(commands)
    _add_plan(commands)


def _add_generate(commands: Any) -> None:
    command = commands.add_parser("generate", help="answer a prompt within a budget")
    shared.add_model(command)
    command.add_argument(
        "--prompt-file", required=True, type=shared.named, help="a text file; - for standard input"
    )
    shared.add_engine(command)
    command.add_argument(
        "--query-aware", action="store_true", help="see the question before the final eviction"
    )
    command.add_argument("--max-new-tokens", type=shared.whole(1), default=128)
    command.add_argument("--raw", action="store_true", help="do not apply the chat template")
    command.add_argument("--json", action="store_true", help="print one JSON object at the end")
    command.set_defaults(run=generate)


def generate(given: argparse.Namespace) -> None:
    """Answer a prompt, and say what the cache took."""
    from transformers import TextStreamer

    # What is cheap to get wrong is checked before a model is loaded.
    text = shared.read_text(given.prompt_file)
    if not text.strip():
        raise ValueError(f"there is no text in {given.prompt_file}; give a prompt")
    checked = shared.checked_engine(given, query_aware=given.query_aware)
    engine, tokenizer = shared.make_engine(given, checked, not given.raw)
    shown = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    counted = Answering(given.max_new_tokens)
    ids = _prompt_ids(tokenizer, text, raw=given.raw).to(engine.model.device)
    started = time.perf_counter()
    with Progress("reading", "tokens") as engine.progress:
        output = engine.generate(
            ids,
            ids.new_ones(ids.shape),  # every token counts, the padding token too
            max_new_tokens=given.max_new_tokens,
            streamer=counted if given.json else shown,
            do_sample=False,
            return_dict_in_generate=True,
        )
    answer = output.sequences[0, ids.shape[1] :]
    result = {
        "answer": tokenizer.decode(answer, skip_special_tokens=True),
        "policy": engine.policy.name,
        "chunk_size": engine.config.reading.chunk,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(answer),
        "seconds": round(time.perf_counter() - started, 3),
        "cache": cache_of(output).report(),
    }
    print(json.dumps(result) if given.json else _summary(result))


def _summary(result: dict[str, Any]) -> str:
    report, heads = result["cache"], ""
    fewest, most = report["least_units"], report["most_units"]
    if fewest != most:  # some hold more than others in their layer
        mean = sum(report["units"]) / len(report["units"])
        heads = f"heads hold {mean:,.0f} units on average, {min(fewest):,} to {max(most):,}; "
    own, full = (
        report[name] / shared.BYTES_PER_MIB for name in ("total_bytes", "full_cache_bytes")
    )
    return (
        f"\n[{result['policy']}: {result['prompt_tokens']} prompt tokens, {result['new_tokens']} "
        f"new ones, {result['seconds']:.1f} s; {heads}cache "
        f"{own:.1f} MiB with room for a longer answer, a full one {full:.1f} MiB]"
    )


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


# ---- every prompt of a file ----------------------------------------------------------------------


def _add_answer(commands: Any) -> None:
    command = commands.add_parser(ANSWER, help="answer every prompt of a JSONL file")
    command.add_argument(
        "prompts", type=shared.named, help='lines such as {"prompt": TEXT}; - for standard input'
    )
    shared.add_model(command)
    shared.add_engine(command)
    flags: list[shared.Flag] = [
        ("--output", path_of, "answers.jsonl", "FILE", "is added to; what it answers is not asked"),
        ("--batch", shared.whole(1), 8, "N", "prompts answered together"),
        ("--max-tokens", shared.whole(1), 256, "N", "of an answer"),
        ("--memory", shared.argument(parse_bytes), None, "SIZE", "the device's"),
    ]
    shared.add_flags(command, flags)
    command.add_argument("--raw", action="store_true", help="do not apply the chat template")
    command.add_argument("--ray", action="store_true", help="by replicas of a Ray cluster")
    serve.add_replicas(command)
    command.set_defaults(run=answer)


def answer(given: argparse.Namespace) -> None:
    """Answer what is not answered yet."""
    serve.check_installed("ray" if given.ray else "serve")
    check_file(given.output, "--output")
    records = _records(given.prompts)
    shared.checked_engine(given)
    asked = {_key(given, line, record): (line, record) for line, record in records}
    done = _answered(given.output)
    left = [
        {"line": line, "key": key, "record": record}
        for key, (line, record) in asked.items()
        if key not in done
    ]
    failed, earlier = 0, len(asked) - len(left)
    answers = (_with_ray if given.ray else _alone)(given, left) if left else ()
    with Progress("answering", "prompts") as progress:
        progress(earlier, len(asked))
        for count, answer in enumerate(answers, start=earlier + 1):
            if "error" in answer:
                failed += 1
                print(f"line {answer['line']}: {answer['error']}", file=sys.stderr)
            else:
                append_json(given.output, [answer])
            progress(count, len(asked))
    if failed:
        raise ValueError(
            f"{failed} of {len(asked)} prompts have no answer; the same command asks them again"
        )
    print(f"{len(asked)} answers in {given.output}, {earlier} of them from earlier")


def _records(source: str) -> list[tuple[int, Record]]:
    """Line numbers and prompts."""
    found = []
    for number, line in enumerate(shared.read_text(source).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {source} is not JSON: {error}") from error
        if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
            raise ValueError(
                f"line {number} of {source} is not a prompt; expected an object with either "
                "prompt or messages"
            )
        if not all(isinstance(record.get(name, ""), str) for name in ("prompt", "context")):
            raise ValueError(f"line {number} of {source}: prompt and context must be texts")
        try:  # JSON may escape what is no character
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"line {number} of {source} holds half of a surrogate pair") from None
        found.append((number, record))
    if not found:
        raise ValueError(f"there are no prompts in {source}; give one JSON object a line")
    return found


def _key(given: argparse.Namespace, line: int, record: Record) -> str:
    """Recognises a prompt and the settings that it is answered with."""
    settings = {name: repr(value) for name, value in vars(given).items() if name not in BESIDE}
    if given.weights is None:  # keys of answers from before there was the option
        del settings["weights"]
    text = json.dumps([settings, line, record], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _answered(path: Path) -> set[str]:
    """Keys of the answers in a file; a line that was not written to its end has none."""
    found = set()
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            found.add(str(json.loads(line)["key"]))
        except (ValueError, TypeError, KeyError):
            continue
    return found


def _alone(given: argparse.Namespace, asked: Sequence[Record]) -> Iterator[Record]:
    answerer = Answerer(given)
    try:
        for start in range(0, len(asked), given.batch):
            yield from answerer.answer(asked[start : start + given.batch])
    finally:
        answerer.service.close(drain=False)


def _with_ray(given: argparse.Namespace, asked: Sequence[Record]) -> Iterator[Record]:
    """In any order, as replicas answer."""
    serve.connect_to_ray()
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    DataContext.get_current().enable_progress_bars = False  # there is one for all commands
    # As texts: tables have one type a column, and records may have any fields. A block is given
    # back when all of it is answered, so that one is a batch.
    rows = ray.data.from_items(
        [{"asked": json.dumps(each)} for each in asked],
        override_num_blocks=-(-len(asked) // given.batch),
    )
    answered = rows.map_batches(
        Answerer,
        fn_constructor_args=(given,),
        batch_size=given.batch,
        compute=ActorPoolStrategy(size=given.replicas),
        num_cpus=given.cpus,
        num_gpus=serve.gpus_of(given),
    )
    try:
        for row in answered.iter_rows():
            yield json.loads(row["answered"])
    finally:
        ray.shutdown()


class Answerer:
    """Answers batches by the arguments of the command; under Ray, an actor."""

    def __init__(self, given: argparse.Namespace) -> None:
        from locret.serve.contexts import Contexts
        from locret.serve.fields import Prompts

        settings = argparse.Namespace(**vars(given), queue=given.batch)
        self.service = serve.make_service(settings, shared.checked_engine(given), Contexts())
        self.service.start()
        self.prompts = Prompts(self.service.tokenizer)
        self.raw = given.raw or not self.service.tokenizer.chat_template
        self._contexts: dict[str, str] = {}  # id by text

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """As Ray calls it, with texts."""
        answers = self.answer([json.loads(str(each)) for each in batch["asked"]])
        return {"answered": [json.dumps(answer) for answer in answers]}

    def answer(self, asked: Sequence[Record]) -> list[Record]:
        """Answers to prompts, or for some an "error"."""
        for text in self._contexts.keys() - {each["record"].get("context") for each in asked}:
            self.service.contexts.delete(self._contexts.pop(text))
        asks = [_tried(self._ask, each["record"]) for each in asked]
        answers = [_tried(self.service.ask, ask) for ask in asks]  # at once, to be asked together
        results = [_tried(_result, answer) for answer in answers]
        return [_line(*pair) for pair in zip(asked, results, strict=True)]

    def _ask(self, record: Record) -> Any:
        from locret.serve.fields import ChatFields, fields_of
        from locret.serve.requests import Ask

        context = self._read(record["context"]) if record.get("context") else None
        if self.raw and "prompt" in record:
            ids = self.prompts.completion(record["prompt"], follows=context is not None)
            return Ask(prompt=ids, context=context)
        messages = record.get("messages", [{"role": "user", "content": record.get("prompt")}])
        fields = {"messages": messages, "context": context, "temperature": 0}
        return fields_of(ChatFields, fields).ask(self.prompts)

    def _read(self, text: str) -> str:
        """The id of a context, which is read if it was not."""
        if text not in self._contexts:
            raw = self.prompts.completion
            message = {"role": "user", "content": text}
            ids = raw(text) if self.raw else self.prompts.context([message])
            self._contexts[text] = self.service.read(ids).result().id
        return self._contexts[text]


def _tried(do: Callable[[Any], Any], value: Any) -> Any:
    """The result of a step, or why there is none: what failed before is passed on."""
    from locret.serve.replies import Refused

    if isinstance(value, Exception):
        return value
    try:
        return do(value)
    except (Refused, ValueError, RuntimeError) as error:
        return error


def _line(asked: Record, result: Any) -> Record:
    """What is written of a prompt and its result."""
    if isinstance(result, Exception):
        result = {"error": str(result)}
    named = {"id": asked["record"]["id"]} if "id" in asked["record"] else {}
    return {"line": asked["line"], **named, **result, "key": asked["key"]}


def _result(answer: Any) -> Record:
    from locret.serve.replies import usage_of

    *pieces, end = answer.events()
    text = "".join(piece.text for piece in pieces)
    return {"answer": text, "finish_reason": end.reason, "usage": usage_of(end.usage)}


# ---- what fits ----------------------------------------------------------------------------------


def _add_plan(commands: Any) -> None:
    command = commands.add_parser("plan", help="what fits into a given memory")
    command.add_argument("--model", required=True, type=shared.named, help=shared.MODEL)
    command.add_argument("--revision", help="of the Hub repository")
    command.add_argument(
        "--memory", required=True, type=shared.argument(parse_bytes), help="such as 24GiB"
    )
    command.add_argument(
        "--context", required=True, type=shared.argument(parse_tokens), help="tokens, such as 128K"
    )
    command.add_argument(
        "--chunk-size",
        type=shared.chunk_size,
        default="auto",
        metavar="N",
        help="tokens read at a time; none: all at once; auto, the default, and recorded, as there "
        "are no heads here: the fastest",
    )
    command.add_argument(
        "--new-tokens", type=shared.whole(0), help="answer tokens to leave room for"
    )
    command.add_argument(
        "--head-width", type=shared.whole(0), help="of the retaining heads; 0 = none"
    )
    command.add_argument(
        "--quotas", type=shared.argument(quotas_of), help="of unequal heads: a .json or .npy file"
    )
    command.add_argument("--dtype", choices=shared.DTYPES)
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    command.set_defaults(run=plan)


def plan(given: argparse.Namespace) -> None:
    import torch

    from locret.engine.plan import as_text, make_plan

    names = ("memory", "context", "quotas", "chunk_size")
    asked = {name: getattr(given, name) for name in names}
    for name in ("new_tokens", "head_width"):
        if getattr(given, name) is not None:
            asked[name] = getattr(given, name)
    config = load_config(given.model, revision=given.revision)
    dtype = getattr(torch, given.dtype) if given.dtype else None
    made = make_plan(config, dtype=dtype, **asked)
    print(json.dumps(asdict(made)) if given.json else as_text(made, given.model))
