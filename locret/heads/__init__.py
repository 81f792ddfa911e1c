"""Retaining heads: what they are, what they learn, and how they travel.

`heads` is the modules and their record, `features` what a head reads, `targets` and `losses` what
it learns; to add one of these three, write a function and give it a name in the table of its file.
`files` writes artifacts, `hub` pushes and loads them, `card` describes them to people.
"""
