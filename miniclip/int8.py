"""Layers whose weights are whole numbers from -127 to 127, with a factor for each output channel.

Read after model.py; graphs.py writes such layers to files, minidiff's shortcuts.py draws with them.
Papers: Jacob 2018, section 2.1. Mirrors: nothing upstream.
Shapes: K output channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def to_int8(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Makes a layer, in place, one of `kind`: that of INT8 for its class."""
    numbers, scale = quantized(layer.weight.detach())
    del layer.weight
    layer.__class__ = kind
    layer.register_buffer("numbers", numbers, persistent=False)
    layer.register_buffer("scale", scale, persistent=False)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[K, ...] -> whole numbers as int8, and the factors [K, 1, ...]."""
    scale = weight.abs().flatten(1).amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    scale = scale.view(-1, *[1] * (weight.ndim - 1))
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


class Int8(nn.Module):
    """Base of the layers: their forward is the plain one, which reads `weight`. The state dict has the
    rounded weights under the usual keys."""

    @property
    def weight(self) -> Tensor:
        """The rounded weights, as floats."""
        return self.numbers.to(self.scale.dtype) * self.scale

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight


class Int8Conv2d(Int8, nn.Conv2d):
    """A convolution with weights of int8."""


class Int8Linear(Int8, nn.Linear):
    """A linear layer with weights of int8."""


class Int8Embedding(Int8, nn.Embedding):
    """A table with rows of int8."""


INT8 = {nn.Conv2d: Int8Conv2d, nn.Linear: Int8Linear, nn.Embedding: Int8Embedding}
