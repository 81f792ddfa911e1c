"""The state of a request: what each layer holds, and what becomes of it.

`cache` is what users hold (a transformers `Cache`), `layer` one layer of it and what it does when
it is given units. `store` keeps its units: what evictions have left (`context`, flat tensors and
their lengths) and what came after, and changes one into the other. `files` saves contexts, `sizing`
counts their bytes, `recall` (with `host_blocks`) lets evicted units come back, `merging` keeps
something of their values.

What is stored is never changed where it is: a snapshot is a reference and a count.
"""
