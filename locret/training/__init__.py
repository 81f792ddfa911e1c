"""One forward of the frozen backbone gives features, labels and loss, layer by layer.

`distill` is the entry: `trainers/` calls nothing else. `row_loss` is what a layer does with a row
of `segments` (several samples), `chunked` the same for rows too long to be
read at once. Nothing here knows Lightning.
"""
