"""The commands of `python -m locret`: a file's `add_to` adds its own; what runs is imported then.
`shared` and `progress` are what they share; trainings and the harness are in `locret.cli`.

A ValueError or OSError of theirs ends a command with its reason in one line.
"""
