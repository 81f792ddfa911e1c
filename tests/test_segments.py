"""Where samples and answers may lie in a row."""

import pytest

from locret.training.segments import Segment, check_segments


@pytest.mark.parametrize(
    "row",
    [
        [Segment(0, 40, ((1, 2),))],
        [Segment(0, 20, ((5, 9), (9, 20))), Segment(20, 40, ((39, 40),))],
    ],
)
def test_rows_that_are_right_pass(row):
    check_segments(row, 40)


@pytest.mark.parametrize(
    "row",
    [
        [],
        [Segment(0, 39, ((29, 39),))],
        [Segment(1, 40, ((29, 40),))],
        [Segment(0, 20, ((10, 20),)), Segment(21, 40, ((30, 40),))],
        [Segment(0, 20, ((10, 20),)), Segment(19, 40, ((30, 40),))],
    ],
)
def test_segments_that_do_not_fill_the_row_are_refused(row):
    with pytest.raises(ValueError, match="do not fill the row of 40 tokens"):
        check_segments(row, 40)


@pytest.mark.parametrize(
    "answers",
    [
        (),
        ((5, 5),),
        ((9, 5),),
        ((0, 5),),
        ((30, 41),),
        ((20, 30), (5, 9)),
        ((5, 12), (10, 20)),
    ],
    ids=str,
)
def test_answers_that_cannot_be_are_refused(answers):
    with pytest.raises(ValueError, match=r"segment 0 \.\. 40 has the answers"):
        check_segments([Segment(0, 40, answers)], 40)


def test_what_predicts_an_answer_stands_before_it_in_its_own_branch():
    assert Segment(2, 9, ((4, 6), (8, 9))).before_answers == [3, 4, 7]
    # The second branch begins with its answer: the trunk's last token predicts it.
    assert Segment(2, 10, ((5, 7), (7, 10)), ((4, 7), (7, 10))).before_answers == [4, 5, 3, 7, 8]
