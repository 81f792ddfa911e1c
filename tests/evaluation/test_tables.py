"""Results as text, by hand: what a line counts, which columns there are, what is said below."""

import pytest

from locret.evaluation import results, tables
from locret.evaluation.config import Setup
from tests.evaluation.result_data import asked, result_of

FULL = Setup("full")
FOUR, EIGHT = (Setup("locret", f"{ratio}x") for ratio in (4, 8))
KIVI = {"name": "kivi", "bits": 4}


def text(*answered, **manifest):
    return tables.as_text(result_of(*answered, **manifest)).splitlines()


def test_a_line_tells_tasks_and_ratios_apart():
    one, two = "niah_single", "niah_multikey"
    made = result_of(
        asked(FULL, [True, False], one),
        asked(FULL, [True, True], two),
        asked(FOUR, [True, True], one, bytes_after=7, units=(9.0, 9)),
        asked(FOUR, [False, True], two, seconds=1.25),
        asked(EIGHT, [False, None], one),
        asked(EIGHT, [False, True], two),
    )
    full, four, eight = results.lines_of(made)
    assert [(line.name, line.asked) for line in (full, four, eight)] == [
        ("full", "1x"),
        ("locret", "4x"),
        ("locret", "8x"),
    ]
    assert (full.found, full.of_full, full.asked_of) == (3, "3/3", 4)
    # The full cache does not find the second one of the first task.
    assert (four.found, four.of_full, four.asked_of) == (3, "2/3", 4)
    assert (eight.found, eight.of_full, eight.asked_of) == (1, "1/3", 3)
    assert (four.units, four.bytes, four.seconds) == (9, 2**20, 3.5)
    by_task = {(cell["setup"], cell["task_name"]): cell["score"] for cell in made["cells"]}
    assert by_task[FOUR.label, one] == 1.0 and by_task[FOUR.label, two] == 0.5
    assert by_task[EIGHT.label, one] == 0.0 and by_task[EIGHT.label, two] == 0.5


def test_the_table_has_a_line_a_setup():
    head, *lines = text(
        asked(FULL, [True], bytes_after=2**20),
        asked(FOUR, [False], bytes_after=2**18, bytes=2**16),
        asked(EIGHT, [True], bytes_after=2**19),
    )[:4]
    assert " ".join(head.split()) == (
        "policy asked real found of full context kept MiB rest MiB cache MiB seconds"
    )
    assert [line.split() for line in lines] == [
        ["full", "1x", "1.0x", "1/1", "1/1", "3/48", "0.5", "2", "0.5", "1.0", "0.5"],
        ["locret", "4x", "4.0x", "0/1", "0/1", "3/48", "0.1", "2", "0.2", "0.2", "0.5"],
        ["locret", "8x", "2.0x", "1/1", "1/1", "3/48", "0.5", "2", "0.0", "0.5", "0.5"],
    ]


def test_the_rest_is_the_question_and_the_answer():
    (line,) = results.lines_of(result_of(asked(FULL, [True], prompt_tokens=60, new_tokens=5)))
    assert (line.context_tokens, line.rest_tokens) == (48, 60 - 48 + 5)


def test_the_table_says_what_its_columns_are():
    lines = text(asked(FULL, [True]), asked(EIGHT, [True]))
    legend = "\n".join(lines[3:])
    for term in ("asked", "real", "of full", "context kept", "rest"):
        assert f"\n{term}  " in f"\n{legend}"
    assert "of policy full / cache MiB of the line" in legend and "the question and the" in legend
    assert max(map(len, lines)) <= 100


def test_without_the_full_cache_the_ratio_is_to_all_keys_and_values():
    head, alone, _, *legend = text(asked(EIGHT, [True], bytes_after=2**20, full_bytes=2**22))
    assert alone.split()[1:5] == ["8x", "4.0x", "1/1", "-"]
    assert "keys and values of all tokens / cache MiB" in "\n".join(legend)
    assert not any(line.startswith("of full") for line in legend)


