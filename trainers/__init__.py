"""Training with Lightning, a file a command: `fit` for retaining heads, `tune` goes on with them by
KL through gates, `adapt` for an adapter of the backbone. `module` is what the three share, `cli`
their command line.
"""
