"""Read a prompt within a budget, then answer: what `locret.Engine` does, in the order it does it.

`engine` is the class that users hold, `config` its settings and what cannot work, `arguments` what
users give a call. `reading` cuts a context into chunks; `attention` is what every layer runs on
each of them, or on a token of an answer; `steps` runs the tokens of an answer from a CUDA graph.
`plan` says what fits into a memory, from a config alone.

To change how chunks are read, edit `reading`; to add a setting, `config` and the class's docstring.
Nothing here may know an architecture: that is `locret.model.backbone`'s.
"""
