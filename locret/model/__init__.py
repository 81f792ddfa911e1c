"""Stock transformers models, as they are loaded and as they are seen by everything else.

`loading` finds a model by name (a Hub id, a folder, a GGUF file), with its `adapters` and
weights in fewer bits. `backbone` is the only file that knows architectures: to support another one,
edit its `SUPPORTED` and what differs, and add a tiny model to `tests/tiny_models.py`. `hooks` is
how a stock model's layers reach an attached engine, and what its release calls the cache; `attend`
attention to what a layer holds (`backends` the ways to compute it, `varlen` ragged ones at once),
`rotary` the rotation at chosen slots, `prenorm` a whole decoder in fused kernels, for models that
`backbone.PRENORM` names.

Nothing may be left on a model after detaching, and no method of it may be reassigned.
"""