def test_over_lengths_the_share_found_then_how_much_smaller_the_cache_is():
    lines = text(
        asked(FULL, [True, False, True, True], length=300),
        asked(FULL, [True], length=500, bytes_after=2**21),
        asked(FOUR, [False] * 4, length=300, bytes_after=2**18),
        asked(FOUR, [None], length=500),
        asked(EIGHT, [True] * 4, length=300, bytes_after=2**17),
        asked(EIGHT, [False], length=500, bytes_after=2**19),
    )
    assert [line.split() for line in lines[:4]] == [
        ["share", "found", "asked", "300", "500"],
        ["full", "1x", "0.75", "1.00"],
        ["locret", "4x", "0.00", "-"],
        ["locret", "8x", "1.00", "0.00"],
    ]
    assert [line.split() for line in lines[5:9]] == [
        ["real", "asked", "300", "500"],
        ["full", "1x", "1.0x", "1.0x"],
        ["locret", "4x", "4.0x", "-"],
        ["locret", "8x", "8.0x", "4.0x"],
    ]
    assert "1 samples did not fit into the device's memory and count in no figure." in lines


def test_the_full_cache_of_a_length_counts_all_its_tasks():
    lines = text(
        *(asked(FULL, [True], length=n, bytes_after=2**21) for n in (300, 500)),
        *(asked(FULL, [True], "passkey", length=n, bytes_after=2**20) for n in (300, 500)),
    )
    assert lines[4].split() == ["full", "1x", "1.0x", "1.0x"]


@pytest.mark.parametrize(("dtype", "said"), [("float32", True), ("bfloat16", False)])
def test_at_equal_bytes_units_differ(dtype, said):
    few = Setup("knorm", "8x bytes")
    many = Setup("knorm", "8x bytes", quantization=KIVI, protocol="query_aware")
    lines = text(
        asked(FULL, [True], bytes=2**20),
        asked(few, [True], bytes=2**17),
        asked(many, [False], bytes=2**17, units=(12.0, 12)),
        computed=[{"dtype": dtype}],
    )
    assert [line.split() for line in lines[:4]] == [
        ["policy", "asked", "units", "KiB", "real", "found"],
        ["full", "1x", "3", "1,024", "1.0x", "1/1"],
        ["knorm", "8x", "3", "128", "8.0x", "1/1"],
        ["knorm", "kivi", "bits=4,", "query-aware", "8x", "12", "128", "8.0x", "0/1"],
    ]
    assert ("twice its bytes" in " ".join(" ".join(lines).split())) == said
    assert max(map(len, lines)) <= 100


def test_markdown_has_a_column_a_task_and_leaves_out_what_tasks_share():
    made = result_of(
        asked(FULL, [True, False], "niah_single"), asked(FULL, [True, True], "niah_multikey")
    )
    head, _, line = tables.as_markdown(made).splitlines()[:3]
    assert head.split("|")[-3:-1] == [" single ", " multikey "]
    assert line.split("|")[1:5] == [" full ", " all ", " any ", " 75.0 (30.1-95.4) "]
    assert line.split("|")[-3:-1] == [" 50.0 ", " 100.0 "]


def test_a_setup_without_an_answer_is_told_and_counts_in_no_mean():
    made = result_of(
        asked(FULL, [None, None]), asked(EIGHT, [True, None]), asked(EIGHT, [False], "passkey")
    )
    full, eight = made["setups"]
    assert (full["score"], full["failed"], full["bytes"]) == (None, 2, None)
    assert (eight["score"], eight["failed"], eight["count"]) == (0.5, 1, 3)
    assert "difference" not in eight
    (cell, _) = [cell for cell in made["cells"] if cell["setup"] == EIGHT.label]
    assert cell["scores"] == [1.0, None] and cell["ends"]["memory"] == 1
    assert cell["units"]["max"] == 3 and cell["bytes"]["mean"] == 2**19
    markdown = tables.as_markdown(made)
    assert markdown.splitlines()[2].split("|")[4:9] == [" - "] * 5
    assert "3 samples did not fit into the device's memory" in markdown
    (line,) = results.lines_of(made)  # one that has an answer
    assert (line.found, line.asked_of) == (1, 2)


def test_shares_found_have_wilsons_interval():
    (setup,) = result_of(asked(EIGHT, [True] * 9 + [False]))["setups"]
    assert setup["interval"] == pytest.approx([0.5958, 0.9821], abs=1e-3)
    (all_found,) = result_of(asked(EIGHT, [True] * 10))["setups"]
    assert all_found["interval"][0] == pytest.approx(0.7225, abs=1e-3)
