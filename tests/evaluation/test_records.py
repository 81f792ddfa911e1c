"""Predictions survive whatever kills the process that writes them."""

from dataclasses import replace

from locret.evaluation.records import Record, Records

RECORD = Record(
    settings="s",
    prompt="p",
    setup="full",
    task="t",
    sample="0",
    answer="zwölf\n",
    end="eos",
    new_tokens=3,
    prompt_tokens=9,
    compressed_tokens=5,
    cut=0,
    answer_cut=False,
    budget=None,
    units=(4.5, 5),
    bytes=10,
    full_bytes=20,
    bytes_after=30,
    seconds=0.5,
)


def test_what_is_appended_is_read_by_every_process(tmp_path):
    one, two = Records(tmp_path, "0"), Records(tmp_path, "1")
    assert one.read() == {}
    one.append([RECORD])
    two.append([replace(RECORD, sample="1"), replace(RECORD, sample="2")])
    found = Records(tmp_path, "2").read()
    assert found[RECORD.key] == RECORD
    assert [record.sample for record in found.values()] == ["0", "1", "2"]


def test_a_line_that_was_cut_off_is_left_and_the_next_one_stands_alone(tmp_path):
    records = Records(tmp_path)
    records.append([RECORD, replace(RECORD, sample="1")])
    whole = records.path.read_bytes()
    for length in (len(whole) - 1, len(whole) - 20, len(whole) // 2 + 3):
        records.path.write_bytes(whole[:length])
        kept = records.read()
        assert set(kept) <= {RECORD.key, ("s", "1", "p")} and RECORD.key in kept
        records.append([replace(RECORD, sample="2")])
        assert set(records.read()) == {*kept, ("s", "2", "p")}


def test_lines_of_another_version_are_left(tmp_path):
    records = Records(tmp_path)
    records.append([RECORD])
    with records.path.open("a") as file:
        file.write('{"settings": "s"}\n[1]\nnull\n\n')
    assert list(records.read()) == [RECORD.key]
