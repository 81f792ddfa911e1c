"""Kernels compile for GPUs, and once, whatever numbers of rows, tokens and units requests come
with: each time takes seconds, for which a request would wait. No GPU is asked: what Triton compiles
is what it would look up before a launch."""

import importlib
import itertools
import pkgutil
from dataclasses import replace

import pytest
import torch

from locret import kernels
from locret.kernels import dispatch
from locret.kernels.decode_general import PackedShares
from tests.kernels.packed import random_units
from tests.kernels.rotated import random_rotated

triton = pytest.importorskip("triton")
jit = pytest.importorskip("triton.runtime.jit")
nvidia = pytest.importorskip("triton.backends.nvidia.compiler")
ASTSource = triton.compiler.ASTSource
GPUTarget = importlib.import_module("triton.backends.compiler").GPUTarget

HEADS, GROUP, SIZE = 2, 3, 64
NUMBERS = [*itertools.product((1, 2, 3, 8), (2, 7, 16, 33, 128))]
"""Rows of a batch and tokens of a chunk."""

TWICE = {"_gated"}
"""For a few tokens, and for many."""


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)


def by_token(rows, heads, tokens):
    """As projections leave it."""
    return drawn(rows, tokens, heads, SIZE).transpose(1, 2)


def running(numbers):
    return torch.tensor([0, *numbers]).cumsum(0).int()


def gather(rows, tokens):
    lengths = [5 + tokens] * (rows * HEADS)
    old = drawn(sum(lengths), SIZE), torch.randn(sum(lengths)), drawn(sum(lengths), 1)
    scores = torch.randn(rows, HEADS, tokens)
    new = by_token(rows, HEADS, tokens), scores, drawn(rows, HEADS, tokens, 1)
    index = torch.arange(3).repeat(rows * HEADS)
    kernels.gather_sequences(old, new, index, running(lengths), running([3] * len(lengths)))


def select(rows, tokens):
    count = rows * HEADS
    old, new = torch.randn(9 * count), torch.randn(rows, HEADS, tokens)
    kept = torch.full((count,), 4, dtype=torch.int32)
    ends, none = (running([n] * count) for n in (9, 4)), 0 * kept
    offsets, out_offsets = ends
    kernels.select_sequences(
        old, new, offsets, kept, out_offsets, none, none, 4 * count, 9 + tokens
    )


def merge(rows, tokens):
    heads = HEADS * GROUP
    sums = [torch.randn(rows, heads, tokens) for _ in range(2)]
    first, second = drawn(rows, heads, tokens, SIZE + 8), drawn(rows, tokens, heads, SIZE + 8)
    kernels.merge_attention(first, sums[0], second.transpose(1, 2), sums[1])


def rotate(rows, tokens):
    cos, sin = torch.randn(2, rows, tokens, 24)
    kernels.rotate_at_slots(by_token(rows, HEADS, tokens), cos, sin)


def rotate_flat(rows, tokens):
    cos, sin = torch.randn(2, 1024, SIZE)
    slots = torch.arange(rows * tokens, dtype=torch.int32)
    kernels.rotate_units(drawn(rows * tokens, SIZE), cos, sin, slots)


def store(rows, tokens):
    keys, values = drawn(2, rows, HEADS, tokens, SIZE)
    new, slot = by_token(rows, HEADS, 1), torch.zeros(1, dtype=torch.int32)
    kernels.store_units(keys, values, new, new, slot)


def store_and_rotate(rows, tokens):
    keys, values = drawn(2, rows, HEADS, tokens, SIZE)
    new = kernels.NewUnit(*(by_token(rows, n, 1) for n in (HEADS * GROUP, HEADS, HEADS)))
    tables = kernels.Tables(*torch.randn(2, rows, tokens, 24))
    at, turned = torch.zeros(1, dtype=torch.int32), torch.empty(new.query.shape)
    kernels.store_rotated(new, keys, values, at, tables, turned_query=turned.contiguous())


