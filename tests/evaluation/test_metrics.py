"""Scores computed by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locret.tasks import metrics

TEXTS = st.text(alphabet="ab the.AB 1\n", max_size=30)


@pytest.mark.parametrize(
    ("prediction", "references", "value"),
    [
        ("The cat sat.", ["cat sat"], 1.0),
        # cat, on, mat against cat, sat, on, mat: 2 * 3 / (3 + 4)
        ("cat on the mat", ["the cat sat on a mat"], 6 / 7),
        # repetitions count once for each one in the reference: 2 * 1 / (3 + 1)
        ("no no no", ["no"], 0.5),
        ("left", ["right", "left or right"], 0.5),
        ("nothing", ["all"], 0.0),
        ("", ["all"], 0.0),
        ("the", ["a"], 0.0),
    ],
)
def test_token_f1(prediction, references, value):
    assert metrics.token_f1(prediction, references) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "references", "value"),
    [("The Cat!", ["dog", "cat"], 1), ("cat sat", ["cat"], 0), ("", ["the"], 1), ("x", ["y"], 0)],
)
def test_exact_match(answer, references, value):
    assert metrics.exact_match(answer, references) == value


def test_rouge_of_a_sentence():
    # the cat sat on the mat / the cat is on the mat: 5 of 6 words, 3 of 5 pairs, 5 in order
    found = metrics.rouge("The cat sat on the mat.", ["the cat is on the mat"])
    assert found == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6})
    assert list(found)[0] == "rougeL"


def test_rouge_takes_the_best_reference_for_each_score():
    found = metrics.rouge("a b c", ["c b a", "a b x y z"])
    # words: 3/3 of the first; pairs: none of the first, 1 of 2 and 4 in the second; order: a b
    assert found == pytest.approx({"rouge1": 1.0, "rouge2": 2 / 6, "rougeL": 4 / 8})


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
    assert metrics.rouge(answer, references)["rougeL"] == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "references", "found"),
    [
        ("It is 1234567.", ["1234567"], 1),
        ("It is 12345678.", ["1234567"], 0),
        ("It is 01234567", ["1234567"], 0),
        ("It is 9,123", ["123"], 0),
        ("It is 123.4", ["123"], 0),
        ("numbers 11, 22,and 33", ["11", "22", "44"], 2 / 3),
        ("abcde, fghij", ["ABCDE", "FGHIJ"], 1),
        ("ABCDEF", ["ABCDE"], 0),
        ("so the  Cat\nsat.  Yes", ["the cat sat."], 1),
        ("", ["1"], 0),
    ],
)
def test_whole_words_are_found(answer, references, found):
    assert metrics.whole_words_found(answer, references) == pytest.approx(found)


def test_matches_of_ruler():
    assert metrics.string_match_all("I saw 12 and 34.", ["12", "34", "56", "78"]) == 0.5
    assert metrics.string_match_all("FOX", ["fox"]) == 1
    assert metrics.string_match_part("It was the fox", ["a hare", "The Fox"]) == 1
    assert metrics.string_match_part("", ["a hare"]) == 0
    assert metrics.without_controls(" a\tb\x00c\n") == "a\nb\nc"


@pytest.mark.parametrize(
    ("answer", "letter", "letters"),
    [
        ("B", "B", "B"),
        ("(C) because", "C", "C"),
        ("the right one is D.", "D", "D"),
        ("BD", "B", "BD"),
        ("DBB", "D", "BD"),
        ("A and C.", "A", "AC"),
        ("A, C) and D, Question 2: B.", "A", "AC"),
        ("none", "", ""),
        ("", "", ""),
    ],
)
def test_options_of_an_answer(answer, letter, letters):
    assert metrics.option_letter(answer) == letter
    assert metrics.option_letters(answer) == letters


@pytest.mark.parametrize(
    ("given_", "wanted", "value"),
    [("A", "A", 1), ("A", "ABC", 0.25), ("AB", "BA", 1), ("AD", "AB", 0), ("ABC", "AB", 0),
     ("", "A", 0), ("", "", 0)],
)  # fmt: skip
def test_some_of_the_right_options_are_a_quarter(given_, wanted, value):
    assert metrics.options_score(given_, wanted) == value


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("She has 3 and 4, so 7.\nThe answer is 7", "7"),
        ("The answer is $1,234.50 a day", "1234"),
        ("it is 12 apples\n\nQuestion: 99", "12"),
        ("about 3.75", "3"),
        ("many", ""),
        ("", ""),
    ],
)
def test_the_number_an_answer_comes_to(answer, number):
    assert metrics.final_number(answer) == number


def test_numbers_and_texts_are_compared():
    assert metrics.numbers_equal("007", "7") == 1
    assert metrics.numbers_equal("", "") == 0
    assert metrics.contains("it is The Role Of Art\nor the sea", ["the role of art"]) == 1
    assert metrics.contains("\n-\nthe sea\nthe role of art", ["The role of art"]) == 0


@given(prediction=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=3))
def test_scores_are_shares_and_never_fall_with_another_reference(prediction, references):
    for score in (metrics.token_f1, metrics.contains):
        value = score(prediction, references)
        assert 0 <= score(prediction, references[:1]) <= value <= 1
    assert all(0 <= value <= 1 for value in metrics.rouge(prediction, references).values())


@given(text=TEXTS)
def test_a_text_matches_itself(text):
    if metrics.normalize(text):
        assert metrics.token_f1(text, [text]) == 1


@pytest.mark.parametrize("references", [[], "a text"])
def test_references_must_be_a_list(references):
    matches = (metrics.whole_words_found, metrics.string_match_all, metrics.string_match_part)
    for score in (metrics.token_f1, metrics.contains, metrics.rouge, *matches):
        with pytest.raises(ValueError, match="expected a list"):
            score("a", references)
