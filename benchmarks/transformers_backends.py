"""The quantized caches that transformers itself can make here, to compare with."""

LAYERS = {
    "quanto": "QuantoQuantizedLayer",
    "hqq": "HQQQuantizedLayer",
    "fp8": "Fp8QuantizedLayer",
}
"""Backends of `transformers.QuantizedCache`, and the layer that each one is made of."""


def transformers_backends() -> dict[str, str | None]:
    """Why each backend of `transformers.QuantizedCache` cannot be used here; None = it can."""
    return {backend: _refusal(layer) for backend, layer in LAYERS.items()}


def _refusal(layer: str) -> str | None:
    import transformers

    make = getattr(transformers.cache_utils, layer, None)
    if make is None:
        return f"transformers {transformers.__version__} has no {layer}"
    try:
        make()
    except ImportError as missing:
        return str(missing)
    return None
