"""PEFT adapters of a backbone: found, compared with the model, and put into its weights.

PEFT drops tensors that the model has no place for, and initializes those that the adapter lacks at
random, without an error. So what it is about to load is compared with what the model has, on a
model without weights: an adapter of another model is refused before anything large is loaded.
"""

import contextlib
import importlib.util
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from locret.cache.files import adapted_layers
from locret.heads import hub
from locret.heads.heads import RetainingHeads
from locret.system.files import check_named

RECORD = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_SHOWN = 6  # tensors of a kind that an error names


_MERGED = "locret_adapter"  # the attribute of a model that has an adapter in its weights

_told: "WeakSet[RetainingHeads]" = WeakSet()


def warn_without(heads: RetainingHeads, found: bool, stacklevel: int = 2) -> None:
    """Warn, once for the same heads, if they record an adapter and none is `found`: they score
    units of another model then. Where a model is loaded for them, that is known before."""
    recorded = heads.config.adapter
    if not recorded or found or heads in _told:
        return
    _told.add(heads)
    warnings.warn(
        f"these heads were trained on a model with the adapter {recorded!r}, and none is given: "
        "they will choose worse; name it (--adapter, or adapter= of "
        "locret.model.loading.load_model), unless the model's weights hold it",
        stacklevel=stacklevel + 1,
    )


def has_adapter(model: Any) -> bool:
    """Whether an adapter is beside the weights of a model, and turned on, or in them: merged by
    `Adapter.merged_into`, for those of others do not show it."""
    beside = (layer for layer in adapted_layers(model) if not layer.disable_adapters)
    return hasattr(model, _MERGED) or any(layer.active_adapters for layer in beside)


@dataclass(frozen=True)
class Adapter:
    """An adapter on this machine.

    Attributes:
        name: as asked for.
        folder: where its files are.
    """

    name: str
    folder: Path

    @classmethod
    def find(cls, name: str) -> "Adapter":
        """The adapter of a folder or Hub id. ValueError: PEFT is not installed, there is no
        adapter, or it puts learned tokens or keys and values in front of the prompt: they would
        take slots that no token of the prompt has."""
        if importlib.util.find_spec("peft") is None:
            raise ValueError(f"adapter {name} needs the package peft: pip install peft")
        check_named(name, "the name of the adapter")
        folder = Path(name)
        if not folder.is_dir():
            patterns = [RECORD, *WEIGHTS]
            folder = hub.download(name, patterns=patterns, revision=None, token=None)
        if not (folder / RECORD).is_file():
            raise ValueError(
                f"adapter {name} has no {RECORD}; expected the folder of a PEFT adapter"
            )
        found = cls(name, folder)
        config = found._config()
        if config.is_prompt_learning:
            raise ValueError(
                f"adapter {name} is of type {config.peft_type.value}, which puts learned units in "
                "front of the prompt; expected one that changes weights, such as LoRA"
            )
        return found

    def check_fit(self, config: Any) -> None:
        """Compare the adapter with a model, of which the config is enough. ValueError: tensors
        missing, extra, misshapen or with values that are not numbers, named; the model lacks the
        layers that the adapter is for; or there are no weights that can be read."""
        if not any((self.folder / file).is_file() for file in WEIGHTS):
            raise ValueError(f"adapter {self.name} has none of the files {', '.join(WEIGHTS)}")
        with torch.random.fork_rng(devices=[]):  # a seed means the same with an adapter
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config)
            problems = _problems(*self._wanted_and_given(model))
        if problems:
            raise ValueError(f"adapter {self.name} does not fit the model: {'; '.join(problems)}")

    def merged_into(self, model: Any) -> Any:
        """The model with the adapter in its weights, in their own precision."""
        merged = self.carried_by(model).merge_and_unload()
        setattr(merged, _MERGED, self.name)
        return merged

    def carried_by(self, model: Any) -> Any:
        """The model with the adapter beside its weights."""
        from peft import PeftModel

        with without_old_names():
            return PeftModel.from_pretrained(model, self.folder)

    def _config(self) -> Any:
        from peft import PeftConfig

        try:
            return PeftConfig.from_pretrained(str(self.folder))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{RECORD} of adapter {self.name} is not one that this version of PEFT reads: "
                f"{_one_line(error)}"
            ) from error

    def _wanted_and_given(
        self, model: Any
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """The adapter's tensors in the model, those of the files, and all that the model has.

        Names are the model's, after whatever PEFT does to those of the files on the way.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        stored = self._stored(getattr(model, "_checkpoint_conversion_mapping", {}))
        with self._fitting():
            carrying = self._empty_on(model)
            with _intercepted(carrying) as given:
                try:
                    set_peft_model_state_dict(carrying, stored)
                except KeyError:  # a whole module that the adapter brings is not in the files
                    given.clear()
            own = carrying.state_dict()
            wanted = get_peft_model_state_dict(
                carrying, state_dict=own, save_embedding_layers=False
            )
        if not given:
            return wanted, stored, wanted
        ids = set(map(id, wanted.values()))
        return {name: t for name, t in own.items() if id(t) in ids}, given, own

    def _empty_on(self, model: Any) -> Any:
        """The model, which has no weights, with the adapter beside it, which has none either."""
        from peft import PeftModel

        config = self._config()
        config.inference_mode = True
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = False  # some ways to start need the model's weights
        with without_old_names():
            return PeftModel(model, config, low_cpu_mem_usage=True)

    def _stored(self, key_mapping: Mapping[str, str]) -> dict[str, Tensor]:
        """The files' tensors by their names there."""
        from peft.utils import load_peft_weights

        try:
            return load_peft_weights(str(self.folder), device="cpu", key_mapping=dict(key_mapping))
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"the weights of adapter {self.name} could not be read: {_one_line(error)}"
            ) from error

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"adapter {self.name} does not fit the model: {_one_line(error)}"
            ) from error


