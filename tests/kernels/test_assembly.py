"""The assembly that expands packed codes, executed here instruction by instruction."""

import re

import numpy as np
import pytest

from locret.kernels import decode_kivi, rotated_levels
from locret.kernels.decode_general import _assembly
from tests.kernels.rotated import LEVELS


def as_halves(register):
    return np.array([register], np.uint32).view(np.float16).astype(np.float64)


def as_register(halves):
    return int(halves.astype(np.float16).view(np.uint32)[0])


def permuted(low, high, selector):
    source = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    chosen = (source[n & 7] if n < 8 else 255 * (source[n & 7] >> 7) for n in nibbles)
    return int.from_bytes(bytes(chosen), "little")


def looked_up(a, b, c, table):
    bits = (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1 for i in range(32))
    return sum(bit << i for i, bit in enumerate(bits))


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "prmt.b32": permuted,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, count: a << count & 0xFFFFFFFF,
    "shr.b32": lambda a, count: a >> count,
    "shf.r.wrap.b32": lambda a, b, count: (a | b << 32) >> (count & 31) & 0xFFFFFFFF,
    "mad.lo.u32": lambda a, b, c: a * b + c & 0xFFFFFFFF,
    "sub.u32": lambda a, b: a - b & 0xFFFFFFFF,
    "lop3.b32": looked_up,
    "sub.f16x2": lambda a, b: as_register(as_halves(a) - as_halves(b)),
    "fma.rn.f16x2": lambda a, b, c: as_register(as_halves(a) * as_halves(b) + as_halves(c)),
}


def execute(assembly, registers, results=("$0", "$1")):
    for line in re.findall(r"[^{};]*;", assembly):
        name, operands = line.strip(" \n;").split(None, 1)
        if name != ".reg":
            target, *sources = (operand.strip() for operand in operands.split(","))
            values = [registers[s] if s in registers else int(s, 0) for s in sources]
            registers[target] = INSTRUCTIONS[name](*values)
    return np.array([registers[name] for name in results], np.uint32).view(np.float16)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_plane_gives_minimum_plus_scale_times_code(bits):
    random = np.random.default_rng(0)
    for plane, assembly in enumerate(_assembly(bits)):
        for _ in range(20):
            packed = random.integers(0, 256, 4, dtype=np.uint8)
            scale, minimum = random.standard_normal((2, 4)).astype(np.float16)
            given = np.concatenate([x.view(np.uint32) for x in (packed, scale, minimum)])
            result = execute(assembly, {f"${i}": int(r) for i, r in enumerate(given, start=2)})
            code = packed >> plane * bits & 2**bits - 1
            exact = minimum.astype(np.float64) + scale.astype(np.float64) * code
            assert (result == exact.astype(np.float16)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_of_small_queries_lie_below_the_normal_range(bits):
    random = np.random.default_rng(0)
    *planes, low, high = decode_kivi.assembly(bits)
    for i, assembly in enumerate(planes):
        plane, parity = divmod(i, 2)
        packed = random.integers(0, 256, 4, dtype=np.uint8)
        result = execute(assembly, {"$1": int(packed.view(np.uint32)[0])}, ["$0"])
        code = packed[parity::2].astype(np.float64) // 2 ** (plane * bits) % 2**bits
        assert (result == code * 2.0 ** (plane * bits - 24)).all()
    table = random.standard_normal(4).astype(np.float16)
    registers = {f"${i}": int(r) for i, r in enumerate(table.view(np.uint32), start=1)}
    assert (execute(low, dict(registers), ["$0"]) == table[::2]).all()
    assert (execute(high, dict(registers), ["$0"]) == table[1::2]).all()


def all_levels(bits):
    upper = LEVELS[bits]
    return np.array([-level for level in reversed(upper)] + list(upper)).astype(np.float16)


def tables(assembly):
    registers = {"%lanemask_lt": 0b111, "%lanemask_eq": 0b1000}
    execute(assembly, registers)
    return [registers[f"${i}"] for i in range(5)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0, 1])
def test_codes_of_rotated_keys_become_levels_of_two_bytes(bits, shift):
    random, chunks = np.random.default_rng(0), 8 // (bits - bits % 2)
    assembly, operands, table = rotated_levels.key_assembly(LEVELS[bits])
    count = operands.count("=&r")
    for _ in range(20):
        packed, high = random.integers(0, 256, (2, 4), dtype=np.uint8)
        given = [*(int(x.view(np.uint32)[0]) for x in (packed, high)), shift, *tables(table)]
        registers = {f"${count + i}": x for i, x in enumerate(given)}
        assert operands.count(",") + 1 == count + len(given)
        result = execute(assembly, registers, [f"${i}" for i in range(count)])
        expected = [level_of(packed, high >> shift, bits, chunk) for chunk in range(chunks)]
        assert (result == np.concatenate(expected)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shift", "pick"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("size", [64, 128])
def test_codes_of_rotated_values_become_levels_of_two_units(bits, shift, pick, size):
    random, chunks = np.random.default_rng(0), 8 // (bits - bits % 2)
    assembly, operands, table = rotated_levels.value_assembly(LEVELS[bits], size)
    count = operands.count("=&r")
    few = count < 4 * chunks
    for _ in range(20):
        packed, high = random.integers(0, 256, (2, 2, 4), dtype=np.uint8)
        words = [int(x) for x in np.concatenate([packed, high]).view(np.uint32)[:, 0]]
        given = [*words, shift, pick, *tables(table)]
        registers = {f"${count + i}": x for i, x in enumerate(given)}
        assert operands.count(",") + 1 == count + len(given)
        result = execute(assembly, registers, [f"${i}" for i in range(count)])
        used = slice(2 * pick, 2 * pick + 2) if few else slice(4)
        expected = [
            level_of(packed[:, used].T, high[:, used].T >> shift, bits, chunk)
            for chunk in range(chunks)
        ]
        assert (result == np.concatenate(expected).flatten()).all()


def level_of(packed, high, bits, chunk):
    if bits == 3:
        return all_levels(3)[(packed >> 2 * chunk & 3) | (high >> 2 * chunk & 1) << 2]
    return all_levels(bits)[packed >> chunk * bits & 2**bits - 1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_of_rotated_units_become_their_levels(bits):
    random = np.random.default_rng(0)
    chunks = rotated_levels.chunk_assembly(LEVELS[bits])[: 8 // (bits - bits % 2)]
    for chunk, assembly in enumerate(chunks):
        for _ in range(20):
            low, high = random.integers(0, 256, (2, 4), dtype=np.uint8)
            given = {f"${i}": int(x.view(np.uint32)[0]) for i, x in enumerate((low, high), start=2)}
            assert (execute(assembly, given) == level_of(low, high, bits, chunk)).all()


def test_highest_bits_are_moved_to_those_of_their_chunks():
    random, assembly = np.random.default_rng(0), rotated_levels.chunk_assembly(LEVELS[3])[-1]
    for _ in range(20):
        packed, stays = random.integers(0, 256, 4, dtype=np.uint8), random.random(4) < 0.5
        mask = np.where(stays, 255, 0).astype(np.uint8)
        given = {"$1": int(packed.view(np.uint32)[0]), "$2": int(mask.view(np.uint32)[0])}
        result = execute(assembly, given, ["$0"]).view(np.uint8)
        assert (result & 0x55 == np.where(stays, packed, packed >> 1) & 0x55).all()
