"""Maps of needles by length and depth: what stands where, one figure for all setups."""

import pytest

from locret.evaluation import report
from locret.evaluation.config import Setup
from tests.evaluation.result_data import asked, result_of

pytest.importorskip("matplotlib")
FULL, EIGHT = Setup("full"), Setup("locret", "8x")


def test_shares_by_hand():
    made = result_of(
        asked(FULL, [True, True, False, True], length=300, depths=2),
        asked(FULL, [True, None], length=500, depths=2),
        asked(EIGHT, [False, None, False, None], length=300, depths=2),
        asked(EIGHT, [False, True], length=500, depths=2),
    )
    cells = [
        [cell for cell in made["cells"] if cell["setup"] == of] for of in ("full", EIGHT.label)
    ]
    assert report.shares(cells[0], 2) == {(300, 0): 0.5, (300, 1): 1.0, (500, 0): 1.0}
    assert report.shares(cells[1], 2) == {(300, 0): 0.0, (500, 0): 0.0, (500, 1): 1.0}


def test_several_tasks_share_a_map():
    made = result_of(asked(FULL, [True, True]), asked(FULL, [False, True], "passkey"))
    assert report.shares(made["cells"], 2) == {(300, 0): 0.5, (300, 1): 1.0}


def test_one_figure_holds_all_setups():
    named = [Setup("random", 8, name=name) for name in "abcde"]
    made = result_of(*(asked(setup, [True, None], length=n) for setup in named for n in (300, 512)))
    drawn = report.needle_map(made)
    shown = [axis for axis in drawn.axes if axis.get_visible() and axis.get_title()]
    assert [axis.get_title().split(",")[0] for axis in shown] == ["a", "b", "c", "d", "e"]
    assert shown[0].get_title() == "a, 8"
    values = shown[0].images[0].get_array().filled(float("nan"))
    assert values.shape == (2, 2)
    assert values[0].tolist() == [1, 1] and all(value != value for value in values[1])
    assert [tick.get_text() for tick in shown[0].get_xticklabels()] == ["300", "512"]
    assert [tick.get_text() for tick in shown[0].get_yticklabels()] == ["25%", "75%"]
    report.plotting().close(drawn)


def test_a_map_where_nothing_was_answered_is_drawn_too(tmp_path):
    made = result_of(asked(FULL, [None, None]), asked(EIGHT, [True, False]))
    path = report.save_figure(report.needle_map(made), tmp_path / "new" / "map.png")
    assert path.stat().st_size > 1000 and path.read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_has_a_map_if_there_are_several_lengths():
    one = result_of(asked(EIGHT, [True, False]))
    two = result_of(asked(EIGHT, [True, False]), asked(EIGHT, [True, False], length=500))
    assert [name for name, _, _ in report.evaluation_figures(one)] == ["budget"]
    assert [name for name, _, _ in report.evaluation_figures(two)] == ["budget", "needles"]
    report.plotting().close("all")


def test_other_tasks_have_no_place_on_a_map():
    made = result_of(*(asked(FULL, [True, False], length=n) for n in (300, 500)))
    (cell, *_) = made["cells"]
    made["cells"].append({name: cell[name] for name in cell if name != "depths"} | {"length": None})
    drawn = report.needle_map(made)
    values = drawn.axes[0].images[0].get_array().filled(float("nan"))
    assert values.tolist() == [[1, 1], [0, 0]]
    report.plotting().close(drawn)


def test_quality_against_bytes_has_a_line_for_each_way_to_store():
    kivi = [
        Setup("knorm", b, quantization={"name": "kivi", "bits": 4})
        for b in ("8x bytes", "4x bytes")
    ]
    plain = [Setup("knorm", b) for b in ("8x bytes", "4x bytes")]
    made = result_of(
        asked(FULL, [True, True], bytes=2**22),
        *(asked(setup, [True, False], bytes=2**n) for n, setup in enumerate(plain, 18)),
        *(asked(setup, [True, True], bytes=2**n) for n, setup in enumerate(kivi, 18)),
    )
    drawn = report.against_bytes(made)
    (axis,) = drawn.axes
    labels = axis.get_legend_handles_labels()[1]
    assert labels == ["full cache", "knorm, kivi bits=4", "knorm, not quantized"]
    report.plotting().close(drawn)


def test_a_file_that_could_not_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a figure's name ends in one of .*png"):
        report.check_figure(tmp_path / "a.b")
    with pytest.raises(ValueError, match="give a file"):
        (tmp_path / "folder.png").mkdir()
        report.check_figure(tmp_path / "folder.png")
