import pytest
import torch

from locret.kernels.gather import gather_sequences, gather_sequences_reference


def units(shape, size, device):
    """A layer's keys, values, scores and positions, views of larger storage."""
    return tuple(
        tensor[..., : shape[-1], :] if tensor.dim() > len(shape) else tensor[..., : shape[-1]]
        for tensor in (
            torch.randn(*shape[:-1], shape[-1] + 7, size, device=device).bfloat16(),
            torch.randn(*shape[:-1], shape[-1] + 7, size, device=device).bfloat16(),
            torch.randn(*shape[:-1], shape[-1] + 7, device=device),
            torch.randint(0, 2**40, (*shape[:-1], shape[-1] + 7), device=device),
        )
    )


def running(numbers, device):
    return torch.tensor([0, *numbers], device=device).cumsum(0).int()


def compare(old, new, lengths, kept, index=None):
    """Of random indices in order, where none are given."""
    device, count = old[0].device, new[0].shape[2]
    if index is None:
        pairs = zip(lengths, kept, strict=True)
        index = torch.cat([torch.randperm(length + count)[:n].sort().values for length, n in pairs])
    given = (old, new, index.to(device), running(lengths, device), running(kept, device))
    gathered = gather_sequences(*given)
    for actual, expected in zip(gathered, gather_sequences_reference(*given), strict=True):
        assert actual.shape[0] == sum(kept) and actual.is_contiguous()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("shape", "lengths", "kept", "size"),
    [
        ((1, 3, 4), [9, 0, 2], [6, 1, 6], 80),
        ((2, 2, 63), [300, 0, 0, 41], [301, 0, 63, 17], 64),
        ((3, 1, 7), [0, 0, 0], [0, 3, 7], 16),
        ((1, 2, 0), [5, 1], [4, 1], 256),
        ((1, 1, 1), [1], [1], 20),
        ((2, 5, 3), [0, 1, 0, 2, 0, 3, 0, 0, 9, 1], [0, 0, 2, 1, 0, 3, 1, 0, 5, 0], 8),
        ((1, 2, 3), [4, 4], [0, 0], 8),
    ],
)
def test_kernel_equals_twin(shape, lengths, kept, size, device):
    compare(units((sum(lengths),), size, device), units(shape, size, device), lengths, kept)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float64, torch.uint8, torch.int16, torch.bool]
)
def test_any_dtype(dtype, device):
    old = (torch.randint(0, 2, (8, 3), device=device).to(dtype),)
    new = (torch.randint(0, 2, (1, 2, 5, 3), device=device).to(dtype),)
    compare(old, new, [2, 6], [7, 3])


def test_elements_need_not_be_adjacent(device):
    old = (torch.randn(8, 16, device=device).mT, torch.randn(16, 2, device=device)[:, 1])
    new = (
        torch.randn(3, 2, 2, 8, device=device).permute(2, 1, 0, 3),
        torch.randn(2, 3, 2, device=device).mT.transpose(0, 1),
    )
    compare(old, new, [2, 0, 10, 4], [5, 3, 9, 1])


def test_indices_need_not_be_in_order(device):
    old, new = units((9,), 8, device), units((1, 2, 3), 8, device)
    compare(old, new, [7, 2], [4, 5], torch.tensor([9, 0, 0, 6, 4, 1, 2, 0, 2]))
