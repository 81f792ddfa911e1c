"""One forward of the frozen backbone gives features, labels and loss, layer by layer.

`distill` is the entry of training by regression, `evicted_features` what heads read for it of a
model that evicts; `gated` is the entry of tuning heads by what answers lose, `evicted` of adapters
that learn from the same. `row_loss` is what a layer does with a row of `segments` (several
samples), `chunked` the same for rows too long to be read at once. `branch_reading` and `divergence`
are what `gated` and `evicted` are made of. Nothing here knows Lightning.
"""
