import gzip
import json

import pytest
import yaml

from datamodules import texts
from datamodules.conversations import SkippedRow
from datamodules.sources import Source
from datamodules.texts import GeneratedTexts, HubTextSource, TextSource
from locret.system.files import CONFIGS
from locret.tasks.texts import TEXTS
from tests.datamodules.test_branches import set_up
from tests.datamodules.test_sources import write

LONG = "".join(f"Sentence number {i} is here.\n" for i in range(400))


def said(conversations) -> list[str]:
    return [c.context for c in conversations]


def length(tokenizer, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def test_a_document_gives_windows_at_different_places(tmp_path, tokenizer):
    path = tmp_path / "long.txt"
    path.write_text(LONG)
    source = TextSource(str(path), tokens=(50, 100))
    found = source.load(tokenizer)
    windows = said(found)
    assert len(found) == len(LONG) // 400 and source.report["conversations"] == len(found)
    assert all(window in LONG for window in windows)
    assert all(48 <= length(tokenizer, window) <= 100 for window in windows)
    places = [LONG.index(window) for window in windows]
    assert places == sorted(places) and len(set(places)) > len(places) // 2
    assert said(source.load(tokenizer)) == windows
    assert said(TextSource(str(path), (50, 100), seed=1).load(tokenizer)) != windows
    assert len(TextSource(str(path), (50, 100), limit=3).load(tokenizer)) == 3
    assert found[0].place == f"{path}#0" and isinstance(source, Source)


def test_a_folder_takes_all_files_and_counts_broken_ones(tmp_path, tokenizer):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "deep" / "a.py").write_text(LONG)
    (tmp_path / "b.md").write_text(LONG)
    (tmp_path / ".git" / "c.txt").write_text(LONG)
    (tmp_path / "binary.o").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty.txt").write_text(" \n")
    write(tmp_path / "rows.jsonl", {"text": LONG}, {"other": 1}, "{oops", {"text": "\ud800"})
    source = TextSource(str(tmp_path), tokens=200)
    write(tmp_path / "others.jsonl", {"other": 1})
    found = source.load(tokenizer)
    windows = len(LONG) // 800
    assert source.report == {
        "rows": 10,
        "conversations": 3 * windows,
        "a binary file": 1,
        "not UTF-8": 1,
        "an empty text": 1,
        "no text": 2,
        "not JSON": 1,
        "not valid Unicode": 1,
    }
    assert source.first_broken["no text"] == f"{tmp_path / 'others.jsonl'}:1"
    assert len(found) == 3 * windows
    assert len(TextSource(str(tmp_path / "**/*.py"), tokens=200).load(tokenizer)) == windows
    with pytest.raises(ValueError, match="no usable row; broken rows: 1 x a binary file"):
        TextSource(str(tmp_path / "binary.o"), tokens=200).load(tokenizer)
    with pytest.raises(ValueError, match="expected files of text"):
        TextSource(str(tmp_path / "none"), tokens=200).load(tokenizer)


def test_large_files_are_read_in_blocks(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(texts, "_BLOCK", 1001)
    text = "h\u00e9 w\u00f6rld \u20ac. " * 300
    path = tmp_path / "large.txt"
    path.write_text(text, encoding="utf-8")
    source = TextSource(str(path), tokens=40)
    found = source.load(tokenizer)
    assert source.report["rows"] == -(-len(text.encode()) // 1001) and not source.first_broken
    assert all(window in text for window in said(found))


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_rows_have_a_field_of_text(kind, tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / f"rows.{kind}"
    rows = [{"content": LONG, "id": 1}, {"content": None, "id": 2}]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    source = TextSource(str(path), tokens=100, field="content")
    assert all(window in LONG for window in said(source.load(tokenizer)))
    assert source.report["no text"] == 1


def test_rows_of_the_hub(monkeypatch, tokenizer):
    import datasets

    rows = datasets.Dataset.from_list([{"text": LONG}, {"text": ""}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: rows)
    source = HubTextSource("owner/name", tokens=100, limit=5)
    assert len(source.load(tokenizer)) == 5 and str(source) == "HubTextSource(owner/name, train)"
    with pytest.raises(ValueError, match="streaming owner/name needs a limit"):
        HubTextSource("owner/name", tokens=100, streaming=True)


def test_a_short_text_is_skipped_when_drawn(tmp_path, tokenizer):
    (tmp_path / "short.txt").write_text("Short.")
    found = TextSource(str(tmp_path), tokens=(50, 100)).load(tokenizer)
    with pytest.raises(SkippedRow, match="shorter than the least length"):
        found[0]
    (tmp_path / "short.txt").unlink()
    with pytest.raises(SkippedRow, match="changed while in use"):
        found[0]


def test_generated_texts_follow_from_the_index(tokenizer):
    source = GeneratedTexts(tokens=(100, 300), size=30, seed=1)
    first, second = source.load(tokenizer), source.load(tokenizer)
    assert [first[i] for i in (5, 0)] == [second[i] for i in (5, 0)]
    assert [c.source for c in first][: len(TEXTS)] == [f"texts/{kind}" for kind in TEXTS]
    counts = [length(tokenizer, window) for window in said(first)]
    assert max(counts) <= 300 and min(counts) > 80 and len(set(counts)) > 10
    assert said(GeneratedTexts((100, 300), 30, seed=2).load(tokenizer))[0] != first[0].context
    few = GeneratedTexts(100, 2, kinds=["json", "logs"]).load(tokenizer)
    assert [c.source for c in few] == ["texts/json", "texts/logs"]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="expected some of words"):
        GeneratedTexts(100, 1, kinds=["poems"])
    with pytest.raises(ValueError, match="two numbers of at least 1, the smaller one first"):
        GeneratedTexts((200, 100), 1)
    with pytest.raises(ValueError, match="two numbers of at least 1, the smaller one first"):
        TextSource("a.txt", 0)


def test_texts_train_by_replay_alone(tmp_path):
    source = GeneratedTexts(tokens=100, size=4)
    data = set_up(source, branches=["answer", "replay"])
    (segment,) = next(iter(data.train_dataloader()))["segments"]
    assert len(segment.branches) == 1
    with pytest.raises(ValueError, match="were skipped: {'no answer': 4}"):
        set_up(source, branches=["answer"])
    with pytest.raises(ValueError, match="were skipped: {'no answer': 4}"):
        set_up(source)


@pytest.mark.parametrize(
    "name",
    [
        "qwen25_coder",
        "qwen25_coder_adapter",
        "qwen25_coder_code",
        "qwen25_coder_kl",
        "qwen25_coder_paper",
        "smollm2_evicted_adapter",
        "smollm2_answers",
    ],
)
def test_recipes_hold_out_chains_and_several_values(name):
    """So that RULER's `vt` and `multivalue` tell how heads do on what they were not trained on."""
    data = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"]
    tasks = {task for given in data["train"] for task in given["init_args"].get("tasks", ())}
    assert "niah_single" in tasks and not tasks & {"variable_tracking", "niah_multivalue"}
    assert len(data["weights"]) == len(data["train"])
