import dataclasses

import pytest
import torch

from datamodules.conversations import Conversation, SkippedRow, exchange
from datamodules.datamodule import ConversationDataModule
from datamodules.dataset import CachedEncoder
from datamodules.encoder import (
    ASKING_TOKENS,
    REPEAT,
    REPEAT_AFTER,
    BranchEncoder,
    Branching,
    ConversationEncoder,
)
from datamodules.rows import parse_row
from datamodules.sources import SyntheticSource
from locret.training.segments import Segment
from tests.datamodules.test_datamodule import Numbers
from tests.datamodules.test_multiturn import conversation
from tests.tiny_tokenizer import tiny_tokenizer

BOTH = ("answer", "replay")
TEXT = "".join(f"{i}, " for i in range(200))
QUIZ = {"context": TEXT, "qa": [{"question": f"Q{i}?", "answers": [f"A{i}"]} for i in range(9)]}
ENDING = "<|end|><|assistant|>"


def text(said: str = TEXT) -> Conversation:
    return Conversation(exchange(said, ""), context=said)


def encoder(kinds=BOTH, tokenizer=None, prompt=10240, answer=512, cut="middle", **options):
    branching = Branching(tuple(kinds), **options)
    return BranchEncoder(tokenizer or tiny_tokenizer(), branching, prompt, answer, cut)


def told(sample, tokenizer) -> tuple[str, list[tuple[str, str]]]:
    """The trunk's text, and of each branch what stands before the answer, and the answer."""
    ids = sample.input_ids
    pairs = zip(sample.branches, sample.answers, strict=True)
    branches = [(ids[start:begins], ids[begins:end]) for (start, end), (begins, _) in pairs]
    trunk = tokenizer.decode(ids[: sample.prompt_length])
    return trunk, [(tokenizer.decode(a), tokenizer.decode(b)) for a, b in branches]


def check_layout(sample) -> None:
    """Branches fill what is behind the trunk; each ends with its answer."""
    edges = [sample.prompt_length, *(end for _, end in sample.branches)]
    assert [start for start, _ in sample.branches] == edges[:-1]
    assert edges[-1] == len(sample.input_ids) and edges[0] > 0
    for (start, end), (begins, ends) in zip(sample.branches, sample.answers, strict=True):
        assert start <= begins < ends == end


def test_a_question_and_the_context_again(tokenizer):
    row = parse_row({"context": "Some text.", "qa": [{"question": "Who?", "answers": ["Me"]}]})
    sample = encoder()(row[0])
    check_layout(sample)
    assert told(sample, tokenizer) == (
        "<|user|>Some text.",
        [
            (f"\n\nWho?{ENDING}", "Me<|end|>"),
            (REPEAT + ENDING, "Some text."),
        ],
    )
    assert (sample.cut, sample.answers_cut, sample.answers_removed) == (0, 0, 0)


def test_trunk_and_answer_are_the_tokens_of_the_whole_prompt(tokenizer):
    (row,) = parse_row({"context": TEXT, "qa": [{"question": "Who?", "answers": ["Me"]}]})
    assert torch.equal(
        encoder(["answer"])(row).input_ids, ConversationEncoder(tokenizer)(row).input_ids
    )


def test_other_questions_of_a_context_are_branches_too(tokenizer):
    rows = parse_row(QUIZ)
    samples = [encoder(["answer"], max_answers=3)(row) for row in rows]
    asked = [[question for question, _ in told(sample, tokenizer)[1]] for sample in samples]
    assert all(len(set(questions)) == 3 for questions in asked)
    assert [questions[0] for questions in asked] == [f"\n\nQ{i}?{ENDING}" for i in range(9)]
    assert len({tuple(questions[1:]) for questions in asked}) > 3
    again = encoder(["answer"], max_answers=3)(rows[0])
    assert torch.equal(again.input_ids, samples[0].input_ids)
    assert len(encoder(["answer"], max_answers=1)(rows[0]).branches) == 1
    assert len(encoder(["answer"], max_answers=20)(rows[0]).branches) == 9


def test_a_question_without_an_answer_asks_the_others(tokenizer):
    qa = [{"question": "Q", "answers": []}, {"question": "R", "answers": ["A"]}]
    sample = encoder(["answer"])(parse_row({"context": "C", "qa": qa})[0])
    assert told(sample, tokenizer)[1] == [(f"\n\nR{ENDING}", "A<|end|>")]