def plain(rows, tokens):
    lengths = [tokens + 1] * (rows * HEADS)
    keys, values = drawn(2, sum(lengths), SIZE)
    tails = drawn(2, rows, HEADS, tokens, SIZE)
    shares = kernels.decode_shares(lengths, keys.device)
    return kernels.Plain(keys, values, shares, *tails, torch.ones(1, dtype=torch.int32))


def decode(rows, tokens):
    kernels.decode_sequences(by_token(rows, HEADS * GROUP, 1), plain(rows, tokens), 0.1)


def decode_packed(packed, rows, tokens):
    lengths = [tokens] * (rows * HEADS)
    shares = kernels.share_out(lengths, 12, packed.starts.device, least=16)
    shares = PackedShares.along(packed.starts, shares)
    query = by_token(rows, HEADS * GROUP, 1)
    kernels.decode_packed(query, packed, shares, plain(rows, tokens), 0.1)


def kivi(rows, tokens):
    packed = random_units([tokens] * (rows * HEADS), SIZE, 4, 64, "cpu")
    keys, values = ([x.clone() for x in each] for each in (packed.keys, packed.values))
    packed = replace(packed, keys=tuple(keys), values=tuple(values))  # aligned as on a GPU
    out = drawn(packed.count, SIZE)
    kernels.expand_units(packed.keys, 4, 64, out, packed.starts)
    kernels.expand_units(packed.values, 4, 64, out)
    decode_packed(packed, rows, tokens)


def turned(rows, tokens):
    packed = random_rotated([tokens] * (rows * HEADS), SIZE, 3, 2, "cpu")
    out, fresh = drawn(packed.count, SIZE), drawn(tokens, SIZE)
    kernels.expand_rotated(packed.keys, packed.key_levels, out, packed.starts)
    kernels.expand_rotated(packed.values, packed.value_levels, out)
    decode_packed(packed, rows, tokens)
    index = torch.arange(rows + tokens)
    block, kept = 0 * index, torch.full((rows,), -1, dtype=torch.int32)
    starts = running([(rows + tokens) // rows] * rows)
    of_keys = packed.keys, block, fresh, index
    kernels.pack_rotated_keys(*of_keys, kept, starts, packed.key_levels)
    kernels.pack_rotated_values(packed.values, fresh, index, packed.value_levels)
    kernels.fetch_rotated(*of_keys, packed.key_levels)


def norm(rows, tokens):
    kernels.add_norm(drawn(rows, tokens, SIZE), drawn(rows, tokens, SIZE), drawn(SIZE), 1e-5)


def gated(rows, tokens):
    gate, up = drawn(rows, tokens, 2 * SIZE).chunk(2, -1)
    kernels.gated(gate, up, "silu")


def labels(rows, tokens):
    query = by_token(rows, HEADS * GROUP, tokens)
    kernels.highest_shares(query, by_token(rows, HEADS, 2 * tokens + 1), 0.1)


def vector(rows, tokens):
    x, weights = drawn(1, 1, 128), [drawn(n, 128) for n in (48, 24, 24)]
    kernels.products(x, weights)
    kernels.products(x, weights[:1], [drawn(48)])
    kernels.gated_products(x, weights[1], weights[2], "silu")


def fp8(rows, tokens):
    kernels.round_rows(drawn(rows * tokens, 128))


def vector_in_fp8(rows, tokens):
    x, weights = drawn(1, 1, 128), [drawn(n, 128).to(torch.float8_e4m3fn) for n in (48, 24, 24)]
    scales = [torch.rand(len(weight), 1) for weight in weights]
    kernels.products(x, weights, scales=scales)
    kernels.products(x, weights[:1], [drawn(48)], scales[:1])
    kernels.gated_products(x, weights[1], weights[2], "silu", scales[1:])


def select_of(longest):
    one, none = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    offsets, new = torch.tensor([0, longest - 1]).int(), torch.randn(1, 1, 1)
    kernels.select_sequences(
        torch.randn(longest - 1), new, offsets, one, running([1]), none, none, 1, longest
    )


CALLS = [
    *(gather, select, merge, rotate, rotate_flat, store, store_and_rotate, decode, kivi, turned),
    *(norm, gated, labels, fp8),
]


def launch_by(monkeypatch, launch):
    """Let every public function launch its kernels, which `launch(kernel, args, keywords)` does."""

    def run(kernel, *args, grid, warmup, **keywords):
        launch(kernel, args, keywords)

    monkeypatch.setattr(jit.JITFunction, "run", run)
    for each in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"locret.kernels.{each.name}")
        if hasattr(module, "takes_triton"):
            monkeypatch.setattr(module, "takes_triton", lambda *_: True)


def bound(kernel, args, keywords):
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, nvidia.CUDABackend)
    return bind(*args, **keywords)


