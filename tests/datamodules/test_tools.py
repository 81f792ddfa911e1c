"""Rows with content parts, tool calls, tool results and tools."""

import dataclasses
import json

import pytest

from datamodules.conversations import SkippedRow
from datamodules.dataset import CachedEncoder
from datamodules.encoder import ConversationEncoder
from datamodules.rows import parse_row
from datamodules.sources import JsonlSource, ParquetSource
from tests.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}" + (
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Qwen2.5 and others do it; behind the end of a turn comes a line break.
TOOLS = "{% if tools %}<|system|>{{ tools | map('tojson') | join(',') }}<|end|>\n{% endif %}"
CALLS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "2"}
QUESTION = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "It is 2."}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ROW = {"messages": [QUESTION, ASKED, RESULT, ANSWER], "tools": [TOOL]}


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def encoded(row, template=TOOLS + CALLS):
    """Text of the sample of a row, and of each of its answers."""
    tokenizer = with_template(template)
    (conversation,) = parse_row(row)
    sample = ConversationEncoder(tokenizer)(conversation)
    assert sample.answers_unmatched == 0
    ids = sample.input_ids.tolist()
    return tokenizer.decode(ids), [tokenizer.decode(ids[a:b]) for a, b in sample.answers]


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def test_text_parts_are_joined_in_questions_and_answers():
    row = {
        "messages": [
            {"role": "user", "content": parts("Read this.", "What is it?")},
            {"role": "assistant", "content": parts("A", "B")},
        ]
    }
    (found,) = parse_row(row)
    assert [m["content"] for m in found.messages] == ["Read this.\nWhat is it?", "A\nB"]
    assert encoded(row, CHAT_TEMPLATE)[1] == ["A\nB<|end|>"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([*parts("Q"), {"type": "image_url", "image_url": {"url": "a"}}], "has image_url, not"),
        ([{"type": "input_audio", "input_audio": {}}], "content has input_audio, not text"),
        ([{"type": "x" * 99}], "content has a part that is unknown, not text"),
        ([{"text": "Q"}], "content has a part that is unknown, not text"),
        ([{"type": "text", "text": None}], "text of a content part is not text"),
        (["Q"], "content is not text"),
        ({"type": "text", "text": "Q"}, "content is not text"),
    ],
)
def test_parts_that_are_not_text_are_refused_by_name(content, reason):
    with pytest.raises(ValueError, match=reason):
        parse_row({"messages": [{"role": "user", "content": content}, ANSWER]})


def test_parts_of_nothing_are_an_empty_prompt():
    with pytest.raises(SkippedRow, match="empty prompt"):
        encoded({"messages": [{"role": "user", "content": []}, ANSWER]})


def test_tools_calls_and_results_go_through_the_template():
    text, answers = encoded(ROW)
    assert text == (
        f"<|system|>{json.dumps(TOOL)}<|end|>\n<|user|>1+1?<|end|>\n"
        '<|assistant|><call>add {"a": 1}</call><|end|>\n'
        "<|tool|>2<|end|>\n<|assistant|>It is 2.<|end|>"
    )
    assert answers == ['<call>add {"a": 1}</call><|end|>', "It is 2.<|end|>"]


def test_a_call_may_be_the_last_answer_and_come_with_words():
    said = {**ASKED, "content": "Let me see."}
    text, answers = encoded({"messages": [QUESTION, said, RESULT], "tools": [TOOL]})
    assert answers == ['Let me see.<call>add {"a": 1}</call><|end|>']
    assert text.endswith(answers[0])


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "add", "arguments": {"a": 1}}},
        {"name": "add", "arguments": {"a": 1}, "id": None},
        CALL,
    ],
)
def test_calls_are_read_in_the_forms_that_rows_have(call):
    row = {"messages": [QUESTION, {**ASKED, "tool_calls": [call]}], "tools": json.dumps([TOOL])}
    assert encoded(row)[1] == ['<call>add {"a": 1}</call><|end|>']


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (CHATML, ROW, "the chat template takes no tool calls"),
        (CHATML, {"messages": [QUESTION, {**ASKED, "content": ""}]}, "takes no tool calls"),
        (CHATML, {"messages": [QUESTION, ANSWER], "tools": [TOOL]}, "takes no tools"),
        (CALLS, ROW, "the chat template takes no tools"),
        (CHAT_TEMPLATE, {"messages": [QUESTION, RESULT, ANSWER]}, "takes no tool results"),
        (None, ROW, "no chat template, which tools need"),
        # The name of the function stands elsewhere in the conversation.
        (TOOLS + CHATML, ROW, "the chat template takes no tool calls"),
    ],
)
def test_a_row_is_skipped_if_the_template_leaves_tools_out(template, row, reason):
    with pytest.raises(SkippedRow, match=reason) as error:
        encoded(row, template)
    assert len(error.value.reason) < 60


