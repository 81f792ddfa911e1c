"""Contexts by id: in memory and on disk, those used least recently make room."""

import os
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch

import locret
from locret.serve.contexts import Contexts
from locret.serve.requests import Ask, TooLong, UnknownContext
from locret.serve.service import Service
from tests.serve.conftest import SMALL, WAIT, text_of
from tests.tiny_models import tiny_heads, tiny_model


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 1_000_000_000.0

    def __call__(self):
        self.now += 1  # a second from one look to the next, so that no two uses are equal
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def read(twin, ids):
    return lambda length=40, seed=0: twin.prefill(torch.tensor([ids(length, seed)]))


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    return tmp_path / "contexts" if request.param == "disk" else None


def known(contexts):
    return [info.id for info in contexts.list()]


def test_stored_and_found(folder, read, twin):
    contexts = Contexts(folder)
    cache = read()
    info = contexts.put(cache)
    assert (info.tokens, info.units, info.bytes) == (40, 20, cache.nbytes)
    assert contexts.info(info.id) == info and contexts.get(info.id, twin.model).seen == 40
    assert contexts.put(read()).id != info.id
    assert contexts.bytes_in_memory == 2 * info.bytes
    contexts.delete(info.id)
    for look in (contexts.info, contexts.get, contexts.delete):
        with pytest.raises(UnknownContext):
            look(info.id)
    assert contexts.count == 1


@pytest.mark.parametrize(
    "id", ["", "..", "../../etc/passwd", "ctx_" + "a" * 21, "ctx_" + "/" * 22, "ctx_a\0", None, 7]
)
def test_other_ids_are_not_looked_for(folder, id):
    contexts = Contexts(folder)
    for look in (contexts.info, contexts.get, contexts.delete):
        with pytest.raises(UnknownContext):
            look(id)


def test_those_used_least_recently_make_room(folder, read, twin, clock):
    size = read().nbytes
    contexts = Contexts(folder, most_bytes=3 * size, clock=clock)
    first, second, third = (contexts.put(read(seed=n)).id for n in range(3))
    contexts.get(first, twin.model)
    fourth = contexts.put(read(seed=3)).id
    assert known(contexts) == [fourth, first, third]
    with pytest.raises(UnknownContext):
        contexts.get(second, twin.model)
    with pytest.raises(TooLong, match="may take"):
        Contexts(folder, most_bytes=size - 1).put(read())


def test_time_to_live_counts_from_the_last_use(folder, read, twin, clock):
    contexts = Contexts(folder, ttl_seconds=100, clock=clock)
    used, unused = contexts.put(read()).id, contexts.put(read()).id
    clock.now += 60
    contexts.get(used, twin.model)
    clock.now += 60
    assert contexts.info(used)
    with pytest.raises(UnknownContext):
        contexts.info(unused)
    assert known(contexts) == [used]
    clock.now += 200
    assert known(contexts) == []
    assert folder is None or [*folder.iterdir()] == []


def test_looking_is_no_use(read, clock):
    contexts = Contexts(ttl_seconds=100, clock=clock)
    id = contexts.put(read()).id
    for _ in range(5):
        clock.now += 30
        known(contexts)
    with pytest.raises(UnknownContext):
        contexts.info(id)


def test_a_restart_finds_them(tmp_path, make, ids, expected, read, clock):
    before = Contexts(tmp_path, clock=clock)
    info, other = before.put(read(60)), before.put(read(9))
    again = Contexts(tmp_path, clock=clock)
    assert again.count == 2
    assert known(again) == [other.id, info.id]
    assert again.bytes_in_memory == 0
    service = make(contexts=again)
    service.start()
    text, end = text_of(service.ask(Ask(ids(5), info.id, max_tokens=8)))
    assert text == expected(ids(5), read(60)) and end.usage.cached_tokens == 60
    assert again.bytes_in_memory == info.bytes
    assert known(Contexts(tmp_path)) == [info.id, other.id]  # in the order of their use


@pytest.mark.parametrize(
    "settings", [{"budget": 10}, {"quantization": "kivi"}, {"positions": "original"}], ids=str
)
def test_a_context_stays_as_another_server_read_it(
    settings, tmp_path, read, ids, expected, tokenizer
):
    """Its budget, storage and positions are its own."""
    info = Contexts(tmp_path).put(read(60))
    model = tiny_model("llama", vocab_size=len(tokenizer))
    engine = locret.Engine(model, heads=tiny_heads(model), **SMALL | settings)
    with closing(Service(engine, tokenizer, contexts=Contexts(tmp_path))) as service:
        service.start()
        text, end = text_of(service.ask(Ask(ids(5), info.id, max_tokens=8)))
        assert text == expected(ids(5), read(60)) and end.usage.units == 20 + 5 + 8 - 1


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_larger_context_of_another_server_leaves_less_of_the_window(
    positions, tmp_path, make, ids, tokenizer
):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    whole = locret.Engine(model, "full", chunk_size=None, positions=positions)
    info = Contexts(tmp_path).put(whole.prefill(torch.tensor([ids(1000)])))
    service = make(contexts=Contexts(tmp_path))
    service.start()
    _, end = text_of(service.ask(Ask(ids(20), info.id)))
    assert end.usage.completion_tokens == 1024 - 1000 - 20
    with pytest.raises(TooLong, match="a prompt of 23 tokens would fit"):
        service.ask(Ask(ids(30), info.id, max_tokens=1))