@pytest.fixture
def launched(monkeypatch):
    """What Triton would compile of each kernel that is launched: by its name, a set."""
    found = {}

    def launch(kernel, args, keywords):
        _, specialization, options = bound(kernel, args, keywords)
        found.setdefault(kernel.__name__, set()).add(f"{specialization} {options}")

    launch_by(monkeypatch, launch)
    return found


def compiled_for(capability, monkeypatch, tmp_path):
    """The name and the PTX of each kernel as it is launched from here on; on Hopper they start
    before the last one has ended."""
    target, compiled = GPUTarget("cuda", capability, 32), []
    backend = nvidia.CUDABackend(target)

    def launch(kernel, args, keywords):
        found, specialization, options = bound(kernel, args, keywords)
        options, *source = kernel._pack_args(backend, keywords, found, specialization, options)
        made = triton.compile(ASTSource(kernel, *source), target, options.__dict__)
        compiled.append((kernel.__name__, made.asm["ptx"]))

    launch_by(monkeypatch, launch)
    monkeypatch.setattr(dispatch, "_overlaps", lambda device: capability >= 90)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return compiled


@pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("call", [*CALLS, vector, vector_in_fp8], ids=lambda call: call.__name__)
def test_kernels_compile_for_gpus(call, capability, monkeypatch, tmp_path):
    if "fp8" in call.__name__ and capability < 89:
        pytest.skip("these GPUs know no FP8")
    compiled = compiled_for(capability, monkeypatch, tmp_path)
    call(3, 33)
    assert compiled and all(f".target sm_{capability}" in ptx for _, ptx in compiled)


def test_units_that_are_not_packed_are_attended_to_beside_packed_ones(monkeypatch, tmp_path):
    """Both write before the merge reads, which waits for the later one alone."""
    compiled = compiled_for(90, monkeypatch, tmp_path)
    packed = random_rotated([33] * (3 * HEADS), SIZE, 3, 3, "cpu")
    decode_packed(packed, 3, 33)
    (_, turned), (first, plain), (second, small), (third, _) = compiled
    assert (first, second, third) == ("_attend", "_attend_small", "_merge_states")
    wait, start, store = "griddepcontrol.wait", "griddepcontrol.launch_dependents", "st.global"
    assert turned.index(start) < turned.index(wait)
    assert plain.index(wait) < plain.index(start) < plain.index(store)
    assert small.index(start) < small.index(store)
    assert small.rindex(store) < small.index(wait)


def test_a_selection_is_compiled_for_few_lengths(launched):
    for longest in (2, 15, 300, 1025, 4096, 4097, 9000, 20_000, 32_768, 32_769, 70_000):
        select_of(longest)
    kinds = {name: len(launched[name]) for name in ("_select", "_tally", "_count", "_place")}
    assert kinds == {"_select": 2, "_tally": 1, "_count": 1, "_place": 1}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_kernel_is_compiled_once_for_all_lengths_and_batches(call, launched):
    call(*NUMBERS[0])
    once = {name: len(kinds) for name, kinds in launched.items()}
    assert once
    for rows, tokens in NUMBERS[1:]:
        call(rows, tokens)
    most = {name: count * (1 + (name in TWICE)) for name, count in once.items()}
    assert [name for name, kinds in launched.items() if len(kinds) > most[name]] == []
