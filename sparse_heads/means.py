"""`HeadMeans`: what every head of a model gives on average, to put in the place of heads that are off."""

from __future__ import annotations

import os

import torch

from ._files import MEANS, load_files, save_files
from .errors import SubsetMismatchError, invalid
from .heads import LayerTensor, check_layers
from .layers import Layers


class HeadMeans(LayerTensor):
    """The mean output of each head, before the output projection, for a whole model. An immutable value.

    tensor: float [L, H, Dv] on any device (kept on the CPU, float64 as it is and everything else as float32), Dv the
        largest `v_head_dim`; what lies past a smaller layer's heads or widths is ignored, and kept as 0.
    layers: what the rows are.
    Raises InvalidTypeError for a tensor that is not floating, InvalidArgumentError for another shape, NaN or infinity.
    """

    def __init__(self, tensor: torch.Tensor, layers: Layers) -> None:
        check_layers(layers)
        widths = torch.tensor([info.v_head_dim for info in layers], device="cpu")
        means = self._checked(tensor, layers, int(widths.max()))
        real = layers.real_heads()[:, :, None] & (torch.arange(means.shape[2], device="cpu") < widths[:, None, None])
        means = means.masked_fill(~real, 0.0).contiguous()
        if not means.isfinite().all():
            row, head, _ = (~means.isfinite()).nonzero()[0].tolist()
            raise invalid("tensor", "finite values", f"others for head {head} of layer {layers[row].name!r}")
        super().__init__(means, layers)

    def remap(self, layers: Layers) -> HeadMeans:
        """The means with their rows in the order of `layers`.

        Raises SubsetMismatchError, naming what differs, unless model type, layer keys, head counts and widths agree.
        """
        difference = self._layers.difference(layers)
        mine = {info.key: (row, info.v_head_dim) for row, info in enumerate(self._layers)}
        if difference is None:
            for info in layers:
                if mine[info.key][1] != info.v_head_dim:
                    difference = f"v_head_dim {mine[info.key][1]} against {info.v_head_dim} in layer {info.key}"
        if difference is not None:
            raise SubsetMismatchError(f"means: wanted those of this model, got another model's: {difference}")
        return HeadMeans(self._tensor[[mine[info.key][0] for info in layers]], layers)

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `head_means.safetensors`, which `from_pretrained` reads, and `head_means_config.json` for people.

        Makes the directory where it is missing; a file that was there stays whole until the new one replaces it.
        """
        rows = zip(self._layers, self._tensor.norm(dim=-1).tolist(), strict=True)
        copy = {"norms": {info.name: row[: info.num_heads] for info, row in rows}}
        save_files(directory, MEANS, self._tensor, self._layers, copy)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> HeadMeans:
        """Read what `save_pretrained` wrote; sources and errors as for `HeadSubset.from_pretrained`."""
        return load_files(directory, MEANS, cls)