def test_a_long_context_is_copied_in_pieces(tokenizer):
    sample = encoder(["replay"], copy_tokens=100)(text())
    check_layout(sample)
    context = sample.input_ids[1 : sample.prompt_length]  # behind <|user|>
    copies = [sample.input_ids[start:end] for start, end in sample.answers]
    assert torch.equal(torch.cat(copies), context) and {len(c) for c in copies[:-1]} == {100}
    _, branches = told(sample, tokenizer)
    assert branches[0][0] == REPEAT + ENDING
    before = tokenizer.decode(context[192:200])
    assert branches[2][0] == REPEAT_AFTER + before + ENDING


def test_pieces_are_drawn_where_there_are_more(tokenizer):
    whole = encoder(["replay"], copy_tokens=50)(text())
    few = encoder(["replay"], copy_tokens=50, copies=3)(text())
    _, pieces = told(few, tokenizer)
    _, all_pieces = told(whole, tokenizer)
    assert len(pieces) == 3 < len(all_pieces)
    places = [all_pieces.index(piece) for piece in pieces]
    assert places == sorted(places) and places != [0, 1, 2]


def test_a_long_text_keeps_a_window_that_is_drawn(tokenizer):
    starts = set()
    for i in range(6):
        said = f"text {i}: {TEXT}"
        sample = encoder(["replay"], prompt=50)(text(said))
        assert sample.prompt_length == 50 and sample.cut > 0
        window = tokenizer.decode(sample.input_ids[1:50])
        assert window in said
        starts.add(said.index(window))
    assert len(starts) > 3


@pytest.mark.parametrize("cut", ["middle", "left", "right"])
def test_a_long_conversation_is_cut_as_it_says(cut, tokenizer):
    sample = encoder(prompt=60, cut=cut)(parse_row(QUIZ)[0])
    trunk, _ = told(sample, tokenizer)
    assert sample.prompt_length == 60 and trunk.startswith("<|user|>")
    assert trunk.startswith("<|user|>0, 1, ") == (cut != "left")
    assert trunk.endswith("198, 199, ") == (cut != "right")


def test_answers_have_a_bound_and_long_questions_go(tokenizer):
    long = "abcdefghij" * ASKING_TOKENS
    qa = [{"question": "Q", "answers": [long]}, {"question": long, "answers": ["A"]}]
    first, second = parse_row({"context": "C", "qa": qa})
    sample = encoder(answer=7)(first)
    assert [end - start for start, end in sample.answers] == [7, 1]
    assert sample.answers_cut > 0 and sample.answers_removed == 1
    with pytest.raises(SkippedRow, match="question over 256 tokens"):
        encoder(["answer"])(dataclasses.replace(second, questions=()))


