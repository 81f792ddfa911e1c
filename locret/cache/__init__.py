"""The state of a request: what each layer holds, and what becomes of it.

`cache` is what users hold (a transformers `Cache`), `layer` what one layer holds and does when it
is given units, `packed` the same units in few bits. `files` saves contexts, `sizing` counts their
bytes, `recall` (with `host_blocks`) lets evicted units come back, `merging` keeps something of
their values.

What is stored is never changed where it is: a snapshot is a reference and a count.
"""
