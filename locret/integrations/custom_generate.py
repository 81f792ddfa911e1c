"""`model.generate(..., custom_generate="OWNER/NAME", trust_remote_code=True)`: heads of the Hub in
stock `generate`.

An artifact's `custom_generate/generate.py` (`locret.heads.files`) calls what is here. It
answers as `locret.Engine(model, heads=...).generate` does: settings of the engine are arguments of
the call, all others are those of stock `generate`.
"""

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from locret.cache.cache import RetainedCache
from locret.engine.engine import Engine
from locret.heads.files import WEIGHTS
from locret.heads.heads import RetainingHeads

SETTINGS = frozenset(inspect.signature(Engine.__init__).parameters) - {"self", "model", "heads"}
_OF_LOADING = frozenset(
    ("cache_dir", "force_download", "local_files_only", "proxies", "repo_type", "revision", "token")
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def generate(
    model: Any,
    inputs: Tensor | None = None,
    *,
    heads: RetainingHeads | str | Path | None = None,
    loaded_from: str | None = None,
    **kwargs: Any,
) -> Any:
    """What stock `generate` returns, answered within a budget.

    Args:
        model: a stock transformers causal language model.
        inputs: [B, n] long, or as `input_ids`.
        heads: the heads or where they are; None = the repository that `custom_generate` names.
        loaded_from: the file that calls this, as transformers has stored it: its folder tells the
            commit, so that heads and code are of the same one.
        **kwargs: settings of `locret.Engine`, and arguments of stock `generate`. A `cache` must be
            one of `Engine.prefill`.

    Raises:
        ValueError: no heads are found, no token ids are given, or what the engine refuses.
    """
    loading = {name: kwargs.pop(name, None) for name in _OF_LOADING}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if inputs is None:
        inputs = kwargs.pop("input_ids", None)
    if not isinstance(heads, RetainingHeads):
        revision = loading["revision"]
        if heads is None:
            heads, revision = _repository(), revision or _commit(loaded_from)
        heads = _heads(str(heads), revision, loading["token"], _changed(heads))
    settings = {name: kwargs.pop(name) for name in SETTINGS & kwargs.keys()}
    cache = kwargs.pop("cache", kwargs.pop("past_key_values", None))
    if cache is not None and not isinstance(cache, RetainedCache):
        raise ValueError(
            f"the cache given is a {type(cache).__name__}; leave it out, or give one that "
            "locret.Engine.prefill has read a context into"
        )
    with _stock(model):
        return Engine(model, heads=heads, **settings).generate(inputs, cache=cache, **kwargs)


def _repository() -> str:
    """The name that the call of `generate` gave as `custom_generate`. It is not among the arguments
    that transformers hands on, and the code was copied away from where it lay, so that only the
    frame of that call knows it."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_locals.get("custom_generate")
        if frame.f_code.co_name == "generate" and isinstance(name, str):
            return name
        frame = frame.f_back  # type: ignore[assignment]
    raise ValueError("no heads are named: pass heads=..., a Hub id or a folder")


def _commit(file: str | None) -> str | None:
    """The commit of the repository that transformers copied a file from, if it says so:
    .../OWNER/NAME/COMMIT/custom_generate/generate.py."""
    name = Path(file).parents[1].name if file else ""
    return name if _COMMIT.fullmatch(name) else None


def _changed(source: str | Path) -> float:
    """When the weights of a folder were written; 0 for what is no folder."""
    weights = Path(source) / WEIGHTS
    return weights.stat().st_mtime if weights.is_file() else 0.0


@functools.lru_cache(maxsize=2)
def _heads(source: str, revision: str | None, token: str | None, changed: float) -> RetainingHeads:
    """The heads, read once for many calls; again where the file has `changed`."""
    return RetainingHeads.from_pretrained(source, revision=revision, token=token)


@contextlib.contextmanager
def _stock(model: Any) -> Iterator[None]:
    """Within, `model.generate` is stock again: `from_pretrained` may have put a custom function on
    the model in its place, which the engine would call once more."""
    custom = vars(model).pop("generate", None)
    try:
        yield
    finally:
        if custom is not None:
            model.generate = custom
