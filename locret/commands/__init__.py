"""The commands of `python -m locret`. `add_to` adds those of a file; what runs is imported when it runs.

A ValueError or OSError of theirs ends a command with its reason in one line.
"""