def test_a_call_that_is_written_in_another_way_behind_a_prompt_is_skipped():
    thinking = (TOOLS + CALLS).replace("<|assistant|>{% endif", "<|assistant|><think>{% endif")
    with pytest.raises(SkippedRow, match="tool call not written behind its prompt"):
        encoded({"messages": [QUESTION, ASKED], "tools": [TOOL]}, thinking)
    (conversation,) = parse_row(ROW)
    sample = ConversationEncoder(with_template(thinking))(conversation)
    assert (len(sample.answers), sample.answers_unmatched) == (1, 1)


def test_rows_without_tools_are_written_as_before():
    text, answers = encoded({"messages": [QUESTION, ANSWER], "tools": []}, CHATML)
    assert text == "<|user|>1+1?<|end|><|assistant|>It is 2.<|end|>"
    assert answers == ["It is 2.<|end|>"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tool_calls": "add"}, "tool_calls is not a list of objects"),
        ({"tool_calls": [{"function": {}}]}, "a tool call has no name"),
        ({"tool_calls": [{"name": "add", "arguments": "{"}]}, "of a tool call are not JSON"),
        ({"tool_calls": [{"name": "add", "arguments": [1]}]}, "are not an object"),
        ({"tool_calls": [{"name": "add", "arguments": {"a": b"x"}}]}, "a tool is not JSON"),
        ({"function_call": {"name": "add"}, "content": ""}, "function_call is there"),
        ({"tool_calls": []}, "content is not text"),
    ],
)
def test_unusable_calls_say_why(change, reason):
    with pytest.raises(ValueError, match=reason) as error:
        parse_row({"messages": [QUESTION, {"role": "assistant", "content": None, **change}]})
    assert len(str(error.value)) < 60


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("[", "tools are not JSON"),
        ({"name": "add"}, "tools is not a list of objects"),
        ([{"type": "function"}], "a tool has no name"),
    ],
)
def test_unusable_tools_say_why(tools, reason):
    with pytest.raises(ValueError, match=reason):
        parse_row({"messages": [QUESTION, ANSWER], "tools": tools})


def test_half_a_surrogate_pair_in_a_call_is_skipped():
    call = {"name": "add", "arguments": {"a": "\ud800"}}
    with pytest.raises(SkippedRow, match="not valid Unicode"):
        encoded({"messages": [QUESTION, {**ASKED, "tool_calls": [call]}]})


def test_the_cache_tells_calls_and_tools_apart(tmp_path):
    encode = CachedEncoder(ConversationEncoder(with_template(TOOLS + CALLS)), str(tmp_path))
    (row,) = parse_row(ROW)
    other = {**ASKED, "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}
    (changed,) = parse_row({**ROW, "messages": [QUESTION, other, RESULT, ANSWER]})
    without = dataclasses.replace(row, tools=())
    assert len({encode.path(each) for each in (row, changed, without)}) == 3
    assert encode(row).input_ids.tolist() == encode(row).input_ids.tolist()


def test_tools_come_from_files_too(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    plain = {"messages": [{"role": "user", "content": parts("Q")}, ANSWER]}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, (ROW, plain))))
    found = JsonlSource(str(tmp_path / "rows.jsonl")).load(tiny_tokenizer())
    assert [len(c.tools) for c in found] == [1, 0]
    # Columns of Arrow have one type: tools as text, missing fields as null.
    rows = [{**ROW, "tools": json.dumps([TOOL])}, {"messages": [QUESTION, ANSWER], "tools": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    stored = ParquetSource(str(tmp_path / "rows.parquet")).load(tiny_tokenizer())
    assert stored[0].tools == found[0].tools
    assert stored[0].messages == found[0].messages
    assert not any(m.get("tool_calls") for m in stored[1].messages)