@contextlib.contextmanager
def without_old_names() -> Iterator[None]:
    """Silence a warning that users can do nothing about: PEFT still uses an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning
        )
        yield


@contextlib.contextmanager
def _intercepted(model: Any) -> Iterator[dict[str, Tensor]]:
    """What `model` is given to load goes into the dictionary instead."""
    given: dict[str, Tensor] = {}

    def take(module: Any, state: dict[str, Tensor], *rest: Any) -> None:
        given.update(state)
        state.clear()

    handle = model.register_load_state_dict_pre_hook(take)
    try:
        yield given
    finally:
        handle.remove()


def _problems(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> list[str]:
    """What keeps the tensors of an adapter from being loaded, kind by kind.

    Args:
        wanted: tensors that an adapter must bring.
        given: tensors that it brings.
        known: tensors that it may bring: the model's own too, such as embeddings for more tokens.
    """
    misshapen, broken = [], []
    for name, tensor in given.items():
        expected = tuple(known[name].shape) if name in known else None
        if expected is not None and tuple(tensor.shape) != expected:
            misshapen.append(f"{name} is {tuple(tensor.shape)}, expected {expected}")
        elif torch.isnan(tensor).any():  # infinities mean something to some kinds of adapters
            broken.append(name)
    kinds = {
        "missing": [name for name in wanted if name not in given],
        "extra": [name for name in given if name not in known],
        "misshapen": misshapen,
        "not a number in": broken,
    }
    return [f"{kind} {_shortened(names)}" for kind, names in kinds.items() if names]


def _shortened(names: list[str]) -> str:
    """The first names, without what PEFT adds to those of the files and the model."""
    shown = [name.removeprefix("base_model.model.") for name in names[:_SHOWN]]
    shown = [name.replace(".default", "", 1) for name in shown]
    more = len(names) - _SHOWN
    return ", ".join(shown) + f" and {more} more" * (more > 0)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
