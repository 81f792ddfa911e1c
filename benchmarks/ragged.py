"""Speed and memory where KV heads keep unequal numbers of units, and where they keep 4 x in 3 bits.

    python -m benchmarks.ragged --rows equal,unequal --chunk-size 4096,8192 --out r.json

Every row answers the same random prompt with the same random weights and the same random retaining
heads, so that scoring costs the same; `--budget` is what a head keeps on average. Rows (`ROWS`):
  equal       every head the budget
  unequal     in every layer heads keep from 40 % to 1 % of the layer's units (`falling`)
  layers      the same, and layers are as unequal, by a factor of 25
  one-head    in every layer one head with 83 % of the layer's units
  rotated     every head four times the budget, in 3 bits (`quantization="rotated"`)
  wide        every head four times the budget, in 16 bits
Figures, medians over `--repeats` after a shorter prompt that compiles kernels:
  prefill     seconds from the call to the first new token
  decode      tokens/s over the last `--new-tokens` tokens, which a CUDA graph answers on a GPU
  replayed    of all one-token steps, those that the graph ran
  peak        GiB of the device that tensors took at most, weights included
The JSON is written after each row, so that a run that is killed leaves what it had.
"""

import argparse
import functools
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import floors, record, systems
from benchmarks.answer_clock import AnswerClock, OutOfTime
from benchmarks.columns import cells, heading
from benchmarks.longcontext import empty, numbers, wanted
from benchmarks.names import some_of
from benchmarks.shapes import SHAPES, add_weights, device_and_dtype, random_model
from locret import Engine
from locret.heads.quotas import spread
from locret.model.hooks import cache_of
from locret.policies import POLICIES, LocretPolicy

OK = "ok"
EQUAL = "equal"
Table = list[list[float]]
"""Quotas, [layers][KV heads]."""

FALL_OF_HEADS = 0.61
FALL_OF_LAYERS = 1 / 25
ONE_HEAD = 0.83
STRIDE = 13  # between layers of neighbouring ranks, so that neighbouring layers differ

WARM_STEPS = 8  # tokens before those that are timed: they compile kernels and record the graph


def falling(layers: int, heads: int, of_layers: float = 1.0) -> Table:
    """Quotas that fall geometrically: from head to head of a layer by `FALL_OF_HEADS`, and from the
    layer that keeps most to the one that keeps least, step by step, to `of_layers`.

    With 8 heads a layer's shares go from 40 % to 1 %; with 32 layers and `FALL_OF_LAYERS` the tenth
    of the heads that keeps most has half of everything. Layers rank by their number times `STRIDE`
    modulo how many there are; the largest head of layer l is l modulo the number of heads.
    """
    table = [[0.0] * heads for _ in range(layers)]
    ranked = sorted(range(layers), key=lambda layer: (layer * STRIDE % layers, layer))
    for rank, layer in enumerate(ranked):
        weight = of_layers ** (rank / max(1, layers - 1))
        for place in range(heads):
            table[layer][(layer + place) % heads] = weight * FALL_OF_HEADS**place
    return table


def one_head(layers: int, heads: int) -> Table:
    """In layer l, the head l modulo their number has `ONE_HEAD` of the layer."""
    others = (1 - ONE_HEAD) / max(1, heads - 1)
    return [
        [ONE_HEAD if h == layer % heads else others for h in range(heads)]
        for layer in range(layers)
    ]


@dataclass(frozen=True)
class Kind:
    """What a row keeps.

    Attributes:
        quotas: makes the table for so many layers and KV heads; None = all heads alike.
        times: the budget, so many times.
        quantization: how it is stored.
    """

    quotas: Callable[[int, int], Table] | None = None
    times: int = 1
    quantization: Any = None


ROWS = {
    EQUAL: Kind(),
    "unequal": Kind(falling),
    "layers": Kind(functools.partial(falling, of_layers=FALL_OF_LAYERS)),
    "one-head": Kind(one_head),
    "rotated": Kind(times=4, quantization={"name": "rotated", "key_bits": 3, "value_bits": 3}),
    "wide": Kind(times=4),
}

Row = dict[str, Any]
"""What the JSON holds of one row."""


