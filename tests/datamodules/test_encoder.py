import pickle

import pytest
import torch

from datamodules.conversations import Conversation, SkippedRow, end_of_turn_id
from datamodules.encoder import ConversationEncoder, cut_window
from tests.tiny_tokenizer import tiny_tokenizer


def cut_tokens(ids, limit, cut):
    start, end = cut_window(len(ids), limit, cut)
    return ids[:start] + ids[end:]


def conversation(prompt: str = "What?", answer: str = "That.") -> Conversation:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Conversation(messages, source="test", id="row-1")


def test_prompt_is_the_template_and_answer_ends_the_turn(tokenizer):
    sample = ConversationEncoder(tokenizer)(conversation())
    text = tokenizer.decode(sample.input_ids)
    assert text == "<|user|>What?<|end|><|assistant|>That.<|end|>"
    assert tokenizer.decode(sample.input_ids[sample.prompt_length :]) == "That.<|end|>"
    assert sample.input_ids.dtype == torch.int64 and sample.input_ids.ndim == 1
    assert (sample.cut, sample.answers_cut, sample.source, sample.id) == (0, 0, "test", "row-1")


def test_earlier_turns_belong_to_the_prompt(tokenizer):
    turns = [("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2")]
    messages = [{"role": r, "content": c} for r, c in [*turns, ("assistant", "A2")]]
    sample = ConversationEncoder(tokenizer)(Conversation(tuple(messages)))
    prompt = tokenizer.decode(sample.input_ids[: sample.prompt_length])
    assert prompt == (
        "<|system|>S<|end|><|user|>Q1<|end|><|assistant|>A1<|end|><|user|>Q2<|end|><|assistant|>"
    )


def test_without_a_template_messages_are_joined_by_blank_lines():
    plain = tiny_tokenizer(chat=False)
    sample = ConversationEncoder(plain)(conversation())
    assert plain.decode(sample.input_ids) == "What?\n\nThat.<|eos|>"
    assert plain.decode(sample.input_ids[: sample.prompt_length]) == "What?\n\n"


def test_end_of_turn_comes_from_the_template_else_eos(tokenizer):
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    plain = tiny_tokenizer(chat=False)
    assert end_of_turn_id(plain) == plain.eos_token_id
    refusing = tiny_tokenizer()
    refusing.chat_template = "{{ raise_exception('no') }}"
    assert end_of_turn_id(refusing) == refusing.eos_token_id


@pytest.mark.parametrize(
    ("cut", "limit", "kept"),
    [
        ("middle", 4, [0, 1, 8, 9]),
        ("middle", 5, [0, 1, 2, 8, 9]),
        ("middle", 1, [0]),
        ("left", 4, [6, 7, 8, 9]),
        ("right", 4, [0, 1, 2, 3]),
        ("middle", 10, list(range(10))),
        ("left", 11, list(range(10))),
    ],
)
def test_cut_window(cut, limit, kept):
    assert cut_tokens(list(range(10)), limit, cut) == kept


@pytest.mark.parametrize("cut", ["middle", "left", "right"])
def test_a_long_prompt_is_cut_and_its_answer_is_not(cut, tokenizer):
    long = conversation(prompt="abcdefghij" * 10)
    whole = ConversationEncoder(tokenizer)(long)
    sample = ConversationEncoder(tokenizer, max_prompt_tokens=20, cut=cut)(long)
    assert sample.prompt_length == 20
    assert sample.cut == whole.prompt_length - 20 > 0
    prompt = whole.input_ids[: whole.prompt_length].tolist()
    assert sample.input_ids[:20].tolist() == cut_tokens(prompt, 20, cut)
    assert torch.equal(sample.input_ids[20:], whole.input_ids[whole.prompt_length :])


def test_a_long_answer_loses_its_end(tokenizer):
    whole = ConversationEncoder(tokenizer)(conversation(answer="xyz" * 10))
    sample = ConversationEncoder(tokenizer, max_answer_tokens=7)(conversation(answer="xyz" * 10))
    n = sample.prompt_length
    assert len(sample.input_ids) == n + 7
    assert sample.answers_cut == len(whole.input_ids) - n - 7
    assert torch.equal(sample.input_ids, whole.input_ids[: n + 7])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (conversation(answer=" \n"), "no answer"),
        (conversation(prompt=""), "empty prompt"),
        (Conversation(({"role": "assistant", "content": "A"},)), "empty prompt"),
        (
            Conversation(
                ({"role": "poet", "content": "Q"}, {"role": "assistant", "content": "A"}), id="t"
            ),
            "refused by the chat template",
        ),
    ],
)
def test_unusable_rows_say_why(row, reason, tokenizer):
    with pytest.raises(SkippedRow) as error:
        ConversationEncoder(tokenizer)(row)
    assert error.value.reason == reason
    assert pickle.loads(pickle.dumps(error.value)).reason == reason


def test_wrong_arguments_are_refused(tokenizer):
    with pytest.raises(ValueError, match="max_prompt_tokens is 0"):
        ConversationEncoder(tokenizer, max_prompt_tokens=0)
    with pytest.raises(ValueError, match="cut is 'end', expected one of middle, left, right"):
        ConversationEncoder(tokenizer, cut="end")
    with pytest.raises(ValueError, match="expected the last one to be 'assistant'"):
        Conversation(({"role": "user", "content": "Q"},), id="x")
