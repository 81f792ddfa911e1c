"""One forward of the frozen backbone gives features, labels and loss, layer by layer.

`distill` is the entry of training by regression, `gated` of tuning by what answers lose, and
`evicted_features` what heads read for the former of a model that evicts; `trainers/` calls nothing
else. `row_loss` is what a layer does with a row of `segments` (several
samples), `chunked` the same for rows too long to be read at once. `branch_reading`, `gates` and
`recomputing` are what `gated` is made of. Nothing here knows Lightning.
"""
