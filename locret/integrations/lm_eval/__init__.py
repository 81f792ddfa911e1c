"""locret as a model of lm-evaluation-harness, and our tasks in its terms.

`model` is the harness's `--model locret`; `tasks/` holds the harness's task files, which call
`documents`. The tasks themselves are in `locret.tasks`.
"""
