import gzip
import json
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from datamodules import sources
from datamodules.conversations import SkippedRow
from datamodules.rows import FIELDS, parse_row
from datamodules.sources import HubSource, JsonlSource, ParquetSource, Source, SyntheticSource

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
QA = {
    "id": "doc-0",
    "source": "docs",
    "context": "Some text.",
    "qa": [{"question": "Who?", "answers": ["Me", "I"]}, {"question": "", "answers": ["Yes"]}],
}
CHAT = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
SHARE = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
ALPACA = {"instruction": "Read this.", "output": "Done.", "input": "", "file": "book.txt"}


def write(path: Path, *rows: object) -> str:
    lines = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines, encoding="utf-8")
    return str(path)


def texts(conversation) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in conversation.messages]


def test_qa_rows_give_a_conversation_for_each_question():
    first, second = parse_row(QA)
    assert texts(first) == [("user", "Some text.\n\nWho?"), ("assistant", "Me")]
    assert texts(second) == [("user", "Some text."), ("assistant", "Yes")]
    assert (first.source, first.id, second.id) == ("docs", "doc-0#0", "doc-0#1")


@pytest.mark.parametrize("row", [CHAT, SHARE])
def test_chat_rows(row):
    (found,) = parse_row(row)
    assert texts(found) == [("user", "Q"), ("assistant", "A")]


def test_chat_rows_end_at_the_last_answer():
    row = {"messages": [*CHAT["messages"], {"role": "user", "content": "And?"}]}
    assert texts(parse_row(row)[0]) == [("user", "Q"), ("assistant", "A")]


def test_instruction_rows():
    assert texts(parse_row(ALPACA)[0]) == [("user", "Read this."), ("assistant", "Done.")]
    (found,) = parse_row({**ALPACA, "input": "More."})
    assert texts(found)[0] == ("user", "Read this.\n\nMore.")


