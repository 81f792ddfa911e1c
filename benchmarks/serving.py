"""Many questions at once about many contexts: `locret serve` beside `transformers serve`.

    python -m benchmarks.serving --model FOLDER --heads checkpoints/qwen25-coder-heads \
        --serve "--budget 8x" --systems locret,continuous --out r.json

Each server runs in a process of its own, within the same part of the GPU's memory:
  locret      contexts are uploaded, then asked by id
  continuous  `transformers serve --continuous-batching`, context and question as one message
  sequential  `transformers serve`, which answers one request after the other
All are asked the same, greedily: every context once for one token (locret: it is uploaded), some of
them alone, one after the other, then all at once, `--rounds` times. Figures:
  read      seconds for a context, the median
  one       tokens/s of an answer asked alone, from request to last token, the median
  all       tokens of all answers by the time from the first request to the last answer, in the
            last round
  x one     all by one
  done      answers of all that came
  alike     of the answers that were asked alone too, those that say the same
  found     answers of all that say the pass key hidden in their context
  peak      GiB that tensors took at most, weights included
  stored    GiB that all contexts take together
  room      contexts that the cache of `transformers serve` can hold at once
The JSON is written after each step, so that a run that is killed leaves what it had.
"""

import argparse
import json
import re
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import record
from benchmarks.columns import cells, heading
from benchmarks.names import some_of
from benchmarks.servers import Failed, Server, running
from locret.system.interrupts import raised
from locret.tasks.synthetic import SyntheticSample, make_sample

MORE = " Write it a hundred times, each time on a line of its own."
"""Behind each question, so that answers are long, and say what was asked all the same."""
ROOM = 128  # tokens for the question and the chat template
WARM_UP = 8  # tokens of an answer that nobody times
CACHE = 0.9  # of free memory: transformers' own share for its cache and activations
NO_TOKEN = 2**30
Row = dict[str, Any]
"""What the JSON holds of one system."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the systems, write the JSON after each step, and print a table in the end."""
    given = _parser().parse_args(args)
    deadline = time.monotonic() + given.max_time
    samples = _samples(given)
    results: list[Row] = []
    with raised():  # a signal ends the servers too
        for name in given.systems:
            row: Row = {"system": name, "status": "ok"}
            results.append(row)
            _run(row, SYSTEMS[name], given, samples, deadline, lambda: _write(given, results))
    print(heading(COLUMNS), *map(_line, results), sep="\n")
    record.write(given.out, vars(given), {"results": results})


def _write(given: argparse.Namespace, results: Sequence[Row]) -> None:
    record.write(given.out, vars(given), {"results": results}, announce=False)


