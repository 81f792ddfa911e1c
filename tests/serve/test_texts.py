"""The text of an answer comes in whole characters, up to the first stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locret.serve.requests import TextOf
from tests.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def pieces_of(tokens, stop=()):
    text = TextOf(TOKENIZER, stop)
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped:
            return pieces, True
    pieces.append(text.end())
    return pieces, text.stopped


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@given(st.text(max_size=40))
def test_pieces_make_up_the_text(text):
    pieces, _ = pieces_of(ids_of(text))
    assert "".join(pieces) == text


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60))
def test_any_tokens_at_all(tokens):
    pieces, _ = pieces_of(tokens)
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == whole


def test_no_part_of_a_character_is_passed_on():
    pieces, _ = pieces_of(ids_of("a€😀b"))
    assert [piece for piece in pieces if piece] == ["a", "€", "😀", "b"]


def test_bytes_that_are_no_text_do_not_wait_for_ever():
    token = next(t for t in range(len(TOKENIZER)) if TOKENIZER.decode([t]) == "�")
    text = TextOf(TOKENIZER)
    assert len("".join(text.add(token) for _ in range(200))) > 100


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_nothing_of_a_stop_string_is_passed_on(text, stop):
    pieces, stopped = pieces_of(ids_of(text), stop)
    ends = [text.find(one) + len(one) for one in stop if one in text]
    assert stopped == bool(ends)
    if not ends:
        assert "".join(pieces) == text
    elif all(len(TOKENIZER.decode([t])) == 1 for t in ids_of(text)):
        first = min(ends)  # the string that is complete first
        begins = [text[:first].find(one) for one in stop if one in text[:first]]
        assert "".join(pieces) == text[: min(begins)]


@pytest.mark.parametrize(
    "stop", ["magic numbers", "of the special", "c", "quiet otter is a number"]
)
def test_stop_strings_over_the_borders_of_tokens(stop):
    text = "One of the special magic numbers for the quiet otter is a number"
    pieces, stopped = pieces_of(ids_of(text), (stop,))
    assert stopped and "".join(pieces) == text[: text.index(stop)]


def test_a_beginning_of_a_stop_string_that_is_not_one_is_passed_on():
    pieces, stopped = pieces_of(ids_of("the magic mage"), ("magic numbers",))
    assert not stopped and "".join(pieces) == "the magic mage"
    assert "".join(pieces[:-1]).startswith("the magic ")
