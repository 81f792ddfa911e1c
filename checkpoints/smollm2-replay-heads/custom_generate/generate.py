"""Stock `generate` within a bounded KV cache, by the retaining heads of this repository:

    model.generate(**inputs, custom_generate="OWNER/NAME", trust_remote_code=True)

Settings of `locret.Engine` are arguments too, such as budget="8x". With a copy of this folder in a
model's own repository, every `generate` of that model goes through here; then HEADS must say where
the heads are.
"""

from locret.integrations import custom_generate

HEADS = None  # a Hub id or a folder; None: the repository that generate() was told of


# The model comes by keyword: model.generate(inputs) works where this is bound to a model, too.
def generate(inputs=None, *, model, heads=HEADS, **kwargs):
    return custom_generate.generate(model, inputs, heads=heads, loaded_from=__file__, **kwargs)
