"""What an artifact holds so that stock `generate` can be told to use it: `custom_generate/`.

    model.generate(**inputs, custom_generate="OWNER/NAME", trust_remote_code=True)

transformers copies `generate.py` into a cache of its own and calls it in the place of its own
`generate`. So the file says as little as possible: `locret.integrations.custom_generate` answers.
"""

FOLDER = "custom_generate"

CODE = '''"""Stock `generate` within a bounded KV cache, by the retaining heads of this repository:

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
'''

REQUIREMENTS = "locret\n"

FILES = {f"{FOLDER}/generate.py": CODE, f"{FOLDER}/requirements.txt": REQUIREMENTS}
"""Texts by their paths within an artifact."""
