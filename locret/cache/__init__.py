"""The state of a request: what each layer holds, and what becomes of it.

`cache` is what users hold (a transformers `Cache`), `layer` what one layer does when it is given
units, `units` and `coded` how they are stored, plainly or in few bits. `files` saves contexts,
`sizing` counts their bytes, `recall` (with `host_pool` and `host_blocks`) lets evicted units come
back, `merging` keeps something of their values.

What is stored is never changed where it is: a snapshot is a reference and a count.
"""
