import pytest

from locret.evaluation.results import (
    average_of_tasks,
    interval,
    resampled_means,
    share_of_means,
    wilson,
)


def test_an_interval_holds_the_mean_and_narrows_with_more_samples():
    few, many = (interval(resampled_means([0.0, 1.0] * n)) for n in (10, 1000))
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    # Of the mean of 20 coin tosses, 95 % lie within 0.5 +- 1.96 * 0.5 / sqrt(20).
    assert few == pytest.approx((0.28, 0.72), abs=0.04)
    assert interval(resampled_means([0.3])) == pytest.approx((0.3, 0.3))


def test_the_same_seed_draws_the_same():
    values = [0.1, 0.9, 0.4]
    assert resampled_means(values, seed=1).equal(resampled_means(values, seed=1))
    assert not resampled_means(values, seed=1).equal(resampled_means(values, seed=2))


def test_samples_of_a_group_are_drawn_together():
    values, groups = [1.0] * 50 + [0.0] * 50, ["a"] * 50 + ["b"] * 50
    low, high = interval(resampled_means(values, groups))
    assert (low, high) == (0, 1)  # two texts are no hundred samples
    assert interval(resampled_means(values))[0] > 0.35
    uneven = resampled_means([1.0, 1.0, 0.0], ["a", "a", "b"])
    assert sorted(set(uneven.tolist())) == pytest.approx([0, 2 / 3, 1])


def test_tasks_count_alike_whatever_their_size():
    mean, (low, high) = average_of_tasks({"small": [1.0], "large": [0.0] * 100})
    assert mean == low == high == 0.5


@pytest.mark.parametrize(
    ("found", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)],
)
def test_wilson_intervals(found, count, low, high):
    assert wilson(found, count) == pytest.approx((low, high), abs=1e-4)


def test_a_share_of_the_full_cache_is_drawn_in_pairs():
    full = {"a": [1.0, 0.5, 1.0, 0.0] * 5, "b": [1.0] * 20}
    half = {task: [value / 2 for value in values] for task, values in full.items()}
    share, (low, high) = share_of_means(half, full)
    assert share == pytest.approx(0.5) and low == pytest.approx(0.5) == pytest.approx(high)
    some = {"a": [1.0, 0.0, 1.0, 0.0] * 5, "b": [1.0] * 20}
    share, (low, high) = share_of_means(some, full)
    assert share == pytest.approx(1.5 / 1.625) and low < share < high <= 1


def test_there_is_no_share_of_next_to_nothing():
    assert share_of_means({"a": [1.0, 1.0]}, {"a": [0.0, 1.0]}) is None
    assert share_of_means({"a": [0.0, 0.0]}, {"a": [0.5, 1.0]}) == (0.0, (0.0, 0.0))