def test_other_conversations_go_on_from_their_last_text(tokenizer):
    turns = [("system", "S"), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2")]
    sample = encoder()(conversation(*turns, ("assistant", "A2")))
    said = "Q1<|end|><|assistant|>A1<|end|><|user|>Q2"
    assert told(sample, tokenizer) == (
        f"<|system|>S<|end|><|user|>{said}",
        [(ENDING, "A2<|end|>"), (REPEAT + ENDING, said)],
    )


def test_without_a_chat_template_blank_lines_stand_between():
    plain = tiny_tokenizer(chat=False)
    row = parse_row({"context": "Some text.", "qa": [{"question": "Who?", "answers": ["Me"]}]})
    trunk, branches = told(encoder(tokenizer=plain)(row[0]), plain)
    assert trunk == "Some text."
    assert branches == [("\n\nWho?\n\n", "Me<|eos|>"), (f"{REPEAT}\n\n", "Some text.")]


def test_what_gives_no_branch_is_skipped_with_a_reason():
    with pytest.raises(SkippedRow, match="no answer"):
        encoder(["answer"])(text())
    with pytest.raises(SkippedRow, match="empty prompt"):
        encoder()(text(" "))
    with pytest.raises(SkippedRow, match="nothing of the prompt left"):
        encoder(prompt=1)(text())
    with pytest.raises(SkippedRow, match="leaves a text out"):
        deaf = tiny_tokenizer()
        deaf.chat_template = "{{ messages[0]['content'][:5] }}"
        encoder(tokenizer=deaf)(text())


def test_wrong_settings_are_refused():
    for kinds in ((), ("quiz",)):
        with pytest.raises(ValueError, match="expected answer, replay or both"):
            Branching(kinds)
    for number in ("max_answers", "copy_tokens", "copies"):
        with pytest.raises(ValueError, match=f"{number} is 0"):
            Branching(BOTH, **{number: 0})
    with pytest.raises(ValueError, match="context that is not how"):
        Conversation(exchange("text", "A"), context="other")


@pytest.mark.parametrize("copies", [None, 2])
def test_no_sample_has_more_tokens_than_promised(copies):
    encode = encoder(prompt=100, answer=5, copy_tokens=30, max_answers=2, copies=copies)
    most = encode.branching.most_tokens(100, 5)
    assert most == 100 + 2 * 261 + (100 + 4 * 256 if copies is None else 60 + 2 * 256)
    for row in (*parse_row(QUIZ), text()):
        assert len(encode(row).input_ids) <= most
    bounds = {"max_prompt_tokens": 100, "max_answer_tokens": 5, "max_batch_tokens": 2 * most - 1}
    settings = {"branches": BOTH, "copy_tokens": 30, "max_answers": 2, "copies": copies}
    ConversationDataModule([Numbers()], batch_size=1, **bounds, **settings)
    with pytest.raises(ValueError, match=f"a batch of 2 may have {2 * most} tokens"):
        ConversationDataModule([Numbers()], batch_size=2, **bounds, **settings)


def set_up(*sources, **options) -> ConversationDataModule:
    data = ConversationDataModule(list(sources), **options)
    data.tokenizer = tiny_tokenizer()
    data.setup()
    return data


def test_rows_hold_branches_at_their_offsets():
    source = SyntheticSource(["passkey"], tokens=(300, 500), size=4)
    data = set_up(source, batch_size=2, branches=BOTH, copy_tokens=200)
    singles = {i.sample.id: i.sample for i in map(data._datasets["train"].__getitem__, range(4))}
    for batch in data.train_dataloader():
        for info, segment in zip(batch["samples"], batch["segments"], strict=True):
            alone = singles[info.id]
            row = batch["input_ids"][0, segment.start : segment.end]
            assert torch.equal(row, alone.input_ids)
            spans = (segment.answers, segment.branches)
            moved = [tuple((a - segment.start, b - segment.start) for a, b in s) for s in spans]
            assert moved == [alone.answers, alone.branches] and len(alone.branches) > 1
    assert isinstance(segment, Segment)


def test_synthetic_trunks_end_where_the_question_begins(tokenizer):
    source = SyntheticSource(["niah_single"], tokens=300, size=1)
    (row,) = source.load(tokenizer)
    trunk, ((asking, answer), (_, copy)) = told(encoder()(row), tokenizer)
    assert trunk == f"<|user|>{row.context}" and copy == row.context
    assert asking.startswith("\n\nWhat is the special magic number for")
    assert answer.startswith("The special magic number for")


def test_a_cache_keeps_branches_and_tells_them_apart(tmp_path):
    row = parse_row(QUIZ)[0]
    plain = encoder(max_answers=2)(row)
    first, other = (CachedEncoder(encoder(max_answers=n), str(tmp_path)) for n in (2, 3))
    for _ in range(2):
        found = first(row)
        assert torch.equal(found.input_ids, plain.input_ids)
        assert (found.answers, found.branches) == (plain.answers, plain.branches)
    assert len(other(row).branches) == 4
    assert first.path(row) != first.path(dataclasses.replace(row, questions=()))


@pytest.mark.parametrize("branches", [None, ["answer", "replay"]])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
def test_contexts_are_those_of_training_in_another_order(branches, weights):
    data = set_up(Numbers(6, name="a"), Numbers(6, name="b"), branches=branches, weights=weights)
    dataset = data._datasets["train"]
    samples = [dataset[i].sample for i in range(12)]
    trunks = [s.input_ids[: s.prompt_length].tolist() for s in samples]
    found = [ids.tolist() for ids in data.contexts(30)]
    assert len(found) == 30 and all(ids in trunks for ids in found)
    assert [ids.tolist() for ids in data.contexts(30)] == found
    drawn = [trunks[i] for i in data.train_dataloader().sampler]
    assert found[: len(drawn)] != drawn
