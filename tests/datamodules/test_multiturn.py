import pytest
import torch

from datamodules.conversations import Conversation, SkippedRow
from datamodules.encoder import ConversationEncoder, cut_spans, cut_window
from tests.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

TURNS = [("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2")]
STRIPPING = CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim")
# As reasoning models do: what was thought is dropped once the conversation has gone on.
FORGETTING = CHAT_TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]")
# Says how many messages there are, so nothing of a shorter rendering is a prefix of a longer one.
COUNTING = "<|system|>{{ messages | length }}<|end|>" + CHAT_TEMPLATE


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple({"role": r, "content": c} for r, c in turns or TURNS), id="c")


def with_template(template: str | None):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def answers(tokenizer, sample) -> list[str]:
    return [tokenizer.decode(sample.input_ids[a:b]) for a, b in sample.answers]


def test_every_answer_labels_what_stands_before_it(tokenizer):
    sample = ConversationEncoder(tokenizer)(conversation())
    assert answers(tokenizer, sample) == ["A1<|end|>", "A2<|end|>"]
    assert tokenizer.decode(sample.input_ids[: sample.answers[0][0]]) == (
        "<|system|>S<|end|><|user|>Q1<|end|><|assistant|>"
    )
    assert sample.answers[-1] == (sample.prompt_length, len(sample.input_ids))
    assert (sample.answers_unmatched, sample.answers_removed) == (0, 0)


def test_the_tokens_are_those_of_the_template(tokenizer):
    turns = [
        ("user", "x y  z"),
        ("assistant", " a magic  number"),
        ("user", "\n?"),
        ("assistant", "b"),
    ]
    sample = ConversationEncoder(tokenizer)(conversation(*turns))
    whole = tokenizer.apply_chat_template(list(conversation(*turns).messages))["input_ids"]
    assert sample.input_ids.tolist() == whole
    assert answers(tokenizer, sample) == [" a magic  number<|end|>", "b<|end|>"]


def test_plain_text_has_several_answers_too():
    plain = tiny_tokenizer(chat=False)
    sample = ConversationEncoder(plain)(conversation())
    assert answers(plain, sample) == ["A1", "A2<|eos|>"]


def test_a_template_that_strips_is_followed():
    tokenizer = with_template(STRIPPING)
    turns = [("user", "Q1"), ("assistant", " A1\n"), ("user", "Q2"), ("assistant", "A2")]
    sample = ConversationEncoder(tokenizer)(conversation(*turns))
    assert answers(tokenizer, sample) == ["A1<|end|>", "A2<|end|>"]


@pytest.mark.parametrize(
    ("template", "thought", "unmatched"), [(FORGETTING, "hm</think>", 1), (COUNTING, "", 1)]
)
def test_answers_that_the_template_rewrites_label_nothing(template, thought, unmatched):
    tokenizer = with_template(template)
    turns = [("user", "Q1"), ("assistant", thought + "A1"), ("user", "Q2"), ("assistant", "A2")]
    sample = ConversationEncoder(tokenizer)(conversation(*turns))
    assert answers(tokenizer, sample) == ["A2<|end|>"]
    assert sample.answers_unmatched == unmatched


def test_a_greeting_and_a_blank_turn_are_no_answers(tokenizer):
    turns = [("assistant", "Hello"), ("user", "Q1"), ("assistant", " "), ("user", "Q2")]
    sample = ConversationEncoder(tokenizer)(conversation(*turns, ("assistant", "A2")))
    assert answers(tokenizer, sample) == ["A2<|end|>"] and sample.answers_unmatched == 0
    with pytest.raises(SkippedRow, match="c skipped: empty prompt"):
        ConversationEncoder(tokenizer)(conversation(("assistant", "Hello"), ("assistant", "A")))


def test_long_earlier_answers_stay_and_label_with_their_start(tokenizer):
    turns = [("user", "Q1"), ("assistant", "xyz" * 9), ("user", "Q2"), ("assistant", "uvw" * 9)]
    whole = ConversationEncoder(tokenizer)(conversation(*turns))
    sample = ConversationEncoder(tokenizer, max_answer_tokens=5)(conversation(*turns))
    (first, last), length = whole.answers, len(whole.input_ids)
    assert sample.answers == ((first[0], first[0] + 5), (last[0], last[0] + 5))
    assert torch.equal(sample.input_ids, whole.input_ids[: last[0] + 5])
    assert sample.answers_cut == (first[1] - first[0] - 5) + (length - last[0] - 5)


def test_cutting_takes_answers_whole_or_not_at_all():
    spans = ((4, 6), (10, 14))
    assert cut_window(20, 20, "left", spans) == (20, 20)
    assert cut_window(20, 15, "left", spans) == (0, 6)  # 5 would split the first answer
    assert cut_window(20, 17, "left", spans) == (0, 3)
    assert cut_window(20, 12, "middle", spans) == (6, 14)
    assert cut_window(20, 12, "right", spans) == (10, 20)
    assert cut_spans(spans, (0, 3)) == ((1, 3), (7, 11))
    assert cut_spans(spans, (0, 4)) == ((6, 10),)  # nothing is left for the first to label
    assert cut_spans(spans, (6, 14)) == ((4, 6),)
    assert cut_spans(spans, (20, 20)) == spans


@pytest.mark.parametrize("cut", ["left", "middle", "right"])
def test_every_cut_of_a_conversation_keeps_whole_answers(cut, tokenizer):
    turns = [(role, f"{role[0]}{i}" * 3) for i in range(4) for role in ("user", "assistant")]
    whole = ConversationEncoder(tokenizer)(conversation(*turns))
    texts = answers(tokenizer, whole)
    for limit in range(1, whole.prompt_length + 1):
        sample = ConversationEncoder(tokenizer, max_prompt_tokens=limit, cut=cut)(
            conversation(*turns)
        )
        assert 0 < sample.prompt_length <= limit
        assert sample.cut == whole.prompt_length - sample.prompt_length
        kept = answers(tokenizer, sample)
        assert kept[-1] == texts[-1] and [t for t in texts if t in kept] == kept
        assert len(kept) + sample.answers_removed == 4
        assert sample.answers[0][0] > 0
