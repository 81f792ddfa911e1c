"""Read a prompt within a budget, then answer: what `locret.Engine` does, in the order it does it.

`engine` is the class that users hold, `config` its settings and every check of them, `arguments`
what users give a call. `contexts` says which tokens are read and cuts them into chunks; `reading`
is what every layer runs on each of them, `attention` on a token of an answer; `budgets` says how
many units a layer and head keep, and which. `answering` lets stock `generate` answer; `steps` runs
the tokens of an answer with counters on a GPU. `plan` says what fits into a memory, from a config
alone.

To change how chunks are read, edit `reading`; to add a setting, a group and `DEFAULTS` in `config`,
and the class's signature and docstring in `engine`.
Nothing here may know an architecture: that is `locret.model.backbone`'s.
"""
