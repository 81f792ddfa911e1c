"""Which of transformers' own quantized caches can be used here."""

import pytest
import transformers

from benchmarks.transformers_backends import LAYERS, transformers_backends


def test_every_backend_is_there_or_has_a_reason():
    backends = transformers_backends()
    assert backends.keys() == LAYERS.keys()
    for backend, reason in backends.items():
        if reason is None:
            getattr(transformers.cache_utils, LAYERS[backend])()
        else:
            assert len(reason) > 10


def test_a_layer_that_transformers_has_not_is_a_reason(monkeypatch):
    monkeypatch.delattr(transformers.cache_utils, "QuantoQuantizedLayer")
    assert "has no QuantoQuantizedLayer" in transformers_backends()["quanto"]


def test_a_missing_package_is_a_reason(monkeypatch):
    def missing():
        raise ImportError("no such package")

    monkeypatch.setattr(transformers.cache_utils, "HQQQuantizedLayer", missing)
    assert transformers_backends()["hqq"] == "no such package"


@pytest.mark.skipif(
    transformers_backends()["fp8"] is not None, reason="this transformers has no fp8 cache"
)
def test_a_backend_that_is_there_can_be_made():
    from tests.tiny_models import tiny_model

    transformers.QuantizedCache("fp8", tiny_model("llama").config)
