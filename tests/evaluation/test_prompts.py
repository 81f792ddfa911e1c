"""Where context and question end in the tokens, and what is cut away."""

import pytest

from locret.evaluation.questions import Renderer
from locret.tasks import Sample
from tests.tiny_tokenizer import tiny_tokenizer

SAMPLE = Sample(
    "0", "The key is 17. The sky is blue.", "\nWhat is the key?", ("17",), " The key is"
)


@pytest.mark.parametrize("chat", [True, False])
def test_the_parts_are_the_sample(chat, tokenizer):
    prompt = Renderer(tokenizer, chat).render(SAMPLE)
    whole = tokenizer(prompt.text, add_special_tokens=not chat)["input_ids"]
    assert list(prompt.ids) == whole
    context, question, tail = (
        tokenizer.decode(prompt.ids[a:b])
        for a, b in (
            (0, prompt.context_end),
            (prompt.context_end, prompt.question_end),
            (prompt.question_end, None),
        )
    )
    assert context == ("<|user|>" if chat else "") + SAMPLE.context
    assert question == SAMPLE.question
    assert tail == ("<|end|><|assistant|>The key is" if chat else " The key is")


def test_a_template_may_strip_the_turn(tokenizer):
    sample = Sample("0", "\n The key is 17.", "\nWhat is it?\n\n", ("17",))
    prompt = Renderer(tokenizer, True).render(sample)
    assert tokenizer.decode(prompt.ids[: prompt.context_end]) == "<|user|>The key is 17."
    assert tokenizer.decode(prompt.ids[prompt.question_end :]) == "<|end|><|assistant|>"


@pytest.mark.parametrize("question", ["", "?"])
def test_something_is_always_left_to_read(question, tokenizer):
    sample = Sample("0", "It rains", question, ("x",))
    prompt = Renderer(tokenizer, False).render(sample)
    assert prompt.context_end <= prompt.question_end == len(prompt.ids) - 1


def test_an_empty_context_is_only_the_template(tokenizer):
    prompt = Renderer(tokenizer, True).render(Sample("0", "", "Who?", ("x",)))
    assert tokenizer.decode(prompt.ids[: prompt.context_end]) == "<|user|>"


def test_a_context_is_cut_in_the_middle_and_the_loss_is_counted(tokenizer):
    renderer = Renderer(tokenizer, True)
    filler = "The sky is blue. " * 20
    lost, kept = (
        Sample("0", context, "\nWhat is the key?", ("17",))
        for context in (f"{filler}The key is 17. {filler}", f"The key is 17. {filler}{filler}")
    )
    whole = renderer.render(lost)
    assert renderer.render(lost, len(whole.ids)) == whole
    for sample, gone in ((lost, True), (kept, False)):
        whole = renderer.render(sample)
        prompt = renderer.render(sample, 60)
        assert len(prompt.ids) == 60
        assert prompt.cut == len(whole.ids) - 60
        assert prompt.answer_cut is gone
        rest = whole.ids[whole.context_end :]
        assert prompt.ids[prompt.context_end :] == rest
        assert prompt.ids[:5] == whole.ids[:5]
        assert prompt.key != whole.key
    # An answer in other words than the text's is not said to be lost.
    other = Sample("0", lost.context, lost.question, ("seventeen",))
    assert not renderer.render(other, 60).answer_cut
    with pytest.raises(ValueError, match="cannot be cut to 10 tokens: raise max_length"):
        renderer.render(lost, 10)


def test_what_cannot_be_rendered_is_refused():
    with pytest.raises(ValueError, match="no chat template"):
        Renderer(tiny_tokenizer(chat=False), True)
    rude = tiny_tokenizer()
    rude.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match="changes the user's text"):
        Renderer(rude, True).render(SAMPLE)


def test_a_fingerprint_knows_tokenizer_and_template(tokenizer):
    other = tiny_tokenizer()
    assert Renderer(other, True).fingerprint == Renderer(tokenizer, True).fingerprint
    assert Renderer(other, False).fingerprint != Renderer(other, True).fingerprint
    other.chat_template += "!"
    assert Renderer(other, True).fingerprint != Renderer(tokenizer, True).fingerprint
