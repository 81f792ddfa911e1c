"""Speed and memory of long prompts: the full cache, kvpress and locret, next to the floors.

    python -m benchmarks.longcontext --shape llama-3.1-8b --length 131072 --budget 16384 \
        --systems full,kvpress,locret --out r.json

Every system answers the same random prompt with the same random weights of the named shape, one
after the other in one process. Figures, medians over `--repeats`:
  first token   seconds from the call to the first new token: the prefill, as a user meets it
  prefill       prompt tokens of all rows by that time
  decode        new tokens of all rows after the first, by the time from the first to the last
  steady        the same by the median step, so that one-off costs of a request do not count
  peak          GiB of the device that tensors took at most, weights included
The JSON holds the arrival of every single token. It is written after each system, so that a run
that is killed leaves what it had. `--length` and `--batch` take lists.
"""

import argparse
import gc
import re
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import chart, floors, record, systems, table
from benchmarks.answer_clock import AnswerClock, OutOfTime
from benchmarks.columns import heading
from benchmarks.names import some_of
from benchmarks.shapes import SHAPES, add_weights, device_and_dtype, random_model
from locret.policies import POLICIES

OK = "ok"
Row = dict[str, Any]
"""What the JSON holds of one system on one kind of prompt."""


def main(args: Sequence[str] | None = None) -> None:
    """Run all settings, print the table and write the JSON after each."""
    given = _parser().parse_args(args)
    deadline = time.monotonic() + (given.max_time or float("inf"))
    if "kvpress" in given.systems:
        systems.snapkv_press()  # missing: better now than after minutes
    bench = _bench(given, deadline)
    results: list[Row] = []
    figures = {
        "machine": asdict(bench.machine),
        "cost": asdict(floors.cost_of(bench.model)),
        "results": results,
    }
    print(heading(table.COLUMNS), flush=True)
    shown = []
    for length, batch, name in _cases(given):
        results.append(bench.run(name, length, batch))
        table.add_ratios(results)
        shown.append(table.line(results[-1]))
        print(shown[-1], flush=True)
        record.write(given.out, vars(given), figures, announce=False)
    lines = [table.line(row) for row in results]
    if lines != shown:  # `full` came late: only now are there ratios to it
        print("", heading(table.COLUMNS), *lines, sep="\n")
    print(*table.remarks(results), sep="\n")
    record.write(given.out, vars(given), figures)
    if given.plot:
        chart.draw(results, given.plot, f"{given.shape}, budget {given.budget}")


def _bench(given: argparse.Namespace, deadline: float) -> "Bench":
    """The machine's rates, then the model on it."""
    device, dtype = device_and_dtype(given.device, given.dtype)
    if device.type == "cuda" and given.memory_limit_gib:
        whole = torch.cuda.get_device_properties(device).total_memory
        share = given.memory_limit_gib * 2**30 / whole
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    machine = floors.measure(device, dtype)
    print(
        f"{record.hardware()}: matrix products {machine.flops / 1e12:.4g} TFLOP/s, "
        f"copies {machine.bandwidth / 1e12:.3g} TB/s",
        flush=True,
    )
    empty(device)
    return Bench(random_model(given.shape, device, dtype, given.weights), machine, given, deadline)


