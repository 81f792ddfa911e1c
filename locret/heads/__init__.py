"""Retaining heads: what they are, what they learn, and how they travel.

`heads` is all of them with their record, `kinds` what a head reads and computes, `targets` the
labels and losses that it learns from; to add one of these, write the function and give it a name in
the table of its file. `quotas` says which heads keep more units than others. `files` writes
artifacts, `hub` pushes and loads them, `card` describes them to people. `peers` reads heads of
other methods.
"""
