"""Which requests are answered together, and which wait."""

import pytest

from locret.serve.jobs import LONG, AskJob, ReadJob, joining, next_batch
from locret.serve.requests import Answer, Ask, Reading, TextOf


def job(prompt=(7, 8, 9), shared=0, units=0, **asked):
    ask = Ask([*prompt], **asked)
    return AskJob(ask, 8, Answer(), TextOf(None), shared=shared, most_units=units)


GREEDY, OTHER = job(), job(prompt=(7,), top_p=0.5, seed=3, stop=("x",), max_tokens=3)
WARM, WARM_TOO, HOT = job(temperature=0.7), job(temperature=0.7), job(temperature=1.0)
SEEDED, SEEDED_TOO = (job(temperature=0.7, seed=1) for _ in range(2))
ON_CONTEXT, ON_PREFIX = job(context="ctx"), job(shared=1)
SHORT_QUESTION = job(prompt=(7,), context="ctx")
LONG_PROMPT = job(prompt=(7,) * (LONG + 1))
CONTEXT = ReadJob([1, 2], Reading())
ALL = [
    *(GREEDY, WARM, SEEDED, ON_CONTEXT, SHORT_QUESTION, CONTEXT, LONG_PROMPT),
    *(OTHER, HOT, WARM_TOO, SEEDED_TOO, ON_PREFIX),
]


@pytest.mark.parametrize(
    "expected",
    [
        [GREEDY, OTHER],  # settings of sampling are nothing to a greedy answer
        [WARM, WARM_TOO],
        [HOT],
        [SEEDED],
        [ON_CONTEXT, SHORT_QUESTION, ON_PREFIX],
        [LONG_PROMPT],
        [CONTEXT],
    ],
)
def test_what_goes_together(expected):
    first = expected[0]
    waiting = [first, *(one for one in ALL if one is not first)]
    assert next_batch(waiting, 8) == expected


def test_no_more_than_there_is_room_for():
    jobs = [job(units=units) for units in (5, 4, 3, 1, 1)]
    assert next_batch(jobs, 3) == jobs[:3]
    assert next_batch(jobs, 8, most_units=10) == [jobs[0], jobs[1], jobs[3]]
    assert next_batch(jobs, 8, most_units=1) == jobs[:1]  # alone it was found to fit


SHORT, LONG_ONE = job(units=2), job(prompt=(7,) * (LONG + 1), units=2)


@pytest.mark.parametrize(
    ("waiting", "count"),
    [
        ([SHORT, GREEDY], 2),
        ([SHORT, WARM, GREEDY], 1),  # a warm one would wait for ever if others went past it
        ([WARM, SHORT], 0),
        ([CONTEXT, SHORT], 0),
        ([LONG_ONE, SHORT], 0),
        ([ON_CONTEXT], 0),
        ([], 0),
    ],
)
def test_those_in_front_join_what_is_being_answered(waiting, count):
    assert joining(waiting, [job()], 8) == waiting[:count]


def test_no_more_join_than_there_is_room_for():
    running, waiting = [job(units=3), job(units=1)], [job(units=2) for _ in range(5)]
    assert joining(waiting, running, 4) == waiting[:2]
    assert joining(waiting, running, 2) == []
    assert joining(waiting, running, 8, most_units=17) == waiting[:2]  # twice, while they join
    assert joining(waiting, running, 8, most_units=8) == []


def test_an_answer_with_a_seed_is_alone():
    assert joining([SEEDED_TOO], [SEEDED], 8) == []
