import os
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from datamodules.conversations import Conversation
from datamodules.datamodule import ConversationDataModule, ResumableLoader, ResumableSampler
from datamodules.sources import SyntheticSource
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
        self.seen.append(number(self.tokenizer, batch))
        return self.weight.sum()

    def validation_step(self, batch, index):
        self.validated.append(number(self.tokenizer, batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def number(tokenizer, batch) -> int:
    ids, start = batch["input_ids"], int(batch["prompt_length"])
    return int(tokenizer.decode(ids[0, start:-1]))


def fit(
    folder: Path,
    *,
    workers: int = 0,
    resume: str | None = None,
    fail_at: int = -1,
    val: bool = False,
    source: Numbers | None = None,
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
    data = ConversationDataModule(
        [source or Numbers()], [Numbers(3)] if val else None, seed=1, num_workers=workers
    )
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
    assert set(batch) == {"input_ids", "prompt_length", "cut"}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"].shape[0] == 1 and batch["input_ids"].ndim == 2
    assert batch["prompt_length"].tolist() == [400] and batch["input_ids"].shape[1] > 400
    assert batch["cut"].shape == (1,) and batch["cut"].item() > 0


def test_report_counts_samples_skips_and_cuts():
    data = set_up(Numbers(4, blank=(1,), name="a"), Numbers(2, name="b"), max_prompt_tokens=3)
    assert len(list(data.train_dataloader())) == 6
    report = data.report()["train"]
    assert report["samples"] == {"a": 4, "b": 2}
    assert report["skipped"] == {"no answer": 1}
    assert report["cut"]["prompts"] == 6 and report["cut"]["prompt_tokens"] > 6
    assert report["cut"]["answers"] == 0


def test_a_source_given_twice_counts_twice():
    data = set_up(Numbers(2), Numbers(2))
    assert len(data.train_dataloader()) == 4
    assert sum(data.report()["train"]["samples"].values()) == 4


def test_nothing_usable_is_refused():
    data = set_up(Numbers(3, blank=(0, 1, 2)))
    with pytest.raises(ValueError, match="all 3 conversations were skipped: {'no answer': 3}"):
        next(iter(data.train_dataloader()))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="batch_size is 2"):
        ConversationDataModule([Numbers()], batch_size=2)
    with pytest.raises(ValueError, match="train is empty"):
        ConversationDataModule([])
    with pytest.raises(ValueError, match="no tokenizer"):
        ConversationDataModule([Numbers()]).setup("fit")


def test_replicas_share_an_epoch_evenly():
    parts = [list(ResumableSampler(range(N), num_replicas=2, rank=rank)) for rank in range(2)]
    assert [len(part) for part in parts] == [4, 4]
    assert set(parts[0]) | set(parts[1]) == set(range(N))


def test_the_loader_resumes_without_a_trainer_too():
    def loader() -> ResumableLoader:
        sampler = ResumableSampler(range(N), num_replicas=1, rank=0, seed=3)
        return ResumableLoader(range(N), sampler=sampler, batch_size=None)

    whole = loader()
    whole.sampler.set_epoch(1)
    order = list(whole)
    stopped = loader()
    stopped.sampler.set_epoch(1)
    batches = iter(stopped)
    begun = [next(batches) for _ in range(3)]
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.state_dict() == stopped.state_dict()
    assert begun + list(resumed) == order
