"""One launch of a kernel as a value: what runs is what the tests compile ahead of time."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """A kernel, its grid, its arguments by name (constexprs too), and num_warps and num_stages.

    Builders make it from tensors of any device, "meta" too, and a compute capability; `run` needs real ones.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        """Launch it on the device and stream of its tensors; an empty grid launches nothing."""
        if 0 in self.grid:
            return
        flat = (each for value in self.arguments.values() for each in (value if isinstance(value, tuple) else (value,)))
        device = next(each.device for each in flat if isinstance(each, torch.Tensor))
        # Triton launches on the current device, whatever the tensors say.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, **self.options)