def _samples(given: argparse.Namespace) -> list[SyntheticSample]:
    """Texts that differ, with a pass key each."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokens = given.tokens - given.new_tokens - ROOM
    return [make_sample("passkey", tokens, tokenizer, seed) for seed in range(given.contexts)]


# ---- what is served ------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """A server and how it is asked.

    Attributes:
        module: that is run.
        arguments: of it, made of this benchmark's.
        ready: the path that answers once requests are taken.
        reads: a context is uploaded, and asked by its id.
        to_the_end: what a request says so that no token ends its answer.
    """

    module: str
    arguments: Callable[[argparse.Namespace], list[str]]
    ready: str
    reads: bool = False
    to_the_end: Mapping[str, Any] = field(default_factory=dict)


def _locret(given: argparse.Namespace) -> list[str]:
    heads = ["--heads", given.heads] if given.heads else []
    fixed = ["--batch", str(given.contexts), "--no-ui"]
    memory = ["--memory", f"{given.memory_gib:g}GiB"] if torch.cuda.is_available() else []
    return ["serve", given.model, *heads, *fixed, *memory, *shlex.split(given.serve)]


def _sequential(given: argparse.Namespace) -> list[str]:
    return ["serve", given.model, *shlex.split(given.peer)]


def _continuous(given: argparse.Namespace) -> list[str]:
    limit = ["--cb-max-memory-percent", f"{_share(given):.4f}"] if torch.cuda.is_available() else []
    # The arguments given come last, so that they may say otherwise.
    return ["serve", given.model, "--continuous-batching", *limit, *shlex.split(given.peer)]


def _share(given: argparse.Namespace) -> float:
    """Of the memory that the weights leave free on the whole card, what its cache may take: it
    knows of the card, and nothing of the part of it that this process may use."""
    weights = sum(file.stat().st_size for file in Path(given.model).glob("*.safetensors"))
    whole = torch.cuda.get_device_properties(0).total_memory
    return CACHE * (given.memory_gib * 2**30 - weights) / (whole - weights)


PEER = "transformers.cli.transformers"
UNUSED = {"generation_config": json.dumps({"eos_token_id": NO_TOKEN})}
"""Of `transformers serve`: another token ends an answer, one that does not come."""
SYSTEMS = {
    "locret": System("locret", _locret, "/ready", reads=True, to_the_end={"ignore_eos": True}),
    "continuous": System(PEER, _continuous, "/health", to_the_end=UNUSED),
    "sequential": System(PEER, _sequential, "/health", to_the_end=UNUSED),
}


# ---- what is asked -------------------------------------------------------------------------------


def _run(
    row: Row,
    system: System,
    given: argparse.Namespace,
    samples: Sequence[SyntheticSample],
    deadline: float,
    write: Callable[[], None],
) -> None:
    """One system: what it answered, and its figures, or why there are none."""
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(
            system.module, system.arguments(given), Path(folder), given.memory_gib, deadline
        ) as server,
    ):
        try:
            server.wait(system.ready)
            row["start_seconds"] = time.monotonic() - began
            _say(row, f"serves after {row['start_seconds']:.1f} s")
            asking = Asking(server, system, given, samples)
            for step in asking.steps(row):
                row |= server.peaks | _figures(row)
                write()
                _say(row, step)
        except Failed as error:
            row |= {"status": "failed", "error": str(error)}
        finally:
            row |= server.peaks | _figures(row) | room(server.log, given.tokens)
            row["log"] = server.log[-4000:]
            write()


class Asking:
    """The questions about all contexts, in their order.

    Args:
        server: that answers.
        system: how.
        given: this benchmark's arguments.
        samples: the contexts.
    """

    def __init__(
        self,
        server: Server,
        system: System,
        given: argparse.Namespace,
        samples: Sequence[SyntheticSample],
    ) -> None:
        self.server, self.system, self.given, self.samples = server, system, given, samples
        self.ids: list[str] = []

    def steps(self, row: Row) -> Iterator[str]:
        """Fill the row; yields what was done, in words.

        Raises:
            Failed: a context could not be read, or the time is over.
        """
        row["reading"], row["alone"], row["rounds"] = [], [], []
        for place in range(len(self.samples)):
            row["reading"].append(self.read(place))
            yield f"read {place + 1} of {len(self.samples)}"
        self.ask(0, WARM_UP)
        for place in range(min(self.given.alone, len(self.samples))):
            row["alone"].append(self.ask(place, self.given.new_tokens))
            yield f"asked {place + 1} alone"
        for number in range(self.given.rounds):
            row["rounds"].append(self.ask_all())
            yield f"asked all, {number + 1} of {self.given.rounds} times"

    def read(self, place: int) -> Row:
        """Upload a context, or let it be read for one token.

        Raises:
            Failed: it was refused, or the time is over.
        """
        if not self.system.reads:
            found = self.ask(place, 1)
            if "error" in found:
                raise Failed(found["error"])
            return found
        began = time.monotonic()
        found = self.server.call("/v1/contexts", {"text": self.samples[place].context})
        self.ids.append(found.pop("id"))
        return found | {"seconds": time.monotonic() - began}

    def ask(self, place: int, new_tokens: int) -> Row:
        """What is said about one context, and how long it took; or why nothing."""
        began = time.monotonic()
        try:
            found = self.server.call("/v1/chat/completions", self._body(place, new_tokens))
        except Failed as error:
            return {"error": str(error), "seconds": time.monotonic() - began}
        text = found["choices"][0]["message"]["content"] or ""
        said = {"text": text, "found": self.samples[place].score(text) == 1.0}
        return {"seconds": time.monotonic() - began, **said, **found["usage"]}

    def ask_all(self) -> Row:
        """All contexts at once."""
        places = range(len(self.samples))
        pool = ThreadPoolExecutor(len(places))
        began = time.monotonic()
        try:
            answers = list(pool.map(lambda place: self.ask(place, self.given.new_tokens), places))
        finally:
            pool.shutdown(wait=False)  # a signal ends the server first, then those who wait for it
        return {"seconds": time.monotonic() - began, "answers": answers}

    def _body(self, place: int, new_tokens: int) -> Row:
        sample = self.samples[place]
        question = sample.question + MORE
        content = question if self.ids else f"{sample.context}\n\n{question}"
        body: Row = {
            "model": self.given.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": new_tokens,
            "temperature": 0,
            **self.system.to_the_end,
        }
        return body | ({"context": self.ids[place]} if self.ids else {})


def _say(row: Row, what: str) -> None:
    print(f"{row['system']}: {what}", flush=True)


# ---- figures -------------------------------------------------------------------------------------


def _figures(row: Row) -> Row:
    """Those that can be told so far."""
    figures: Row = {}
    if row.get("reading"):
        read = row["reading"]
        figures["read_seconds"] = statistics.median(each["seconds"] for each in read)
        figures["stored_gib"] = sum(each.get("bytes", 0) for each in read) / 2**30 or None
    alone = [each for each in row.get("alone", ()) if "error" not in each]
    if alone:
        figures["one_per_second"] = statistics.median(
            each["completion_tokens"] / each["seconds"] for each in alone
        )
    if row.get("rounds"):
        figures |= _of_all(row["rounds"][-1], row["alone"])
    if "all_per_second" in figures and alone:
        figures["speed_up"] = figures["all_per_second"] / figures["one_per_second"]
    return figures


def _of_all(last: Row, alone: Sequence[Row]) -> Row:
    done = [each for each in last["answers"] if "error" not in each]
    pairs = list(zip(alone, last["answers"], strict=False))
    return {
        "all_per_second": sum(each["completion_tokens"] for each in done) / last["seconds"],
        "done": len(done),
        "found": sum(each["found"] for each in done),
        "alike": sum("text" in a and a["text"] == b.get("text") for a, b in pairs),
        "asked_alone": len(pairs),
        "errors": sorted({each["error"] for each in last["answers"] if "error" in each}),
    }


def room(log: str, tokens: int) -> Row:
    """Tokens that transformers' cache holds, as its log says, and contexts of so many tokens."""
    found = re.search(r"num_blocks = (\d+).*block_size = (\d+)", log)
    whole = int(found[1]) * int(found[2]) if found else 0
    return {"room_tokens": whole, "room": whole // tokens} if found else {}


COLUMNS = (
    ("system", "<11", "system"),
    ("read", ">8.2f", "read_seconds"),
    ("one", ">8.1f", "one_per_second"),
    ("all", ">8.1f", "all_per_second"),
    ("x one", ">7.2f", "speed_up"),
    ("done", ">5", "done"),
    ("alike", ">6", "alike"),
    ("found", ">6", "found"),
    ("peak", ">7.2f", "peak_gib"),
    ("stored", ">7.2f", "stored_gib"),
    ("room", ">5", "room"),
)
"""Heading, format and the figure's name."""


def _line(row: Row) -> str:
    """A system in one line; one that failed says why."""
    return f"{cells(row, COLUMNS)} {row.get('error', '')[:200]}".rstrip()


# ---- arguments -----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a chat model")
    parser.add_argument("--heads", help="of locret; default: none")
    parser.add_argument("--serve", default="", metavar="ARGUMENTS", help="of locret serve")
    parser.add_argument("--peer", default="", metavar="ARGUMENTS", help="of transformers serve")
    parser.add_argument("--systems", type=some_of(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument(
        "--tokens", type=int, default=32768, help="of a context, its question and its answer"
    )
    parser.add_argument("--new-tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--alone", type=int, default=4, help="contexts that are asked alone too")
    parser.add_argument("--rounds", type=int, default=3, help="times that all are asked at once")
    parser.add_argument("--memory-gib", type=float, default=24.0, help="of the GPU, for a server")
    parser.add_argument("--max-time", type=float, default=3600.0, help="seconds, for everything")
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
