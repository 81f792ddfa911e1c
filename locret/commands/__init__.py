"""The commands of `python -m locret`. `add_to` adds one; what runs is imported when it runs.

A ValueError or OSError of theirs ends a command with its reason in one line.
"""
