import dataclasses
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from datamodules import dataset
from datamodules.conversations import Conversation, SkippedRow
from datamodules.dataset import CachedEncoder
from datamodules.encoder import ConversationEncoder
from tests.datamodules.test_multiturn import conversation
from tests.tiny_tokenizer import tiny_tokenizer


class Counting(ConversationEncoder):
    calls = 0

    def __call__(self, conversation):
        self.calls += 1
        return super().__call__(conversation)


def cached(folder, tokenizer=None, **options) -> CachedEncoder:
    return CachedEncoder(Counting(tokenizer or tiny_tokenizer(), **options), str(folder))


def same(first, second) -> bool:
    a, b = (dataclasses.asdict(sample) for sample in (first, second))
    return torch.equal(a.pop("input_ids"), b.pop("input_ids")) and a == b


def test_a_sample_is_made_once_and_read_alike(tmp_path, tokenizer):
    row = dataclasses.replace(conversation(), source="s")
    plain = ConversationEncoder(tokenizer, max_prompt_tokens=12)(row)
    first, second = (cached(tmp_path, max_prompt_tokens=12) for _ in range(2))
    assert same(first(row), plain) and same(second(row), plain)
    assert second(row).input_ids.dtype == torch.int64 and plain.cut > 0
    assert (first.encoder.calls, second.encoder.calls) == (1, 0)
    renamed = dataclasses.replace(row, id="other", source="t")
    assert (second(renamed).id, second(renamed).source) == ("other", "t")


def test_all_that_matters_is_in_the_key(tmp_path):
    row = conversation()
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("<|end|>", "<|end|>\n")
    grown = tiny_tokenizer()
    grown.add_tokens(["Q1"])
    paths = [
        cached(tmp_path).path(row),
        cached(tmp_path).path(conversation(("user", "Q"), ("assistant", "A"))),
        cached(tmp_path).path(conversation(("user", "QA"), ("assistant", ""))),
        cached(tmp_path, max_prompt_tokens=9).path(row),
        cached(tmp_path, max_answer_tokens=9).path(row),
        cached(tmp_path, cut="left").path(row),
        *(cached(tmp_path, tokenizer).path(row) for tokenizer in (other, grown)),
    ]
    assert len(set(paths)) == len(paths)
    assert cached(tmp_path).path(row) == paths[0]


@pytest.mark.parametrize("damage", [b"", b"junk", b"a\n{}\n"])
def test_a_broken_file_is_written_anew(damage, tmp_path):
    row, encode = conversation(), cached(tmp_path)
    sample = encode(row)
    good = encode.path(row).read_bytes()
    for bad in (damage, good[:-3], good[:-1] + bytes([good[-1] ^ 1])):
        encode.path(row).write_bytes(bad)
        assert same(encode(row), sample)
        assert encode.path(row).read_bytes() == good
    assert encode.encoder.calls == 4


def test_what_gives_no_sample_is_not_kept(tmp_path):
    encode = cached(tmp_path)
    for text in (" ", "\ud800"):
        with pytest.raises(SkippedRow):
            encode(conversation(("user", "Q"), ("assistant", text)))
    assert not list(tmp_path.rglob("*"))


def test_writers_at_the_same_time_do_no_harm(tmp_path):
    rows = [Conversation(conversation().messages, id=str(i)) for i in range(40)]
    encode = cached(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        samples = list(pool.map(encode, rows))
    assert all(torch.equal(s.input_ids, samples[0].input_ids) for s in samples)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [encode.path(rows[0])]


def test_files_are_for_whom_the_umask_says(tmp_path):
    row, encode = conversation(), cached(tmp_path)
    before = os.umask(0o027)
    try:
        encode(row)
    finally:
        os.umask(before)
    assert stat.S_IMODE(encode.path(row).stat().st_mode) == 0o640


def test_a_full_disk_warns_once_and_changes_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    row, encode = conversation(), cached(tmp_path)
    monkeypatch.setattr(dataset.os, "replace", full)
    with pytest.warns(UserWarning, match="No space left") as warned:
        assert same(encode(row), encode(row))
    assert len(warned) == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache_dir .* cannot be made"):
        cached(tmp_path / "file" / "cache")
