"""Retaining heads: what they are, what they learn, and how they travel.

`heads` is all of them with their record, `kinds` what a head reads and computes, `targets` the
labels and losses that it learns from; to add one of these, write the function and give it a name in
the table of its file. `quotas` says which heads keep more units than others. `files` reads and
writes artifacts, those of other methods too; `hub` fetches and uploads them, and has their card.
"""