def test_a_context_that_cannot_be_evicted_from_is_told(tmp_path, read, ids, tokenizer):
    """And no other question of its batch is harmed."""
    model = tiny_model("llama", vocab_size=len(tokenizer))
    engine = locret.Engine(model, heads=tiny_heads(model), **SMALL, decode_interval=4)
    contexts = Contexts(tmp_path)
    infos = [contexts.put(cache) for cache in (read(60), engine.prefill(torch.tensor([ids(60)])))]
    with closing(Service(engine, tokenizer, contexts=contexts)) as service:
        answers = [service.ask(Ask(ids(5), info.id, max_tokens=8)) for info in infos]
        service.start()
        with pytest.raises(UnknownContext, match="without decode_interval.*; upload it again"):
            list(answers[0].events(WAIT))
        assert text_of(answers[1])[1].usage.completion_tokens == 8


def test_others_see_what_one_process_does(tmp_path, read, twin):
    one, two = Contexts(tmp_path), Contexts(tmp_path)
    id = one.put(read()).id
    assert two.get(id, twin.model).seen == 40
    two.delete(id)
    with pytest.raises(UnknownContext):
        one.get(id)


def test_memory_holds_some_of_them(tmp_path, read, twin, clock):
    size = read().nbytes
    contexts = Contexts(tmp_path, memory_bytes=2 * size, clock=clock)
    stored = [contexts.put(read(seed=n)).id for n in range(4)]
    assert contexts.bytes_in_memory == 2 * size and contexts.count == 4
    assert all(contexts.get(id, twin.model).seen == 40 for id in stored)
    assert contexts.bytes_in_memory == 2 * size
    contexts.forget_loaded()
    assert contexts.bytes_in_memory == 0


def test_a_context_with_a_changed_byte_is_not_there(tmp_path, read, twin):
    id = Contexts(tmp_path).put(read()).id
    file = tmp_path / id / "units.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(UnknownContext, match=f"{id} is damaged, .* upload it again"):
        Contexts(tmp_path).get(id, twin.model)


def test_damaged_and_unfinished_files(tmp_path, read, make, ids):
    contexts = Contexts(tmp_path)
    damaged, cut = contexts.put(read()).id, contexts.put(read()).id
    (tmp_path / damaged / "units.safetensors").write_bytes(b"no")
    (tmp_path / f"{cut}.json").write_text("{")
    unfinished = tmp_path / f"ctx_{'A' * 22}"
    unfinished.mkdir()
    os.utime(unfinished, (1, 1))
    again = Contexts(tmp_path)
    assert known(again) == [damaged] and not unfinished.exists()
    service = make(contexts=again)
    service.start()
    with pytest.raises(UnknownContext, match="is damaged, or was read by another model"):
        list(service.ask(Ask(ids(5), damaged)).events(WAIT))
    with pytest.raises(UnknownContext):
        service.ask(Ask(ids(5), cut))


def test_what_cannot_be_written_leaves_nothing(tmp_path, read, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    contexts = Contexts(tmp_path)
    monkeypatch.setattr("locret.serve.contexts.os.utime", full)
    with pytest.raises(OSError, match="No space"):
        contexts.put(read())
    assert [*tmp_path.iterdir()] == [] and contexts.count == 0


@pytest.mark.parametrize("folder", ["/proc", "/proc/contexts", __file__])
def test_a_folder_that_cannot_be_written_is_refused(folder):
    with pytest.raises(OSError, match=f"cannot write contexts to {folder}: "):
        Contexts(Path(folder))


def test_used_by_several_threads(tmp_path, read, twin):
    contexts = Contexts(tmp_path, most_bytes=3 * read().nbytes)
    caches, failures = [read(seed=n) for n in range(4)], []

    def use(cache):
        try:
            for _ in range(5):
                id = contexts.put(cache).id
                contexts.list()
                try:
                    contexts.get(id, twin.model)
                    contexts.delete(id)
                except UnknownContext:
                    continue  # another thread needed the room
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert contexts.count <= 3
