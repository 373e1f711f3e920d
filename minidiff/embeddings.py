"""Timestep embeddings: sinusoids of t, then a small MLP.

Read before resnet.py. Papers: Vaswani 2017, section 3.5 (the sinusoids); Ho 2020, appendix B.
Mirrors: diffusers' models/embeddings.py (Timesteps, TimestepEmbedding, get_timestep_embedding).
Shapes: B batch, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "swish": F.silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu,
}  # fmt: skip


def sinusoids(timesteps: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sines and cosines of t at `dim / 2` frequencies from 1 down to about 1/10000.

    timesteps [B], integers or floats -> [B, dim] float32 whatever the model's dtype,
    as upstream computes them.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequency = torch.exp(exponent / (half - freq_shift))
    angle = timesteps[:, None].float() * frequency[None, :]                         # [B, dim/2]
    sin, cos = angle.sin(), angle.cos()
    embedding = torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)    # [B, dim]
    return F.pad(embedding, (0, dim % 2))  # an odd width ends in a zero column


class Timesteps(nn.Module):
    """`sinusoids` with its settings bound; owns no parameters, so it adds no checkpoint keys."""

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, freq_shift: float):
        super().__init__()
        self.settings = (num_channels, flip_sin_to_cos, freq_shift)

    def forward(self, timesteps: Tensor) -> Tensor:
        """[B] -> [B, num_channels] float32."""
        return sinusoids(timesteps, *self.settings)


class TimestepEmbedding(nn.Module):
    """MLP [B, in_channels] -> [B, out_channels]; `condition` [B, cond_channels] (LCM's
    guidance) is added first."""

    def __init__(self, in_channels: int, out_channels: int, act_fn: str = "silu",
                 cond_channels: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, out_channels)
        if cond_channels is not None:
            self.cond_proj = nn.Linear(cond_channels, in_channels, bias=False)
        self.linear_2 = nn.Linear(out_channels, out_channels)
        self.act = ACTIVATIONS[act_fn]

    def forward(self, embedding: Tensor, condition: Tensor | None = None) -> Tensor:
        """Only a module built with cond_channels takes a `condition`."""
        if condition is not None:
            embedding = embedding + self.cond_proj(condition)
        return self.linear_2(self.act(self.linear_1(embedding)))
