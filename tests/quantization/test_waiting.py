"""What the host waits for while a layer is packed, and what is queued meanwhile."""

import pytest
import torch

from locret.quantization.waiting import (
    from_device,
    meanwhile,
    refuse_where,
    refusing_last,
    to_device,
)


def test_work_is_done_once_where_the_device_is_waited_for():
    done = []
    with meanwhile(lambda: done.append("work")):
        done.append("before")
        assert from_device(torch.tensor([3])).tolist() == [3]
        done.append("after")
        assert from_device(torch.tensor([4])).tolist() == [4]
    assert done == ["before", "work", "after"]


def test_work_is_done_at_the_end_if_nothing_is_waited_for():
    done = []
    with meanwhile(lambda: done.append("work")):
        done.append("before")
    assert done == ["before", "work"]


def test_work_is_not_done_after_an_error_and_is_forgotten():
    done = []
    with pytest.raises(KeyError), meanwhile(lambda: done.append("work")):
        raise KeyError
    from_device(torch.tensor(1))
    assert not done


def test_work_that_waits_itself_is_not_done_again():
    done = []

    def work():
        done.append(from_device(torch.tensor(5)).item())

    with meanwhile(work):
        from_device(torch.tensor(1))
    assert done == [5]


@pytest.mark.gpu
def test_what_is_fetched_is_what_was_there_before_the_work():
    device = torch.device("cuda")
    x = to_device(torch.arange(100_000), device)

    def work():
        x.zero_()

    with meanwhile(work):
        assert torch.equal(from_device(x), torch.arange(100_000))
    assert not x.any()


def test_what_cannot_be_stored_is_refused_at_the_end_of_a_block():
    reached = []
    with pytest.raises(ValueError, match="cannot quantize"), refusing_last():
        for bad in (0, 1, 0):
            refuse_where(torch.tensor([bad], dtype=torch.int32))
        refuse_where(torch.tensor(False))
        reached.append("end")
    assert reached == ["end"]
    with pytest.raises(ValueError, match="cannot quantize"):
        refuse_where(torch.tensor(1))  # at once again
    with refusing_last():
        refuse_where(torch.tensor(0))


def test_another_error_is_raised_as_it_is_and_what_was_asked_is_forgotten():
    with pytest.raises(KeyError), refusing_last():
        refuse_where(torch.tensor(1))
        raise KeyError
    with refusing_last():
        pass
