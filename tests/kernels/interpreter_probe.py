"""Fails where triton is missing or its interpreter does not fit the installed numpy."""

import torch
import triton
import triton.language as tl


@triton.jit
def _double(x, size):
    for i in range(0, size):
        tl.store(x + i, 2 * tl.load(x + i))


x = torch.ones(3)
_double[(1,)](x, 3)
assert x.tolist() == [2, 2, 2]
