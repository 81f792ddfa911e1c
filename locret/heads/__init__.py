"""Retaining heads: what they are, what they learn, and how they travel.

`heads` is what a head reads and the record, `kinds` what it computes, `targets` the labels and
losses that it learns from; to add one of these, write the function and give it a name in the table
of its file. `quotas` says which heads keep more units than others. `files` writes artifacts, `hub`
pushes and loads them, `card` describes them to people, `checks` refuses records of what cannot be.
`peers` reads heads of other methods.
"""
