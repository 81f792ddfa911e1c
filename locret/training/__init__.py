"""One forward of the frozen backbone gives features, labels and loss, layer by layer.

`distill` is the entry of training by regression, `gated` that of heads and adapters that learn from
what answers lose. `row_loss` is what a layer does with a row of `segments` (several samples),
`branches` what it does with trunks and their branches. Nothing here knows Lightning.
"""
