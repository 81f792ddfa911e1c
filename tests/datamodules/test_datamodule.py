import os
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from datamodules.conversations import Conversation
from datamodules.datamodule import ConversationDataModule
from datamodules.dataset import Tally
from datamodules.epochs import ResumableLoader, ResumableSampler
from datamodules.sources import SyntheticSource
from locret.training.segments import Segment
from tests.tiny_tokenizer import tiny_tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # quiet about the workers' fork
N = 7


class Numbers:
    """Conversations 0 .. n-1, whose answer is the number; those in `blank` have none."""

    def __init__(self, n: int = N, blank: tuple[int, ...] = (), name: str = "numbers") -> None:
        self.answers = ["" if i in blank else str(i) for i in range(n)]
        self.name = name

    def __str__(self) -> str:
        return self.name

    def load(self, tokenizer) -> list[Conversation]:
        return [
            Conversation(
                ({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": a})
            )
            for i, a in enumerate(self.answers)
        ]


class Recorder(lightning.LightningModule):
    """Notes the number in each batch; fails before it has noted the `fail_at`-th."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.tokenizer = tiny_tokenizer()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_at = fail_at
        self.seen: list[int] = []
        self.validated: list[int] = []

    def training_step(self, batch, index):
        if len(self.seen) == self.fail_at:
            raise RuntimeError("out of memory")
        self.seen.extend(numbers(self.tokenizer, batch))
        self.trainer.datamodule.count(batch)
        return self.weight.sum()

    def validation_step(self, batch, index):
        self.validated.extend(numbers(self.tokenizer, batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def numbers(tokenizer, batch) -> list[int]:
    spans = [segment.answers[-1] for segment in batch["segments"]]
    return [int(tokenizer.decode(batch["input_ids"][0, a : b - 1])) for a, b in spans]


def fit(
    folder: Path,
    *,
    workers: int = 0,
    resume: str | None = None,
    fail_at: int = -1,
    val: bool = False,
    source: Numbers | None = None,
    data: dict | None = None,
    **options,
) -> Recorder:
    callbacks = [
        ModelCheckpoint(folder, "step{step}", every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(folder, "end{step}", save_on_train_epoch_end=True, save_top_k=-1),
        OnExceptionCheckpoint(folder, "failed"),
    ]
    for callback in callbacks[:2]:
        callback.auto_insert_metric_name = False  # type: ignore[attr-defined]
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        **options,
    )
    module = Recorder(fail_at)
    given = {"train": [source or Numbers()], "seed": 1, "num_workers": workers, **(data or {})}
    data = ConversationDataModule(val=[Numbers(3)] if val else None, **given)
    path = resume and str(folder / resume)
    trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=False)
    return module


quiet = pytest.mark.filterwarnings("ignore")  # few workers, small data, no logger: all meant here


@quiet
def test_an_epoch_is_a_permutation_and_each_has_its_own(tmp_path):
    seen = fit(tmp_path, max_epochs=3).seen
    epochs = [seen[i : i + N] for i in range(0, 3 * N, N)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@quiet
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_inside_an_epoch_is_exact(workers, tmp_path):
    whole = fit(tmp_path, max_steps=12, workers=workers).seen
    for step in (3, 9):  # in the first and in the second epoch
        resumed = fit(tmp_path, max_steps=12, workers=workers, resume=f"step{step}.ckpt").seen
        assert resumed == whole[step:]


class Hundreds(Numbers):
    """Numbers from 100 on."""

    def load(self, tokenizer) -> list[Conversation]:
        self.answers = [str(100 + i) for i in range(len(self.answers))]
        return super().load(tokenizer)


@quiet
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_exact_with_packing_and_weights(workers, tmp_path):
    data = {"batch_size": 2, "train": [Numbers(5), Hundreds(4)], "weights": [2.0, 1.0]}
    whole = fit(tmp_path, max_steps=12, workers=workers, data=data)  # epochs of 8 samples
    seen, report = whole.seen, whole.trainer.datamodule.report()
    assert len(seen) == 24 and sum(n >= 100 for n in seen) == 9
    for step in (3, 4, 9):
        resumed = fit(tmp_path, max_steps=12, workers=workers, data=data, resume=f"step{step}.ckpt")
        assert resumed.seen == seen[2 * step :]
        assert resumed.trainer.datamodule.report() == report


@quiet
def test_resuming_an_uneven_last_batch_is_exact(tmp_path):
    data = {"batch_size": 3}  # 3, 3, 1
    seen = fit(tmp_path, max_steps=8, data=data).seen
    assert [len(seen), len(set(seen[:N]))] == [20, N]
    for step, done in ((2, 6), (3, 7), (4, 10)):
        resumed = fit(tmp_path, max_steps=8, data=data, resume=f"step{step}.ckpt").seen
        assert resumed == seen[done:]


@quiet
@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 4}, {"val": True}])
@pytest.mark.parametrize("bound", [{"max_steps": 3 * N}, {"max_epochs": 3}])
def test_resuming_at_the_end_of_an_epoch_is_exact(bound, options, tmp_path):
    whole = fit(tmp_path, **bound, **options).seen
    end = options.get("limit_train_batches", N)
    for name in (f"step{end}.ckpt", f"end{end}.ckpt", f"end{2 * end}.ckpt"):
        step = int("".join(filter(str.isdigit, name)))
        assert fit(tmp_path, resume=name, **bound, **options).seen == whole[step:], name


@quiet
def test_resuming_twice_is_exact(tmp_path):
    whole = fit(tmp_path, max_steps=20).seen
    # The end of an epoch under max_steps is where Lightning's count of epochs goes astray.
    assert fit(tmp_path, max_steps=20, resume=f"end{N}.ckpt").seen == whole[N:]
    assert fit(tmp_path, max_steps=20, resume="step10.ckpt").seen == whole[10:]


@quiet
def test_the_batch_of_a_failed_step_is_repeated(tmp_path):
    whole = fit(tmp_path / "whole", max_steps=12).seen
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(tmp_path, max_steps=12, fail_at=9)
    assert fit(tmp_path, max_steps=12, resume="failed.ckpt").seen == whole[9:]


@quiet
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_rows_keep_the_length_and_the_order(workers, tmp_path):
    blank = Numbers(blank=(2, 3, 6))
    plain = fit(tmp_path / "plain", max_epochs=2).seen
    seen = fit(tmp_path, max_epochs=2, workers=workers, source=blank).seen
    instead = {2: 4, 3: 4, 6: 0}
    assert seen == [instead.get(i, i) for i in plain]
    resumed = fit(tmp_path, max_epochs=2, workers=workers, source=blank, resume="step5.ckpt").seen
    assert resumed == seen[5:]


@quiet
def test_validation_is_in_order(tmp_path):
    assert fit(tmp_path, max_epochs=2, val=True).validated == [0, 1, 2] * 2


@quiet
def test_overfitting_on_a_few_batches_works(tmp_path):
    assert fit(tmp_path, max_epochs=2, overfit_batches=2).seen == [0, 1, 0, 1]


def set_up(*sources, tokenizer=None, **options) -> ConversationDataModule:
    data = ConversationDataModule(list(sources), **options)
    data.tokenizer = tokenizer or tiny_tokenizer()
    data.setup("fit")
    return data


def test_batches_have_the_documented_shapes(tokenizer):
    source = SyntheticSource(["passkey"], tokens=500, size=2)
    data = set_up(source, tokenizer=tokenizer, max_prompt_tokens=400)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "segments", "cut", "samples", "skipped"}
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "cut"))
    n = batch["input_ids"].shape[1]
    assert batch["input_ids"].shape == (1, n)
    assert n > 400
    assert batch["cut"].shape == (1,) and batch["cut"].item() > 0
    assert batch["segments"] == [Segment.single(400, n)]


def test_a_batch_packs_samples_one_after_the_other(tokenizer):
    source = SyntheticSource(["passkey", "niah_single"], tokens=(300, 500), size=5)
    single = {info.id: batch for batch in loader(source) for info in batch["samples"]}
    sizes = []
    for batch in loader(source, batch_size=2):
        sizes.append(len(batch["segments"]))
        assert batch["cut"].shape == (sizes[-1],)
        assert batch["segments"][-1].end == batch["input_ids"].shape[1]
        for info, segment in zip(batch["samples"], batch["segments"], strict=True):
            alone = single[info.id]
            row = batch["input_ids"][0, segment.start : segment.end]
            assert torch.equal(row, alone["input_ids"][0])
            ((start, end),) = segment.answers
            assert (
                start - segment.start == alone["segments"][0].last_prompt_end and end == segment.end
            )
    assert sizes == [2, 2, 1]


def loader(*sources, **options):
    return set_up(*sources, **options).train_dataloader()


def test_a_bound_on_the_row_holds_for_the_fullest_batch():
    bounds = {"max_prompt_tokens": 90, "max_answer_tokens": 10, "max_batch_tokens": 200}
    ConversationDataModule([Numbers()], batch_size=2, **bounds)
    with pytest.raises(ValueError, match="a batch of 3 may have 300 tokens.*is 200"):
        ConversationDataModule([Numbers()], batch_size=3, **bounds)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore")
def test_report_counts_samples_skips_and_cuts_once(workers):
    data = set_up(
        *(Numbers(4, blank=(1,), name="a"), Numbers(2, name="b")),
        max_prompt_tokens=3,
        num_workers=workers,
    )
    for _ in range(2):  # two epochs
        for batch in data.train_dataloader():
            data.count(batch)
    report = data.report()
    a, b = report["train"]["a"], report["train"]["b"]
    assert (a["rows"], a["conversations"], a["used"], a["answers"]) == (4, 4, 8, 8)
    assert (b["rows"], b["conversations"], b["used"], b["answers"]) == (2, 2, 4, 4)
    assert a["skipped"] == {"no answer": {"count": 1, "first": "a[1]"}} and not b["skipped"]
    assert a["cut"] == 8 and a["cut_tokens"] > 8 and a["answers_cut"] == 0
    assert report["repeated"] == 0


def test_counts_go_on_from_a_checkpoint():
    first, second = set_up(Numbers(4, blank=(1,))), set_up(Numbers(4, blank=(1,)))
    batches = list(first.train_dataloader())
    for batch in batches[:2]:
        first.count(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[2:]:
        first.count(batch)
        second.count(batch)
    first.gather_counts()  # one process: nothing to add
    assert first.report() == second.report()
    assert first.report()["train"]["numbers"]["used"] == 4


def test_counts_of_all_processes_are_added_up(monkeypatch):
    data = set_up(Numbers(6, blank=(1,)))
    batches = list(data.train_dataloader())
    for batch in batches[:2]:
        data.count(batch)
    other = Tally()
    for batch in batches[2:]:
        other.add(batch)

    def all_gather_object(states, state):
        states[:] = [state, other.state_dict()]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    data.gather_counts()
    report = data.report()["train"]["numbers"]
    assert report["used"] == 6 and report["skipped"]["no answer"]["count"] == 1


@quiet
def test_a_cache_changes_nothing(tmp_path):
    cache = {"cache_dir": str(tmp_path / "cache")}
    plain = fit(tmp_path / "plain", max_epochs=2).seen
    for workers in (0, 2):
        assert fit(tmp_path / "run", max_epochs=2, data=cache, workers=workers).seen == plain
    assert len([p for p in (tmp_path / "cache").rglob("*") if p.is_file()]) == N


def test_a_source_given_twice_counts_twice():
    data = set_up(Numbers(2), Numbers(2))
    assert len(data.train_dataloader()) == 4
    assert {n: r["rows"] for n, r in data.report()["train"].items()} == {
        "numbers": 2,
        "numbers'": 2,
    }


def test_nothing_usable_is_refused_at_the_start():
    with pytest.raises(ValueError, match="all 3 .* of numbers were skipped: {'no answer': 3}"):
        set_up(Numbers(2, name="good"), Numbers(3, blank=(0, 1, 2)))
    with pytest.raises(ValueError, match="numbers is empty"):
        set_up(Numbers(0))


def test_what_stands_in_for_a_skipped_sample_is_of_the_same_source():
    data = set_up(Numbers(3, blank=(2,), name="a"), Numbers(3, name="b"))
    dataset = data.train_dataloader().dataset
    item = dataset[2]
    assert item.source == "a" and item.skipped[0][:2] == ("a[2]", "no answer")
    assert torch.equal(item.sample.input_ids, dataset[0].sample.input_ids)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="batch_size is 0"):
        ConversationDataModule([Numbers()], batch_size=0)
    with pytest.raises(ValueError, match="train is empty"):
        ConversationDataModule([])
    with pytest.raises(ValueError, match="one for each of 1 sources"):
        ConversationDataModule([Numbers()], weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="samples_per_epoch is 5 and weights is None"):
        ConversationDataModule([Numbers()], samples_per_epoch=5)
    with pytest.raises(ValueError, match="no tokenizer"):
        ConversationDataModule([Numbers()]).setup("fit")


def test_the_loader_resumes_without_a_trainer_too():
    def make() -> ResumableLoader:
        sampler = ResumableSampler(range(N), num_replicas=1, rank=0, seed=3)
        return ResumableLoader(range(N), sampler=sampler, batch_size=None)

    whole = make()
    whole.sampler.set_epoch(1)
    order = list(whole)
    stopped = make()
    stopped.sampler.set_epoch(1)
    batches = iter(stopped)
    begun = [next(batches) for _ in range(3)]
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == stopped.state_dict()
    assert begun + list(resumed) == order


def test_resuming_with_another_batch_size_warns():
    state = loader(Numbers(), batch_size=2).state_dict()
    with pytest.warns(UserWarning, match="{'batch_size': 2}.*{'batch_size': 3}"):
        loader(Numbers(), batch_size=3).load_state_dict(state)
