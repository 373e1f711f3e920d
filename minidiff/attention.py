"""Attention and the transformer that the UNet puts between its convolutions.

Read after resnet.py, before unet.py. Papers: Vaswani 2017, eq. 1 (attention); Rombach 2022, section 3.3 and
appendix E.2 (cross-attention to a text); Shazeer 2020 (GEGLU). Mirrors: diffusers' attention_processor.py,
attention.py, transformers/transformer_2d.py. One deliberate difference: a mask of the wrong length raises.
Shapes: B batch, C channels, H W, T = H*W positions, S text tokens, D text width, nh heads, hd head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(hd) + mask) v, written out: what the fused kernel below computes (a test holds them
    equal).

    q [B, nh, T, hd], k and v [B, nh, S, hd], mask broadcastable to [B, nh, T, S] -> [B, nh, T, hd].
    """
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5                  # [B, nh, T, S]
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1) @ v                                # [B, nh, T, hd]


class Attention(nn.Module):
    """Multi-head attention of x [B, T, C] to a context [B, S, D],
    or to x itself where none is given -> [B, T, C].

    `mask` [B, 1, S] is added to the scores. The projections to q, k and v have a bias only in the VAE.
    """

    def __init__(self, channels: int, context_dim: int | None, heads: int, bias: bool = False):
        super().__init__()
        if channels % heads != 0:
            raise ValueError(f"attention_head_dim = {heads} (a count of heads) does not divide {channels} "
                             "channels")
        self.heads = heads
        context_dim = channels if context_dim is None else context_dim
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_dim, channels, bias=bias)
        self.to_v = nn.Linear(context_dim, channels, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(0.0))  # keys to_out.0.*

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C]. Raises ValueError if the mask and the context differ in length."""
        context = x if context is None else context
        if mask is not None and mask.shape[-1] != context.shape[1]:
            raise ValueError(f"attention mask covers {mask.shape[-1]} tokens, but there are "
                             f"{context.shape[1]}")
        q, k, v = (self.split(project(y)) for project, y in
                   ((self.to_q, x), (self.to_k, context), (self.to_v, context)))
        mask = None if mask is None else mask[:, None]                      # [B, 1, 1, S]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)       # [B, nh, T, hd]
        return self.to_out(out.transpose(1, 2).flatten(2))                  # [B, T, C]

    def split(self, y: Tensor) -> Tensor:
        """[B, T, C] -> [B, nh, T, hd]."""
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """Half of a wide projection gates the other half;
    the exact (erf) GELU, since the tanh form is off by 3e-5."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, channels] -> [B, T, inner]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The transformer's MLP with a GEGLU, 4 times as wide inside: [B, T, C] kept."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(0.0),
                                 nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each after a LayerNorm and inside a skip.
    [B, T, C] kept."""

    def __init__(self, channels: int, context_dim: int, heads: int, only_cross_attention: bool):
        super().__init__()
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, context_dim if only_cross_attention else None, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None,
                context_mask: Tensor | None) -> Tensor:
        """x [B, T, C], context [B, S, D]; `mask` is attn1's, `context_mask` [B, 1, S] attn2's."""
        x = x + self.attn1(self.norm1(x), context if self.only_cross_attention else None, mask)
        x = x + self.attn2(self.norm2(x), context, context_mask)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the T = H*W positions of a feature map [B, C, H, W], inside a skip.

    SD 1.x projects in and out by 1x1 convolutions, SD 2 and SDXL by linear layers (`use_linear_projection`).
    """

    def __init__(self, channels: int, layers: int, *, context_dim: int, heads: int, groups: int,
                 use_linear_projection: bool, only_cross_attention: bool = False):
        super().__init__()
        self.linear = use_linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)  # fixed upstream, whatever the config's norm_eps
        self.proj_in = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, heads, only_cross_attention) for _ in range(layers))
        self.proj_out = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None,
                context_mask: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], context [B, S, D]; the masks are added to the scores, as in `Attention`."""
        height, width = x.shape[-2:]
        h = self.norm(x)
        h = self.proj_in(to_tokens(h)) if self.linear else to_tokens(self.proj_in(h))       # [B, T, C]
        for block in self.transformer_blocks:
            h = block(h, context, mask, context_mask)
        h = to_map(self.proj_out(h), height,
                   width) if self.linear else self.proj_out(to_map(h, height, width))
        return x + h                                                                        # [B, C, H, W]


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, T, C]."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, height: int, width: int) -> Tensor:
    """[B, T, C] -> [B, C, H, W], in memory as the convolutions around it left it (channels last costs no
    copy)."""
    return x.transpose(1, 2).unflatten(2, (height, width))
