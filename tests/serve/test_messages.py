"""From messages to token ids, where templates are missing, refuse, or change what they get."""

import pytest

from locret.serve.fields import PLACE, Prompts
from locret.serve.replies import Refused
from tests.tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer

USER = [{"role": "user", "content": "A quiet otter."}]
TALK = [*USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
CHAT = tiny_tokenizer()


def text_of(ids):
    return CHAT.decode(ids)


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Prompts(tokenizer)


def test_without_a_template_texts_are_read_as_they_are():
    prompts = Prompts(tiny_tokenizer(chat=False))
    assert text_of(prompts.context(USER)) == "A quiet otter."
    assert text_of(prompts.completion(" It is", follows=True)) == " It is"
    for ask in (prompts.chat, prompts.question):
        with pytest.raises(Refused, match="no chat template"):
            ask(USER)


def test_a_template_that_refuses_messages_is_told():
    prompts = with_template("{{ raise_exception('roles must\\n alternate') }}")
    with pytest.raises(Refused, match="refuses the messages: roles must alternate"):
        prompts.chat(USER)


def test_what_other_last_messages_would_begin_with_too_is_shared():
    ids, shared = Prompts(CHAT).chat(TALK)
    other = [*TALK[:-1], {"role": "user", "content": "Where to?"}]
    again, same = Prompts(CHAT).chat(other)
    assert shared == same and ids[:shared] == again[:shared]
    assert text_of(ids[:shared]) == "<|user|>A quiet otter.<|end|><|assistant|>Yes.<|end|>"


def test_nothing_is_shared_where_a_template_writes_earlier_messages_otherwise():
    prompts = with_template("{{ messages | length }}" + CHAT_TEMPLATE)
    assert prompts.chat(TALK)[1] == 0


def test_a_text_that_looks_like_our_place_changes_nothing():
    prompts = Prompts(CHAT)
    odd = [{"role": "system", "content": PLACE}, {"role": "user", "content": f"{PLACE} otter"}]
    assert text_of(prompts.context(odd)) == f"<|system|>{PLACE}<|end|><|user|>{PLACE} otter"
    asked = text_of(prompts.question([{"role": "user", "content": f"{PLACE}?"}]))
    assert asked == f"\n\n{PLACE}?<|end|><|assistant|>"
