"""The commands of `python -m locret`. `add_to` adds one; what runs is imported when it runs."""
