"""Which of several processes this is, and which accelerator it takes."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ranks:
    """One of `world` processes."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> "Ranks":
        """As torchrun and accelerate say it."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def device(self, wanted: str | None = None) -> str | None:
        """The device that was asked for; of several processes each takes an accelerator in turn.
        None = the default, also where accelerators are asked for and there are none."""
        on_cuda = wanted is None or wanted.startswith("cuda")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not on_cuda or (count and self.world == 1):
            return wanted
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        return f"cuda:{local % count}" if count else None
