import pytest
from hypothesis import given
from hypothesis import strategies as st

from locret.tasks.text_metrics import (
    rouge_l,
    string_match_all,
    string_match_part,
    without_controls,
)


def test_matches_of_ruler():
    assert string_match_all("I saw 12 and 34.", ["12", "34", "56", "78"]) == 0.5
    assert string_match_all("FOX", ["fox"]) == 1
    assert string_match_part("It was the fox", ["a hare", "The Fox"]) == 1
    assert string_match_part("", ["a hare"]) == 0
    assert without_controls(" a\tb\x00c\n") == "a\nb\nc"


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("the cat sat", ["the cat sat"], 1),
        ("the cat sat", ["The dog, sat!"], 2 / 3),
        ("a b c d", ["d c b a"], 1 / 4),
        ("b", ["a b c"], 1 / 2),
        ("x", ["y", "x"], 1),
        ("", ["y"], 0),
    ],
)
def test_rouge_l(answer, references, score):
    assert rouge_l(answer, references) == pytest.approx(score)


WORDS = st.lists(st.sampled_from(["ab", "ab12", "The", "fox,", "a-b", "é", "Ü"]), max_size=8).map(
    " ".join
)


@given(WORDS, WORDS)
def test_rouge_l_is_that_of_the_package(answer, reference):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    expected = scorer.score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(answer, [reference]) == pytest.approx(expected)