def main(args: Sequence[str] | None = None) -> None:
    """Run all rows, print a line of each and write the JSON after it."""
    given = _parser().parse_args(args)
    deadline = time.monotonic() + (given.max_time or float("inf"))
    device, dtype = device_and_dtype(given.device, given.dtype)
    machine = floors.measure(device, dtype)
    empty(device)
    bench = Bench(random_model(given.shape, device, dtype, given.weights), machine, given, deadline)
    results: list[Row] = []
    figures = {"machine": asdict(machine), "quotas": bench.tables(), "results": results}
    print(record.hardware(), heading(COLUMNS), sep="\n", flush=True)
    for chunk_size in given.chunk_size:
        for name in given.rows:
            results.append(bench.run(name, chunk_size))
            add_ratios(results)
            print(line(results[-1]), flush=True)
            record.write(given.out, vars(given), figures, announce=False)
    record.write(given.out, vars(given), figures)


@dataclass(frozen=True)
class Bench:
    """One model on one machine."""

    model: Any
    machine: floors.Machine
    given: argparse.Namespace
    deadline: float

    def tables(self) -> dict[str, Any]:
        """The quotas of the rows that have some, and how unequal they are."""
        tables = {name: self._table(name) for name in self.given.rows}
        return {name: {"table": table, **spread(table)} for name, table in tables.items() if table}

    def run(self, name: str, chunk_size: int) -> Row:
        """One row: its figures, or why there are none."""
        kind = ROWS[name]
        row: Row = {"row": name, "chunk_size": chunk_size, "budget": self._budget(name)}
        row["quantization"] = kind.quantization
        if time.monotonic() > self.deadline:
            return row | {"status": "not run: out of time"}
        try:
            row |= self._measured(name, chunk_size)
        except torch.OutOfMemoryError as error:
            row |= {"status": "out of memory"} | wanted(error)
        except OutOfTime as error:
            row |= {"status": "out of time", "error": str(error)}
        except Exception as error:  # one row's failure is a result; the others still run
            traceback.print_exc()
            row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        empty(self.model.device)
        return row

    def _budget(self, name: str) -> int:
        return int(self.given.budget * ROWS[name].times)

    def _table(self, name: str) -> Table | None:
        config, make = self.model.config, ROWS[name].quotas
        return make(config.num_hidden_layers, config.num_key_value_heads) if make else None

    def _engine(self, name: str, chunk_size: int) -> Engine:
        given, heads = self.given, None
        if given.policy == LocretPolicy.name:
            torch.manual_seed(0)
            setting = systems.Setting(given.budget, heads_width=given.heads_width)
            heads = systems.random_heads(self.model, setting)
        return Engine(
            self.model,
            given.policy,
            heads=heads,
            budget=self._budget(name),
            quotas=self._table(name),
            quantization=ROWS[name].quantization,
            chunk_size=chunk_size,
            local_tokens=given.local_tokens,
        )

    def _measured(self, name: str, chunk_size: int) -> Row:
        engine = self._engine(name, chunk_size)
        generator = torch.Generator().manual_seed(self.given.length)
        ids = torch.randint(
            self.model.config.vocab_size, (1, self.given.length), generator=generator
        )
        ids = ids.to(self.model.device)
        short = min(self._budget(name) + 3 * chunk_size, self.given.length)
        warm_up = self._answered(engine, ids[:, :short])
        runs = [self._answered(engine, ids) for _ in range(self.given.repeats)]
        row: Row = {"status": OK, "warm_up_seconds": warm_up["prefill_seconds"], "runs": runs}
        for figure in ("prefill_seconds", "decode_tokens_per_second", "median_step_seconds"):
            row[figure] = statistics.median(run[figure] for run in runs)
        peaks = [run["peak_gib"] for run in runs if run["peak_gib"] is not None]
        row["peak_gib"] = max(peaks, default=None)
        row |= {key: runs[-1][key] for key in HELD}
        return row | self._floors(engine, chunk_size, row["kv_bytes"])

    def _answered(self, engine: Engine, ids: torch.Tensor) -> Row:
        """One timed request."""
        timed = self.given.new_tokens
        clock = AnswerClock(self.model.device, self.deadline)
        engine.progress = clock.check
        record.reset_peak(clock.device)
        clock.start()
        output = engine.generate(
            ids,
            torch.ones_like(ids),  # random tokens: one of them may be the padding token
            streamer=clock,
            max_new_tokens=timed + WARM_STEPS,
            do_sample=False,
            return_dict_in_generate=True,
        )
        record.synchronize(clock.device)
        report = cache_of(output).report(heads=True)
        assert engine.last_steps is not None
        steps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)][-timed:]
        units = sorted(n for layer in report["head_units"] for row in layer for n in row)
        return {
            "prefill_seconds": clock.times[0],
            "decode_tokens_per_second": timed / sum(steps),
            "median_step_seconds": statistics.median(steps),
            **record.peaks_gib(clock.device),
            "kv_bytes": report["kv_bytes"],
            "cache_bytes": report["total_bytes"],
            "units": sum(units) / len(units),
            "most_units": units[-1],
            "least_units": units[0],
            "steps": engine.last_steps._asdict(),
        }

    def _floors(self, engine: Engine, chunk_size: int, kv_bytes: int) -> Row:
        """The least time that what these heads attend to can take."""
        cost, length = floors.cost_of(self.model), self.given.length
        counts = engine.new_cache(length)[1] or ((length,),)  # None: nothing is evicted
        kept = Counter(units for layer in counts for units in layer)
        pairs = [
            floors.attended_pairs(length, units, chunk_size) * heads
            for units, heads in kept.items()
        ]
        step_bytes = cost.read_bytes + kv_bytes
        return {
            "prefill_floor_seconds": cost.prefill_seconds(
                self.machine, length, sum(pairs) // kept.total()
            ),
            "step_floor_seconds": step_bytes / self.machine.bandwidth,
        }


