"""Lists with questions: the same everywhere, within their tokens, and the answers are right."""

import pickle
import re
from collections import Counter

import pytest
from torch.utils.data import DataLoader

from datamodules.lists import KINDS, ListSource
from datamodules.sources import Source
from tests.datamodules.test_branches import set_up


def words(answer):
    return re.findall("[a-z]+", answer.replace(", and ", ", "))


@pytest.mark.parametrize("tokens", [128, (129, 600), 3000, 20_000])
def test_the_words_asked_for_are_the_most_frequent(tokens, tokenizer):
    size = 30 if tokens != 20_000 else 2
    for conversation in ListSource(tokens, size, ["counts"]).load(tokenizer):
        ((question, answer),) = conversation.questions
        asked, times = words(answer), Counter(words(conversation.context))
        assert min(times[word] for word in asked) > max(
            [n for word, n in times.items() if word not in asked], default=0
        )
        number = re.search(r"Which (\d+) words", question)
        assert len(asked) == (int(number[1]) if number else 1)
        assert [word for word in times if word in asked] == asked


@pytest.mark.parametrize("tokens", [128, (129, 600), 3000])
def test_every_name_asked_for_stands_once_with_its_value(tokens, tokenizer):
    for conversation in ListSource(tokens, 12, ["records"]).load(tokenizer):
        assert 1 <= len({*conversation.questions}) == len(conversation.questions) <= 4
        for question, value in conversation.questions:
            name = question.removeprefix("\n\nWhat is the value of ").removesuffix("?")
            first = re.compile(rf"(?<![\w-]){name}(?![\w-])(.*\w.*)")  # it may be a value, too
            (found,) = filter(None, map(first.search, conversation.context.split("\n")))
            assert value in found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_lists_have_close_to_their_tokens(kind, tokenizer):
    for tokens in (128, 1000, 8000):
        for conversation in ListSource(tokens, 3, [kind]).load(tokenizer):
            found = len(tokenizer(conversation.context)["input_ids"])
            assert found <= tokens and (tokens < 1000 or found > 0.85 * tokens)


def test_lists_follow_from_the_index_in_every_process(tokenizer):
    source = ListSource((128, 400), 4, seed=1)
    assert isinstance(source, Source) and str(source) == "ListSource(records, counts, seed 1)"
    lists = [*source.load(tokenizer)]
    assert [each.source for each in lists] == ["lists/records", "lists/counts"] * 2
    assert lists[3] == source.load(tokenizer)[-1] != ListSource((128, 400), 4).load(tokenizer)[3]
    loaded = pickle.loads(pickle.dumps(source.load(tokenizer)))
    workers = DataLoader(loaded, batch_size=None, num_workers=2, collate_fn=lambda each: each)
    assert [*workers] == lists


def test_another_tokenizer_has_lists_of_its_own(tokenizer):
    source = ListSource(128, 2)
    first = source.load(tokenizer)
    before = first[1]
    source.load(lambda text, **options: {"input_ids": text.split()})
    assert first[1] == before


def test_lists_train_by_their_questions():
    data = set_up(ListSource(200, 2), branches=["answer"])
    for batch in data.train_dataloader():
        assert 1 <= len(batch["segments"][0].branches) <= 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kinds": ["poems"]}, "expected some of records, counts"),
        ({"kinds": []}, "expected some of records, counts"),
        ({"tokens": 127}, "tokens is .127, 127.; expected two numbers of at least 128"),
        ({"tokens": (400, 200)}, "the smaller one first"),
        ({"size": 0}, "size is 0"),
    ],
)
def test_wrong_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ListSource(**{"tokens": 200, "size": 1} | given)