@dataclass(frozen=True)
class Bench:
    """One model on one machine, to be run by every system."""

    model: Any
    machine: floors.Machine
    given: argparse.Namespace
    deadline: float

    def run(self, name: str, length: int, batch: int) -> Row:
        """One system on one kind of prompt: its figures, or why there are none."""
        row = _head(name, length, batch)
        if time.monotonic() > self.deadline:
            return row | {"status": "not run: out of time"}
        try:
            row |= self._measured(name, self._prompt(length, batch))
        except torch.OutOfMemoryError as error:
            row |= {"status": "out of memory"} | wanted(error)
        except OutOfTime as error:
            row |= {"status": "out of time", "error": str(error)}
        except Exception as error:  # one system's failure is a result; the others still run
            traceback.print_exc()
            row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        empty(self.model.device)
        return row

    def _prompt(self, length: int, batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(0, self.model.config.vocab_size, (batch, length), generator=generator)
        return ids.to(self.model.device)

    def _measured(self, name: str, ids: torch.Tensor) -> Row:
        given, device = self.given, self.model.device
        setting = systems.Setting(
            budget=given.budget,
            chunk_size=given.chunk_size,
            new_tokens=given.new_tokens,
            policy=given.policy,
            heads_width=given.heads_width,
            engine=dict(given.engine),
        )
        answer = systems.SYSTEMS[name](self.model, setting)
        clock = AnswerClock(device, self.deadline)
        clock.start()
        answer(ids[:, : given.warm_up or given.budget + 3 * given.chunk_size], clock)
        row: Row = {"status": OK, "warm_up_seconds": clock.times[-1], "runs": []}
        for _ in range(given.repeats):
            try:
                row |= self._once(answer, ids, clock, row["runs"])
            except OutOfTime:
                if not row["runs"]:
                    raise
                break
        return row | self._figures(name, row, ids)

    def _once(
        self,
        answer: systems.Answer,
        ids: torch.Tensor,
        clock: AnswerClock,
        runs: list[Row],
    ) -> Row:
        """Append one timed run; returns what its cache held."""
        record.reset_peak(clock.device)
        clock.start()
        cache = answer(ids, clock)
        record.synchronize(clock.device)
        arrivals = {"token_seconds": [round(t, 6) for t in clock.times]}
        runs.append(arrivals | record.peaks_gib(clock.device))
        return systems.held(cache)

    def _figures(self, name: str, row: Row, ids: torch.Tensor) -> Row:
        batch, length = ids.shape
        cost = floors.cost_of(self.model)
        arrivals = [run["token_seconds"] for run in row["runs"]]
        first = statistics.median(times[0] for times in arrivals)
        chunked = (self.given.budget, self.given.chunk_size) if name == "locret" else ()
        pairs = floors.attended_pairs(length, *chunked)
        figures = {
            "first_token_seconds": first,
            "prefill_tokens_per_second": batch * length / first,
            "microseconds_per_prompt_token": first / (batch * length) * 1e6,
            "prefill_floor_seconds": cost.prefill_seconds(self.machine, length, pairs, batch),
            "step_floor_seconds": cost.step_seconds(self.machine, row["units"], batch),
            "peak_gib": max(
                (run["peak_gib"] for run in row["runs"] if run["peak_gib"]), default=None
            ),
        }
        if len(arrivals[0]) > 1:
            whole = statistics.median((t[-1] - t[0]) / (len(t) - 1) for t in arrivals)
            step = statistics.median(
                b - a for t in arrivals for a, b in zip(t, t[1:], strict=False)
            )
            figures["decode_tokens_per_second"] = batch / whole
            figures["steady_tokens_per_second"] = batch / step
        return figures


def _head(name: str, length: int, batch: int) -> Row:
    return {"system": name, "length": length, "batch": batch}


def _cases(given: argparse.Namespace) -> list[tuple[int, int, str]]:
    return [(n, rows, name) for n in given.length for rows in given.batch for name in given.systems]


def empty(device: torch.device) -> None:
    """Give back what the last system took, so that the next starts as the first."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def wanted(error: BaseException) -> Row:
    """What the allocation that failed had asked for."""
    found = re.search(r"Tried to allocate ([\d.]+) (\w+)", str(error))
    return {"wanted": f"wanted {found[1]} {found[2]} more" if found else None, "error": str(error)}


def numbers(text: str) -> list[int]:
    """The whole numbers of a list with commas."""
    given = [int(part) for part in text.split(",")]
    if min(given) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected numbers above zero")
    return given


def _engine_argument(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if not value:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE")
    words = {"none": None, "true": True, "false": False}
    if value.lower() in words:
        return name, words[value.lower()]
    return name, int(value) if re.fullmatch(r"-?\d+", value) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--length", type=numbers, default=[131072], help="tokens, or a list")
    parser.add_argument("--batch", type=numbers, default=[1], help="rows, or a list")
    parser.add_argument("--budget", type=int, default=16384, help="units a KV head keeps")
    parser.add_argument("--systems", type=some_of(systems.SYSTEMS), default=list(systems.SYSTEMS))
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--warm-up", type=int, help="tokens; default: the budget and 3 chunks")
    parser.add_argument("--chunk-size", type=int, default=1024, help="of locret")
    parser.add_argument("--heads-width", type=int, default=1024, help="of locret")
    parser.add_argument("--policy", default="locret", choices=sorted(POLICIES), help="of locret")
    parser.add_argument(
        "--engine",
        type=_engine_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument of locret.Engine, such as stabilizers=2500",
    )
    parser.add_argument("--memory-limit-gib", type=float, help="of the device, for this process")
    parser.add_argument("--max-time", type=float, help="seconds; what is left is not run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    add_weights(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="a picture over lengths")
    return parser


if __name__ == "__main__":
    main()
