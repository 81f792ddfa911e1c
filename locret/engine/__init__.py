"""Read a prompt within a budget, then answer: what `locret.Engine` does, in the order it does it.

`engine` is the class that users hold, `config` its settings and every check of them, `budgets` what
they let each layer and head keep, `arguments` what users give a call. `reading` says which tokens
are read and cuts them into chunks; `attention` is what every layer runs on each of them, or on a
token of an answer: the pass (`passes`) that the request is in, which keeps the units that
`choosing` picks. `answering` lets stock `generate` answer; `steps` runs the tokens of an answer
from a CUDA graph. `plan` says what fits into a memory, from a config alone; `calibration` measures
which heads need to keep more.

To change how chunks are read, edit `reading`; to add a setting, a group and `DEFAULTS` in `config`,
and the class's signature and docstring in `engine`.
Nothing here may know an architecture: that is `locret.model.backbone`'s.
"""