def test_a_question_without_answers_is_left_to_the_encoder():
    (found,) = parse_row({"context": "C", "qa": [{"question": "Q", "answers": []}]})
    assert texts(found)[-1] == ("assistant", "")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not an object"),
        ({"text": "x"}, "unknown schema"),
        ({"qa": [{"question": "Q"}]}, "context is not text"),
        ({"context": "C", "qa": []}, "qa is not a list of questions"),
        ({"context": "C", "qa": [{"question": "Q", "answers": "A"}]}, "answers is not a list"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "no message of the assistant"),
        ({"messages": [{"role": "user", "content": ["Q"]}]}, "content is not text"),
        ({"messages": "hello"}, "messages is not a list of turns"),
        ({"instruction": "I"}, "output is not text"),
    ],
)
def test_wrong_rows_say_why(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse_row(row)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_reads_mixed_schemas_and_counts_broken_rows(name, tmp_path, tokenizer):
    path = write(tmp_path / name, QA, "{oops", "", {"a": 1}, "null", CHAT, "[", ALPACA)
    source = JsonlSource(path)
    found = source.load(tokenizer)
    assert [texts(c)[-1][1] for c in found] == ["Me", "Yes", "A", "Done."]
    assert source.report == {
        "rows": 7,
        "conversations": 4,
        "not JSON": 2,
        "unknown schema": 1,
        "not an object": 1,
    }
    assert source.first_broken["not JSON"] == f"{path}:2"
    assert source.first_broken["unknown schema"] == f"{path}:4"
    assert [c.source for c in found] == ["docs", "docs", "rows", "rows"]
    assert len({c.id for c in found}) == 4 and all(c.id for c in found)


def test_jsonl_limit_and_repeated_loading(tmp_path, tokenizer):
    source = JsonlSource(write(tmp_path / "rows.jsonl", "x", QA, CHAT), limit=2)
    assert len(source.load(tokenizer)) == len(source.load(tokenizer)) == 2
    assert source.report == {"rows": 2, "conversations": 2, "not JSON": 1}


def test_jsonl_refuses_a_missing_and_an_unusable_file(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="nowhere.jsonl' is not a file"):
        JsonlSource(str(tmp_path / "nowhere.jsonl")).load(tokenizer)
    path = write(tmp_path / "bad.jsonl", "x", "y", {"a": 1})
    with pytest.raises(ValueError, match=r"2 x not JSON \(first .*bad.jsonl:1\).*expected rows"):
        JsonlSource(path).load(tokenizer)
    with pytest.raises(ValueError, match="it is empty"):
        JsonlSource(write(tmp_path / "empty.jsonl")).load(tokenizer)
    with pytest.raises(ValueError, match="limit is 0"):
        JsonlSource(path, limit=0)


def test_hub_rows_are_parsed_alike(monkeypatch, tokenizer):
    import datasets

    rows = datasets.Dataset.from_list([ALPACA, {**ALPACA, "output": None}, ALPACA])
    asked = {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = HubSource("owner/name", split="test", revision="abc")
    found = source.load(tokenizer)
    assert asked == {"name": "owner/name", "split": "test", "revision": "abc"}
    assert len(found) == 2 and texts(found[1])[-1] == ("assistant", "Done.")
    assert found[1].id == "owner/name:2"
    assert source.report == {"rows": 3, "conversations": 2, "output is not text": 1}


def test_synthetic_samples_follow_from_the_index(tokenizer):
    source = SyntheticSource(["passkey", "niah_single"], tokens=(600, 900), size=6, seed=1)
    first, second = source.load(tokenizer), source.load(tokenizer)
    assert [first[i] for i in (5, 0)] == [second[i] for i in (5, 0)]
    assert len(first) == 6 and len(list(first)) == 6
    assert [c.source for c in first] == ["synthetic/passkey", "synthetic/niah_single"] * 3
    lengths = [len(tokenizer(c.messages[0]["content"])["input_ids"]) for c in first]
    assert min(lengths) > 450 and max(lengths) <= 900 and len(set(lengths)) > 3
    other = SyntheticSource(["passkey"], tokens=700, size=1, seed=2).load(tokenizer)
    assert other[0] != first[0]


def test_synthetic_refuses_wrong_arguments():
    with pytest.raises(ValueError, match="expected some of passkey"):
        SyntheticSource(["nothing"], 100, 1)
    with pytest.raises(ValueError, match=r"the smaller one first: \[100, 200\]"):
        SyntheticSource(["passkey"], (200, 100), 1)


def test_synthetic_lengths_too_short_for_a_task_are_refused_when_loaded(tokenizer):
    """Not at the first sample that draws such a length, hours into a training."""
    source = SyntheticSource(["passkey", "niah_multivalue"], (100, 600), size=3, haystack="noise")
    with pytest.raises(ValueError, match="no sample of .* can be made: tokens is 100, too few"):
        source.load(tokenizer)
    with pytest.raises(ValueError, match="haystack '/nope' is not a file"):
        SyntheticSource(["passkey"], 600, size=3, haystack="/nope").load(tokenizer)


def test_a_synthetic_sample_longer_than_those_tried_is_skipped(tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "PROBES", 0)
    source = SyntheticSource(["passkey"], 20, size=3, haystack="noise")
    with pytest.raises(SkippedRow, match="passkey:0:1 skipped: tokens too few for the task"):
        source.load(tokenizer)[1]


def test_yaml_fills_the_constructors():
    parser = ArgumentParser()
    parser.add_argument("--train", type=list[Source])
    config = [
        {"class_path": "datamodules.sources.JsonlSource", "init_args": {"path": "a.jsonl"}},
        {"class_path": "datamodules.sources.ParquetSource", "init_args": {"path": "a.parquet"}},
        {"class_path": "datamodules.sources.HubSource", "init_args": {"name": "owner/name"}},
        {
            "class_path": "datamodules.sources.SyntheticSource",
            "init_args": {"tasks": ["passkey"], "tokens": [512, 1024], "size": 3},
        },
    ]
    # The method has another name in older versions.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    made = instantiate(parser.parse_object({"train": config})).train
    assert [type(s) for s in made] == [JsonlSource, ParquetSource, HubSource, SyntheticSource]
    assert made[3].tokens == (512, 1024)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the shared data is not at {DATA}")
def test_real_files_are_read_whole(tokenizer):
    paths = sorted(p for folder in ("train", "eval") for p in (DATA / folder).glob("*.jsonl.gz"))
    assert paths
    for path in paths:
        source = JsonlSource(str(path), limit=200)
        found = source.load(tokenizer)
        assert not source.first_broken, source.report
        assert all(m["content"].strip() for m in found[-1].messages)


def names(conversations) -> list[str]:
    return [c.messages[-1]["content"] for c in conversations]


def share(answer: str) -> dict:
    return {"instruction": "I", "output": answer}


def test_places_are_of_the_file(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", "x", QA, "", CHAT)
    places = [c.place for c in JsonlSource(path).load(tokenizer)]
    assert places == [f"{path}:2#0", f"{path}:2#1", f"{path}:4"]


def test_folders_and_patterns_take_files_in_order(tmp_path, tokenizer):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.jsonl", share("2"), share("3"))
    write(tmp_path / "a.jsonl.gz", share("1"))
    write(tmp_path / "deep" / "c.jsonl", share("4"))
    (tmp_path / "notes.txt").write_text("not data")
    source = JsonlSource(str(tmp_path))
    found = source.load(tokenizer)
    assert names(found) == ["1", "2", "3", "4"] and found[-1] == found[3]
    assert source.report == {"rows": 4, "conversations": 4}
    assert names(JsonlSource(str(tmp_path), limit=2).load(tokenizer)) == ["1", "2"]
    assert names(JsonlSource(str(tmp_path / "*.jsonl")).load(tokenizer)) == ["2", "3"]
    assert names(JsonlSource(str(tmp_path / "**/c*")).load(tokenizer)) == ["4"]
    with pytest.raises(ValueError, match="nor a folder or a pattern"):
        JsonlSource(str(tmp_path / "*.json")).load(tokenizer)
    write(tmp_path / "c.jsonl", "x")
    with pytest.raises(ValueError, match=r"1 x not JSON \(first .*c.jsonl:1\)"):
        JsonlSource(str(tmp_path)).load(tokenizer)


def test_streamed_lines_are_the_same(tmp_path, tokenizer):
    rows = [QA, "{oops", "", CHAT, " ", ALPACA, share("caf\u00e9"), {**ALPACA, "output": "\u20ac"}]
    path = write(tmp_path / "rows.jsonl", *rows)
    held, streamed = JsonlSource(path), JsonlSource(path, streaming=True)
    assert list(streamed.load(tokenizer)) == list(held.load(tokenizer))
    assert streamed.report == held.report and streamed.first_broken == held.first_broken
    packed = write(tmp_path / "rows.jsonl.gz", QA)
    with pytest.raises(ValueError, match="unpack it, or leave streaming off"):
        JsonlSource(packed, streaming=True).load(tokenizer)


def test_a_streamed_file_that_changed_gives_skips(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", share("1"), share("2"))
    found = JsonlSource(path, streaming=True).load(tokenizer)
    write(tmp_path / "rows.jsonl", share("1"))
    assert names([found[0]]) == ["1"]
    with pytest.raises(SkippedRow, match="changed while in use"):
        found[1]


def test_parquet_rows_are_parsed_alike(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    rows = [QA, CHAT, SHARE, ALPACA, {**ALPACA, "output": None}, {"id": "empty"}]
    table = pyarrow.Table.from_pylist([{**dict.fromkeys(FIELDS), **row, "n": 1} for row in rows])
    path = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(table, path)
    source = ParquetSource(path)
    found = source.load(tokenizer)
    assert [texts(c) for c in found] == [texts(c) for row in rows[:4] for c in parse_row(row)]
    assert (found[0].id, found[2].id, found[2].place) == ("doc-0#0", "rows:1", f"{path}:1")
    assert source.report["rows"] == 6
    assert source.first_broken == {
        "output is not text": f"{path}:4",
        "unknown schema": f"{path}:5",
    }
    pyarrow.parquet.write_table(table.slice(3, 1), tmp_path / "more.parquet")
    assert len(ParquetSource(str(tmp_path)).load(tokenizer)) == 6
    assert len(ParquetSource(str(tmp_path), limit=3).load(tokenizer)) == 3
    unknown = str(tmp_path / "other.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), unknown)
    with pytest.raises(ValueError, match="2 x unknown schema"):
        ParquetSource(unknown).load(tokenizer)


def test_a_streamed_data_set_is_read_up_to_its_limit(monkeypatch, tokenizer):
    import datasets

    read = []

    def rows():
        for i in range(100):
            read.append(i)
            yield {**ALPACA, "output": str(i) if i else None}

    def load_dataset(name, streaming, **options):
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = HubSource("owner/name", limit=3, streaming=True).load(tokenizer)
    assert names(found) == ["1", "2", "3"] and names(found) == ["1", "2", "3"]
    assert found[0].place == "owner/name:1" and max(read) < 10
    with pytest.raises(ValueError, match="streaming owner/name needs a limit"):
        HubSource("owner/name", streaming=True)