def add_ratios(results: Sequence[Row]) -> None:
    """Add to each row its ratios to `equal` read in chunks of the same size: above 1, this one took
    longer, made more tokens a second, or took more memory."""
    equal = {r["chunk_size"]: r for r in results if r["row"] == EQUAL and r["status"] == OK}
    for row in results:
        base = equal.get(row["chunk_size"])
        if base is None or row["status"] != OK:
            continue
        for ratio, figure in RATIOS.items():
            if base[figure] and row[figure]:
                row[ratio] = row[figure] / base[figure]


# ---- what is printed -----------------------------------------------------------------------------

HELD = ("kv_bytes", "cache_bytes", "units", "most_units", "least_units", "steps")
RATIOS = {
    "prefill_of_equal": "prefill_seconds",
    "decode_of_equal": "decode_tokens_per_second",
    "peak_of_equal": "peak_gib",
}
COLUMNS = (
    ("row", "<9", "row"),
    ("chunk", ">6", "chunk_size"),
    ("prefill", ">9.3f", "prefill_seconds"),
    ("x floor", ">8.2f", "prefill_over_floor"),
    ("x equal", ">8.3f", "prefill_of_equal"),
    ("decode/s", ">9.1f", "decode_tokens_per_second"),
    ("x floor", ">8.2f", "step_over_floor"),
    ("x equal", ">8.3f", "decode_of_equal"),
    ("peak GiB", ">9.2f", "peak_gib"),
    ("x equal", ">8.3f", "peak_of_equal"),
    ("KV MiB", ">8.0f", "kv_mib"),
    ("units", ">7.0f", "units"),
    ("most", ">7", "most_units"),
    ("least", ">6", "least_units"),
    ("replayed", ">10", "replayed"),
)
"""Heading, format and the figure's name."""


def line(row: Row) -> str:
    """A row in one line; one without figures says why there are none."""
    if row["status"] != OK:
        why = str(row.get("wanted") or row.get("error") or "").partition("\n")[0]
        return f"{row['row']:<9} {row['chunk_size']:>6}  {row['status']}  {why}".rstrip()
    steps, rate = row["steps"], row["decode_tokens_per_second"]
    shown = row | {
        "prefill_over_floor": row["prefill_seconds"] / row["prefill_floor_seconds"],
        "step_over_floor": 1 / rate / row["step_floor_seconds"],
        "kv_mib": row["kv_bytes"] / 2**20,
        "replayed": f"{steps['replayed']}/{steps['taken']}",
    }
    return cells(shown, COLUMNS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=some_of(ROWS), default=list(ROWS), help="a list with commas")
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--length", type=int, default=131072, help="tokens of the prompt")
    parser.add_argument(
        "--budget", type=int, default=16384, help="units a KV head keeps on average"
    )
    parser.add_argument("--chunk-size", type=numbers, default=[4096], help="tokens, or a list")
    parser.add_argument("--new-tokens", type=int, default=128, help="that are timed")
    parser.add_argument("--local-tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policy", default="locret", choices=sorted(POLICIES))
    parser.add_argument("--heads-width", type=int, default=1024, help="of random retaining heads")
    parser.add_argument("--max-time", type=float, help="seconds; what is left is not run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    add_weights(parser)
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
