"""locret as a model of lm-evaluation-harness, and our tasks in its terms.

`model` is the harness's `--model locret`, `reading` what it knows of prompts; `tasks` writes the
harness's task files. The tasks themselves are in `locret.tasks`.
"""
