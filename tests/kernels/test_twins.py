"""The plain PyTorch twins against formulas written out, and what the public functions refuse."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as apply_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as apply_half

from locret.kernels import (
    HeadNorms,
    NewUnit,
    PackedKV,
    Plain,
    Tables,
    add_norm,
    decode_packed,
    decode_sequences,
    decode_shares,
    expand_rotated,
    expand_units,
    gated,
    gather_sequences,
    packed_shares,
    rotate_at_slots,
    rotate_units,
    select_sequences,
    store_rotated,
    store_units,
)
from locret.kernels.select import select_sequences_reference
from locret.quantization.packed import pack_keys, pack_values, select_keys, select_values
from locret.quantization.schemes import KiviScheme, RotatedScheme


def angles(slots, size):
    return torch.arange(slots)[:, None] / 100 ** (torch.arange(size // 2) / size)


def test_half_is_what_llama_does():
    x, angle = torch.randn(1, 2, 9, 16), angles(9, 16)
    cos, sin = angle.cos().repeat(1, 2)[None], angle.sin().repeat(1, 2)[None]
    signed = torch.cat([-sin[..., :8], sin[..., 8:]], -1)
    expected, _ = apply_half(x, x, cos, sin)
    torch.testing.assert_close(rotate_at_slots(x, cos, signed, "half"), expected)


def test_interleaved_is_what_glm_does():
    x, angle = torch.randn(1, 2, 9, 16), angles(9, 8)
    cos, sin = angle.cos().repeat(1, 2)[None], angle.sin().repeat(1, 2)[None]
    expected, _ = apply_interleaved(x, x, cos, sin)
    cos, sin = cos[..., :4].repeat_interleave(2, -1), sin[..., :4].repeat_interleave(2, -1)
    signed = sin * torch.tensor([-1.0, 1.0]).repeat(4)
    torch.testing.assert_close(rotate_at_slots(x, cos, signed, "interleaved"), expected)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_units_rotate_as_at_their_slots(pairing):
    x, (cos, sin) = torch.randn(20, 8), torch.randn(2, 30, 6)
    slots = torch.randint(0, 30, (20,), dtype=torch.int32)
    at_slots = cos[slots][None], sin[slots][None]
    expected = rotate_at_slots(x[None, None], *at_slots, pairing)[0, 0]
    assert torch.equal(rotate_units(x, cos, sin, slots, pairing), expected)


def test_gather_sequences_takes_old_then_new_of_each_sequence():
    names = torch.arange(5), torch.arange(10, 16).view(1, 3, 2)
    offsets, out_offsets = per_sequence(0, 3, 3, 5), per_sequence(0, 3, 4, 8)
    index = torch.tensor([0, 2, 4, 1, 0, 1, 2, 3])
    old, new = (names[0], names[0][:, None].float()), (names[1], names[1][..., None].float())
    flat, wide = gather_sequences(old, new, index, offsets, out_offsets)
    assert flat.tolist() == [0, 2, 11, 13, 3, 4, 14, 15]
    assert torch.equal(wide, flat[:, None].float())


@pytest.mark.parametrize("lengths", [(3, 0, 7, 1, 20, 6), (4,) * 6, (0,) * 6])
def test_decode_sequences_is_attention_over_context_and_tail(lengths):
    keys, values = torch.randn(2, sum(lengths), 8).unbind()
    tails = torch.randn(2, 2, 3, 9, 8)
    tails[..., 5:, :] = torch.nan
    query, filled = torch.randn(2, 6, 2, 8), torch.tensor([5]).int()
    shares = decode_shares(lengths, torch.device("cpu"))
    out = decode_sequences(query, Plain(keys, values, shares, *tails, filled), 0.3)
    contexts = [*zip(keys.split(lengths), values.split(lengths), strict=True)]
    for sequence, (context_keys, context_values) in enumerate(contexts):
        row, head = divmod(sequence, 3)
        for t in range(2):
            k = torch.cat([context_keys, tails[0, row, head, : 4 + t]])
            v = torch.cat([context_values, tails[1, row, head, : 4 + t]])
            for q_head in (2 * head, 2 * head + 1):
                expected = (0.3 * query[row, q_head, t] @ k.T).softmax(-1) @ v
                torch.testing.assert_close(out[row, q_head, t], expected)


def test_several_tokens_decode_as_one_after_the_other():
    query, context = torch.randn(1, 4, 3, 8), torch.randn(2, 9, 8)
    shares = decode_shares((2, 7), torch.device("cpu"))
    rest = (*context, shares, *torch.randn(2, 1, 2, 20, 8))

    def decoded(query, filled):
        return decode_sequences(query, Plain(*rest, torch.tensor([filled]).int()), 0.3)

    one_by_one = [decoded(query[:, :, t : t + 1], 13 + t) for t in range(3)]
    torch.testing.assert_close(decoded(query, 15), torch.cat(one_by_one, 2))


@pytest.mark.parametrize(("bits", "size", "group"), [(4, 64, 16), (2, 20, 32), (8, 12, 8)])
def test_packed_units_are_what_the_kivi_scheme_stores(bits, size, group):
    """After an eviction, so that blocks are of different lengths in every sequence."""
    scheme, before, after = KiviScheme(bits=bits, group=group), (100, 0, 40, 60), (70, 0, 40, 1)
    fresh = torch.randn(2, 200, size)
    keys, values = pack_keys(scheme, fresh[0], before), pack_values(scheme, fresh[1])
    pairs = zip(torch.arange(200).split(before), after, strict=True)
    index = torch.cat([of[torch.randperm(len(of))[:n].sort().values] for of, n in pairs])
    keys = select_keys(scheme, keys, before, fresh[0, :0], index, after)
    values = select_values(scheme, values, fresh[1, :0], index)
    packed = PackedKV((*keys.units, *keys.tables), keys.starts, values.units, bits, group)
    assert packed.count == 111
    expected = keys.dense(torch.float32), values.dense(torch.float32)
    for actual, expanded in zip(packed.expanded(size), expected, strict=True):
        torch.testing.assert_close(actual, expanded)
    query, filled = torch.randn(2, 4, 1, size), torch.tensor([5]).int()
    tails, plain = torch.randn(2, 2, 2, 7, size), torch.randn(2, 9, size)
    few = decode_shares((2, 0, 3, 4), torch.device("cpu"))
    shares = packed_shares(packed, after, 2, torch.float32)
    out = decode_packed(query, packed, shares, Plain(*plain, few, *tails, filled), 0.3)
    whole = []
    for x, y in zip(expected, plain, strict=True):
        pairs = zip(x.split(after), y.split(few.lengths), strict=True)
        whole.append(torch.cat([units for pair in pairs for units in pair]))
    both = decode_shares((72, 0, 43, 5), torch.device("cpu"))
    expected = decode_sequences(query, Plain(*whole, both, *tails, filled), 0.3)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [64, 80, 96])
def test_rotated_units_are_what_the_scheme_stores(bits, size):
    scheme, lengths = RotatedScheme(bits=bits, group=16), (20, 0, 7)
    keys = pack_keys(scheme, torch.randn(27, size), lengths)
    values = pack_values(scheme, torch.randn(27, size))
    form = scheme.kernel_form((*keys.units, *keys.tables), keys.starts, values.units)
    expected = keys.dense(torch.float32), values.dense(torch.float32)
    for actual, expanded in zip(form.expanded(size), expected, strict=True):
        torch.testing.assert_close(actual, expanded)
    whole = torch.zeros(2, 30, size)
    at = torch.arange(27) + 3
    expand_rotated(form.keys, form.key_levels, whole[0], form.starts, at)
    expand_rotated(form.values, form.value_levels, whole[1], at=at)
    torch.testing.assert_close(whole[:, 3:], torch.stack(expected))
    assert not whole[:, :3].any()


def test_store_writes_in_place():
    keys, values = torch.zeros(2, 1, 2, 5, 4).unbind()
    key, value = torch.randn(2, 1, 2, 1, 4).unbind()
    store_units(keys, values, key, value, torch.tensor([3]))
    assert torch.equal(keys[:, :, 3:4], key) and torch.equal(values[:, :, 3:4], value)
    assert keys.count_nonzero() == 8


SCORES = st.lists(st.sampled_from([0.0, 1.0, 2.0, math.inf, -math.inf, math.nan]), min_size=2)


def per_sequence(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@given(SCORES, st.data())
def test_select_keeps_the_highest_and_of_equals_the_earliest(scores, data):
    kept = data.draw(st.integers(1, len(scores)))
    tail, old = data.draw(st.integers(0, kept)), data.draw(st.integers(0, len(scores)))
    last = len(scores) - tail

    def rank(unit):
        score = scores[unit]
        return (unit < last, math.isnan(score), 0 if math.isnan(score) else -score, unit)

    expected = sorted(sorted(range(len(scores)), key=rank)[:kept])
    old, new = torch.tensor(scores[:old]), torch.tensor([[scores[old:]]])
    numbers = per_sequence(kept), per_sequence(tail), per_sequence(0)
    offsets = per_sequence(0, len(old))
    assert select_sequences_reference(old, new, offsets, *numbers).tolist() == expected


@pytest.mark.parametrize(("tail", "head"), [(0, 0), (5, 3)])
def test_sequences_of_a_rectangle_keep_what_topk_chooses(tail, head):
    scores = torch.randint(0, 9, (2, 3, 60)).float()  # topk has its own rule for equal scores
    protected = scores.clone()
    protected[..., 60 - tail :] = protected[..., :head] = torch.inf
    expected = protected.topk(21, sorted=False).indices.sort().values
    numbers = (per_sequence(*range(0, 241, 40)), per_sequence(*[21] * 6))
    numbers += (per_sequence(*range(0, 127, 21)), *per_sequence(*[tail] * 6, *[head] * 6).split(6))
    old, new = scores[..., :40].flatten(), scores[..., 40:]
    index = select_sequences(old, new, *numbers, 126, 60)
    assert torch.equal(index.view(2, 3, 21), expected)
    assert torch.equal(scores[..., 40:], new)


def test_unequal_sequences_keep_their_highest():
    old, new = torch.tensor([5.0, 1, 7, 6, 4]), torch.tensor([[[2.0, 4], [3, 1], [0, 9]]])
    offsets, kept = per_sequence(0, 3, 5, 5), per_sequence(3, 2, 8)
    tails, heads = per_sequence(1, 0, 0), per_sequence(0, 0, 0)
    index = select_sequences(old, new, offsets, kept, per_sequence(0, 3, 5, 7), tails, heads, 7, 5)
    assert index.tolist() == [0, 2, 4, 0, 1, 0, 1]


ONE = torch.ones(1, dtype=torch.int32)
UNITS = torch.zeros(1, 2, 5, 4)

SHARES = decode_shares([3, 2], torch.device("cpu"))
FLAT = torch.zeros(5, 4)
INDEX, OFFSETS = torch.zeros(2).long(), (per_sequence(0, 2, 5), per_sequence(0, 1, 2))
PLAIN = Plain(FLAT, FLAT, SHARES, UNITS, UNITS, ONE)

CODES, ENTRIES = torch.zeros(5, 2, dtype=torch.uint8), torch.zeros(2, 4).half()
STARTS, TABLES = torch.tensor([0, 3, 5]).int(), torch.zeros(5, 1).half()
OF_KEYS, OF_VALUES = (CODES, ENTRIES, ENTRIES), (CODES, TABLES, TABLES)
PACKED = PackedKV(OF_KEYS, STARTS, OF_VALUES, bits=4, group=4)
PACKED_SHARES = packed_shares(PACKED, (3, 2), 1, torch.float32)


def refused(packed=PACKED, shares=PACKED_SHARES):
    return decode_packed(UNITS[:, :, :1], packed, shares, PLAIN, 1.0)


def misfit(query=UNITS, **plain):
    return decode_sequences(query, PLAIN._replace(**plain), 1.0)


def stored(tables=None, norms=None, **new):
    unit = NewUnit(*[UNITS[:, :, :1]] * 3)._replace(**new)
    return store_rotated(unit, UNITS, UNITS, ONE, tables, norms)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotate_at_slots(UNITS, UNITS[0], UNITS[0]), "do not fit"),
        (lambda: rotate_at_slots(UNITS, UNITS[:, 0], UNITS[:, 0], "pairs"), "pairing is 'pairs'"),
        (lambda: add_norm(UNITS, UNITS[:, :1], FLAT[0], 1e-5), "new is .* expected"),
        (lambda: add_norm(UNITS, None, FLAT[0].half(), 1e-5), "weight is .* expected"),
        (lambda: gated(FLAT, FLAT[:2], "silu"), "up is .* expected"),
        (lambda: gated(FLAT, FLAT, "relu"), "activation is 'relu'; expected one of"),
        (lambda: stored(key=UNITS), "key is .* expected"),
        (lambda: stored(value=FLAT[:1, :1].expand(2, 4)[None, :, None]), "not contiguous"),
        (lambda: stored(tables=Tables(UNITS[0, :1], UNITS[0, :1, :, :2])), "sin is .* expected"),
        (lambda: stored(tables=Tables(UNITS[0, :1, :4], UNITS[0, :1, :4])), "cos is .* 5 or more"),
        (lambda: stored(norms=HeadNorms(FLAT[0], FLAT[0, :2], 1e-5)), "key norm is .* expected"),
        (lambda: rotate_units(FLAT, FLAT[:, :3], FLAT[:, :3], FLAT[:, 0].int()), "do not fit"),
        (lambda: rotate_units(FLAT, FLAT, FLAT, FLAT[:, 0]), r"expected \[N, D\] and \[N\]"),
        (lambda: rotate_units(UNITS, FLAT, FLAT, INDEX), r"expected \[N, D\] and \[N\]"),
        (
            lambda: refused(replace(PACKED, keys=(CODES, ENTRIES, ENTRIES.float()))),
            "key_minimum is torch.float32",
        ),
        (
            lambda: refused(replace(PACKED, values=(CODES, TABLES, ENTRIES[0, :1].expand(5, 1)))),
            "value_minimum .* contiguous",
        ),
        (lambda: refused(replace(PACKED, starts=STARTS[1:])), r"key_starts .* expected .* \(3,\)"),
        (lambda: refused(replace(PACKED, bits=3)), "bits is 3"),
        (
            lambda: refused(shares=packed_shares(PACKED, (5,), 1, torch.float32)),
            "shares are of 1 sequences",
        ),
        (lambda: expand_units(OF_VALUES, 4, 4, FLAT[:4]), r"out is .*\[5, head size\]"),
        (lambda: expand_units(OF_VALUES, 4, 4, FLAT.int()), "a floating type"),
        (lambda: expand_units(OF_VALUES, 4, 4, FLAT, at=STARTS), "at is torch.int32"),
        (lambda: expand_rotated((CODES, TABLES), (0.5, 1.5), FLAT), "a multiple of 8"),
        (
            lambda: expand_rotated((CODES, TABLES), (0.5, 1.5), torch.zeros(5, 16)),
            r"codes is .* expected torch.uint8 \(5, 4\)",
        ),
        (lambda: misfit(values=FLAT[:4]), r"values is .* expected torch.float32 \(5, 4\)"),
        (lambda: misfit(values=FLAT.half()), "values is torch.float16"),
        (lambda: misfit(tail_values=UNITS.half()), "tail_values is torch.float16"),
        (lambda: misfit(tail_length=ONE.long()), "int32"),
        (lambda: misfit(UNITS[:, :1]), "a multiple of 2"),
        (lambda: misfit(UNITS.expand(1, 2, 5, 4).repeat(1, 1, 40, 1)), "more than 128 queries"),
        (
            lambda: misfit(shares=decode_shares([5], torch.device("cpu"))),
            "shares are of 1 sequences; expected 1 x 2",
        ),
        (
            lambda: select_sequences(FLAT, UNITS[..., 0], *[ONE] * 5, 2, 2),
            r"expected \[N\] and \[B, H, T\] of torch.float32",
        ),
        (
            lambda: select_sequences(FLAT[:, 0], UNITS[..., 0], *[ONE] * 5, 2, 2),
            r"kept is torch.int32 \(1,\) .* expected torch.int32 \(2,\)",
        ),
        (
            lambda: gather_sequences((FLAT,), (UNITS.half(),), INDEX, *OFFSETS),
            r"new\[0\] is torch.float16",
        ),
        (lambda: gather_sequences((FLAT,), (UNITS,), INDEX.int(), *OFFSETS), "torch.long"),
        (lambda: gather_sequences((FLAT,), (UNITS,), INDEX, ONE, ONE), r"offsets is .* \(3,\)"),
        (lambda: gather_sequences((FLAT,), (), INDEX, *OFFSETS), "as many of both"),
        (lambda: store_units(UNITS, UNITS, UNITS.half(), UNITS, ONE), "key is torch.float16"),
        (lambda: store_units(UNITS, UNITS, UNITS, UNITS, ONE[0]), "slot is"),
    ],
)
def test_misfits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
