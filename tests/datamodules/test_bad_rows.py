"""Whatever a file holds: counted and skipped, or refused at the start; never a crash later."""

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules import rows
from datamodules.conversations import Conversation, SkippedRow
from datamodules.datamodule import ConversationDataModule
from datamodules.encoder import ConversationEncoder
from datamodules.rows import FIELDS, parse_row
from datamodules.sources import JsonlSource, ParquetSource
from tests.tiny_tokenizer import tiny_tokenizer

GOOD = {"instruction": "Say 1.", "output": "1"}
TOKENIZER = tiny_tokenizer()

texts = st.one_of(
    st.sampled_from(["", " \n\t", "user", "assistant", "<|end|>", "\ud800", "\x00", "é"]),
    st.text(max_size=8),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "question", "answers", "x"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": texts}
)
questions = st.fixed_dictionaries({"question": texts, "answers": st.lists(texts, max_size=2)})
fuzz = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=5),
    st.fixed_dictionaries({"messages": st.lists(turns, max_size=5)}),
    st.fixed_dictionaries({"context": texts, "qa": st.lists(questions, max_size=3), "id": values}),
    st.fixed_dictionaries({"instruction": texts, "output": texts, "input": values}),
    values,
)


@given(fuzz)
@settings(max_examples=400)
def test_a_row_gives_samples_or_a_reason(row):
    try:
        found = parse_row(row)
    except ValueError as error:
        assert type(error) is ValueError and len(str(error)) < 60
        return
    encoder = ConversationEncoder(TOKENIZER, max_prompt_tokens=12, max_answer_tokens=4)
    for conversation in found:
        conversation.id.encode()
        try:
            sample = encoder(conversation)
        except SkippedRow as error:
            assert len(error.reason) < 60
            continue
        ends = [0, *(x for span in sample.answers for x in span)]
        assert ends == sorted(set(ends)) and ends[-1] == len(sample.input_ids) <= 16
        assert all(b - a <= 4 for a, b in sample.answers)


@given(
    st.lists(st.one_of(fuzz.map(json.dumps).map(str.encode), st.binary(max_size=30)), max_size=8)
)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_a_file_of_anything_is_trained_on_to_its_end(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    path.write_bytes(b"\n".join([*lines, json.dumps(GOOD).encode(), *lines]))
    reports = []
    for streaming in (False, True):
        source = JsonlSource(str(path), streaming=streaming)
        data = ConversationDataModule([source], max_prompt_tokens=12, max_answer_tokens=4)
        data.tokenizer = TOKENIZER
        data.setup("fit")
        batches = list(data.train_dataloader())
        for batch in batches:
            data.count(batch)
        (report,) = data.report()["train"].values()
        reports.append(report)
        assert report["used"] == report["conversations"] == len(batches)
    assert reports[0] == reports[1]


def report_of(path, *, cls=JsonlSource, **options) -> dict:
    data = ConversationDataModule([cls(str(path))], **options)
    data.tokenizer = TOKENIZER
    data.setup("fit")
    for batch in data.train_dataloader():
        data.count(batch)
    (report,) = data.report()["train"].values()
    return report


def test_each_kind_is_counted_with_its_first_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps(GOOD),
        json.dumps({**GOOD, "output": " "}),
        json.dumps({"context": " \n", "qa": [{"question": "Q", "answers": ["A"]}]}),
        json.dumps({"context": "C", "qa": [{"question": "Q", "answers": []}] * 2}),
        '{"instruction": "cut off in the mid',
        json.dumps({**GOOD, "output": None}),
        json.dumps({"messages": []}),
        json.dumps({**GOOD, "output": "\ud800"}),
        json.dumps({**GOOD, "instruction": "\t"}),
        json.dumps({"messages": [{"role": "tool", "content": "T"}, *turns_of("A")]}),
        "[" * 100_000,
        '{"instruction": ' + "9" * 5000 + "}",
        json.dumps({**GOOD, "output": "long " * 40}),
    ]
    path.write_bytes("\n".join(lines).encode() + b'\n{"instruction": "caf\xe9"}\n')
    report = report_of(path, max_answer_tokens=10)
    counted = {why: (found["count"], found["first"]) for why, found in report["skipped"].items()}
    assert counted == {
        "no answer": (3, f"{path}:2"),
        "empty context": (1, f"{path}:3"),
        "not JSON": (3, f"{path}:5"),
        "output is not text": (1, f"{path}:6"),
        "no message of the assistant": (1, f"{path}:7"),
        "not valid Unicode": (1, f"{path}:8"),
        "empty prompt": (1, f"{path}:9"),
        "the chat template takes no tool results": (1, f"{path}:10"),
        "not UTF-8": (1, f"{path}:14"),
    }
    assert (report["rows"], report["answers_cut"] > 0) == (14, True)


def turns_of(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]


def test_a_row_that_is_too_long_is_not_even_held(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_MAX_LINE", 100)
    monkeypatch.setattr(rows, "MAX_CHARACTERS", 30)
    path = tmp_path / "rows.jsonl"
    long, longer = ({**GOOD, "output": "x" * n} for n in (31, 1000))
    path.write_text("\n".join(map(json.dumps, (GOOD, long, longer, GOOD, longer))))
    for streaming in (False, True):
        source = JsonlSource(str(path), streaming=streaming)
        assert [c.place for c in source.load(TOKENIZER)] == [f"{path}:1", f"{path}:4"]
        assert source.first_broken == {
            "output is over 30 characters": f"{path}:2",
            "line over 100 bytes": f"{path}:3",
        }


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_a_file_in_another_encoding_is_refused(encoding, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        "\n".join([json.dumps({**GOOD, "output": "é"}, ensure_ascii=False)] * 3).encode(encoding)
    )
    with pytest.raises(ValueError, match="no usable row; broken rows: .*not (UTF-8|JSON)"):
        report_of(path)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\r\n\r\n" + json.dumps(GOOD), encoding="utf-8-sig")
    report = report_of(path)
    assert (report["used"], report["skipped"]) == (2, {})


def test_files_that_are_broken_as_a_whole_are_refused(tmp_path):
    packed = gzip.compress("\n".join([json.dumps({**GOOD, "id": i}) for i in range(9)]).encode())
    (tmp_path / "half.jsonl.gz").write_bytes(packed[:-20])
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps(GOOD))
    (tmp_path / "rows.parquet").write_text(json.dumps(GOOD))
    for name in ("half.jsonl.gz", "plain.jsonl.gz"):
        with pytest.raises(ValueError, match="cannot be read to its end.*is complete"):
            report_of(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be read to its end"):
        report_of(tmp_path / "rows.parquet", cls=ParquetSource)


@pytest.mark.filterwarnings("ignore")
def test_workers_report_the_same(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{**GOOD, "output": "" if i % 3 == 0 else str(i)} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    alone, shared = (report_of(path, num_workers=n, batch_size=2) for n in (0, 2))
    assert alone["skipped"] == {"no answer": {"count": 4, "first": f"{path}:1"}}
    assert alone == shared


def test_a_template_that_fails_as_python_does_skips_the_row():
    broken = tiny_tokenizer()
    broken.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(SkippedRow, match="refused by the chat template"):
        ConversationEncoder(broken)(Conversation(tuple(turns_of("A"))))
