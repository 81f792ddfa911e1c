"""What sharding does not go with is refused before anything is loaded."""

import pytest

from trainers.adapt import AdapterModule
from trainers.fit import HeadsModule


class Mesh:
    """As much of a strategy's device mesh as is asked before a model is made."""

    def __init__(self, tensor_parallel=1):
        self.sizes = {"data_parallel": 2, "tensor_parallel": tensor_parallel}

    def __getitem__(self, name):
        return type("Dimension", (), {"size": lambda _: self.sizes[name]})()


@pytest.mark.parametrize(
    ("module", "mesh", "message"),
    [
        (HeadsModule("no/such"), Mesh(2), "tensor_parallel_size is 2, expected 1"),
        (HeadsModule("no/such", quantization="int8"), Mesh(), "int8 cannot be sharded"),
        (AdapterModule("no/such"), Mesh(), "trained on whole backbones"),
    ],
)
def test_refused(module, mesh, message):
    module._device_mesh = mesh
    with pytest.raises(ValueError, match=message):
        module.configure_model()
