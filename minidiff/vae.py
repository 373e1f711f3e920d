"""AutoencoderKL: pictures to latents of an eighth of their size, and back.

Read after resnet.py and attention.py. Papers: Rombach 2022, section 3.1;
Kingma 2013 (the Gaussian and its KL).
Mirrors: diffusers' autoencoders/autoencoder_kl.py, vae.py.
Its parts share the UNet's resnets; every GroupNorm here has eps 1e-6,
and the encoder halves with padding below and to the right only.
Shapes: B batch, C channels, H W picture height and width, T = h*w positions, L latent channels,
f = 2^(levels-1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniclip.config import Config, ConfigError, Count, Levels, Positive, Range, Real, Width
from miniclip.files import shown
from miniclip.output import ModelOutput
from miniclip.weights import ModelFolder
from minidiff.attention import Attention, to_map
from minidiff.config import Resnets, Sides
from minidiff.habits import ModelHabits
from minidiff.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from minidiff.schedule import Generators, randn

LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True, eq=False, repr=False)
class AutoencoderKLConfig(Config):
    """Fields and defaults of diffusers' AutoencoderKL. Stable Diffusion's VAE has four levels."""

    in_channels: Count = 3
    out_channels: Count = 3
    down_block_types: Levels[str] = ("DownEncoderBlock2D",)
    up_block_types: Levels[str] = ("UpDecoderBlock2D",)
    block_out_channels: Levels[Width] = (64,)
    layers_per_block: Resnets = 1               # resnets a level on the way down; one more on the way up
    # in the resnets; the last one is always SiLU
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    latent_channels: Count = 4
    norm_num_groups: Count = 32
    sample_size: Sides = 32                     # the tile of tiling, in picture pixels
    # the pipeline multiplies latents by it, and divides before decoding
    scaling_factor: Positive = 0.18215
    shift_factor: Real | None = None            # subtracted before the scaling (16-channel VAEs)
    # per channel, instead of the shift (Playground v2.5)
    latents_mean: Annotated[tuple[Real, ...], Range(1, 4096)] | None = None
    latents_std: Annotated[tuple[Positive, ...], Range(1, 4096)] | None = None
    force_upcast: bool = True                   # float16 overflows (SDXL): the pipeline decodes in float32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def check(self) -> None:
        """Block types, counts and groups fit the channels."""
        levels = len(self.block_out_channels)
        for name, known in (("down_block_types", "DownEncoderBlock2D"),
                            ("up_block_types", "UpDecoderBlock2D")):
            types = getattr(self, name)
            if len(types) != levels or set(types) != {known}:
                raise ConfigError(f"{name} = {shown(types)} must be {levels} times {known!r}, one for each "
                                  "block_out_channels")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups != 0:
                raise ConfigError(f"norm_num_groups = {self.norm_num_groups} does not divide {channels} "
                                  "channels")


@dataclass(eq=False, repr=False)
class AutoencoderKLOutput(ModelOutput):
    """What `encode` returns."""

    latent_dist: DiagonalGaussianDistribution


@dataclass(eq=False, repr=False)
class DecoderOutput(ModelOutput):
    """What `decode` returns."""

    sample: Tensor  # [B, C, H, W], about -1 to 1


class DiagonalGaussianDistribution:
    """The encoder's answer: an independent Gaussian for every latent.
    parameters [B, 2L, h, w]: means, log variances."""

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)                      # [B, L, h, w] each
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self, generator: Generators = None) -> Tensor:
        """mean + std * noise (Kingma 2013, the reparameterisation), [B, L, h, w].
        Not yet scaled by scaling_factor."""
        noise = randn(self.mean.shape, generator, self.mean.device, self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The mean [B, L, h, w]: the latent without noise, not yet scaled by scaling_factor."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL divergence in nats to another such Gaussian, or to the standard normal: [B]."""
        if other is None:
            terms = self.mean**2 + self.var - 1.0 - self.logvar
        else:
            ratio = (self.mean - other.mean) ** 2 / other.var + self.var / other.var
            terms = ratio - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> Tensor:
        """Minus log density of latents [B, L, h, w], in nats: [B]."""
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=dims)


class SpatialAttention(nn.Module):
    """One head of self-attention over the T positions of a map [B, C, h, w], inside a skip."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        # one set of keys at this level, as upstream: the parts of an Attention are adopted, not the Attention
        for name, part in Attention(channels, None, heads=1, bias=True).named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        h = self.group_norm(x.flatten(2)).transpose(1, 2)                   # [B, T, C]
        q, k, v = (project(h)[:, None] for project in (self.to_q, self.to_k, self.to_v))  # [B, 1, T, C]
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]                   # [B, T, C]
        return to_map(self.to_out(h), *x.shape[-2:]) + x                    # [B, C, h, w]


class MidBlock(nn.Module):
    """A resnet, attention if wanted, a resnet: [B, C, h, w] kept."""

    def __init__(self, channels: int, make_resnet: partial, groups: int, attends: bool):
        super().__init__()
        first = make_resnet(channels, channels)     # built as they run: upstream's order of first weights
        self.attentions = nn.ModuleList(SpatialAttention(channels, groups) for _ in range(attends))
        self.resnets = nn.ModuleList([first, make_resnet(channels, channels)])

    def forward(self, h: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        h = self.resnets[0](h)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h)


class DownEncoderBlock(nn.Module):
    """Resnets, then half the size unless it is the last level."""

    def __init__(self, widths: list[int], make_resnet: partial, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(make_resnet(a, b) for a, b in zip(widths, widths[1:]))
        self.downsamplers = nn.ModuleList(Downsample2D(widths[-1], padding=0) for _ in range(downsample))

    def forward(self, h: Tensor) -> Tensor:
        """[B, widths[0], h, w] -> [B, widths[-1], h/2, w/2], or h, w at the last level."""
        for part in [*self.resnets, *self.downsamplers]:
            h = part(h)
        return h


class UpDecoderBlock(nn.Module):
    """Resnets, then twice the size unless it is the last level."""

    def __init__(self, widths: list[int], make_resnet: partial, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(make_resnet(a, b) for a, b in zip(widths, widths[1:]))
        self.upsamplers = nn.ModuleList(Upsample2D(widths[-1]) for _ in range(upsample))

    def forward(self, h: Tensor) -> Tensor:
        """[B, widths[0], h, w] -> [B, widths[-1], 2h, 2w], or h, w at the last level."""
        for part in [*self.resnets, *self.upsamplers]:
            h = part(h)
        return h


class CoderBase(nn.Module):
    """What encoder and decoder share: the norm and convolution at the end, and recomputation in training."""

    gradient_checkpointing = False

    def run(self, part: nn.Module, h: Tensor) -> Tensor:
        """part(h), recomputing its activations in the backward pass if asked to."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(part, h, use_reentrant=False)
        return part(h)

    def finish(self, h: Tensor) -> Tensor:
        """Norm, SiLU and the last convolution; height and width are kept."""
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class Encoder(CoderBase):
    """[B, C, H, W] -> [B, 2L, H/f, W/f], the sizes rounded down."""

    def __init__(self, c: AutoencoderKLConfig, make_resnet: partial):
        super().__init__()
        widths, groups = c.block_out_channels, c.norm_num_groups
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, out in enumerate(widths):
            levels = [widths[max(i - 1, 0)]] + [out] * c.layers_per_block
            self.down_blocks.append(DownEncoderBlock(levels, make_resnet, downsample=i < len(widths) - 1))
        self.mid_block = MidBlock(widths[-1], make_resnet, groups, c.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 2L, H/f, W/f], before quant_conv."""
        h = self.conv_in(x)                                                 # [B, C0, H, W]
        for block in [*self.down_blocks, self.mid_block]:
            h = self.run(block, h)                                          # last: [B, Cn, H/f, W/f]
        return self.finish(h)


class Decoder(CoderBase):
    """[B, L, h, w] -> [B, C, h*f, w*f]."""

    def __init__(self, c: AutoencoderKLConfig, make_resnet: partial):
        super().__init__()
        widths, groups = c.block_out_channels[::-1], c.norm_num_groups
        self.conv_in = nn.Conv2d(c.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList()  # before mid_block, as upstream's keys
        self.mid_block = MidBlock(widths[0], make_resnet, groups, c.mid_block_add_attention)
        for i, out in enumerate(widths):
            levels = [widths[max(i - 1, 0)]] + [out] * (c.layers_per_block + 1)
            self.up_blocks.append(UpDecoderBlock(levels, make_resnet, upsample=i < len(widths) - 1))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[B, L, h, w], after post_quant_conv -> [B, C, h*f, w*f]."""
        h = self.conv_in(z)                                                 # [B, Cn, h, w]
        for block in [self.mid_block, *self.up_blocks]:
            h = self.run(block, h)                                          # last: [B, C0, h*f, w*f]
        return self.finish(h)


class AutoencoderKL(ModelHabits, ModelFolder, nn.Module):
    """The variational autoencoder of Stable Diffusion, with diffusers' keys and their order.

    Built from an AutoencoderKLConfig or from its fields.
    `encode` and `decode` do not scale: multiply latents by `config.scaling_factor` before the UNet and divide
    before decoding. Raises ConfigError.
    """

    config_class = AutoencoderKLConfig
    weights_stem = "diffusion_pytorch_model"
    tile_overlap_factor: ClassVar[float] = 0.25  # of a tile; settable on an instance, as the two sizes below

    def __init__(self, config: AutoencoderKLConfig | None = None, **fields: Any):
        super().__init__()
        self.config = c = config or AutoencoderKLConfig.from_dict(fields, "AutoencoderKL")
        make_resnet = partial(ResnetBlock2D, groups=c.norm_num_groups, eps=1e-6, act_fn=c.act_fn)
        self.encoder = Encoder(c, make_resnet)
        self.decoder = Decoder(c, make_resnet)
        L = c.latent_channels
        self.quant_conv = nn.Conv2d(2 * L, 2 * L, 1) if c.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(L, L, 1) if c.use_post_quant_conv else nn.Identity()
        self.use_slicing = self.use_tiling = False
        self.tile_sample_min_size = c.sample_size[0] if isinstance(c.sample_size, tuple) else c.sample_size
        self.tile_latent_min_size = self.tile_sample_min_size // 2 ** (len(c.block_out_channels) - 1)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """Pictures [B, C, H, W] in -1 to 1 -> `.latent_dist`, a Gaussian over [B, L, H/f,
        W/f] (rounded down)."""
        self._check("picture", x, self.config.in_channels)
        posterior = DiagonalGaussianDistribution(self._sliced(self._encode, x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: None = None) -> DecoderOutput | tuple:
        """Latents [B, L, h, w], already divided by the scaling factor -> `.sample` [B, C, h*f, w*f].

        `generator` is accepted as upstream does; decoding draws nothing.
        """
        self._check("latents", z, self.config.latent_channels)
        x = self._sliced(self._decode, z)
        return DecoderOutput(x) if return_dict else (x,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators = None,
    ) -> DecoderOutput | tuple:
        """Encodes and decodes pictures [B, C, H, W], through the mean or through a random latent."""
        posterior = self.encode(sample).latent_dist
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)

    def _encode(self, x: Tensor) -> Tensor:
        def run(tile: Tensor) -> Tensor:
            return self.quant_conv(self.encoder(tile))

        if not self.use_tiling or max(x.shape[-2:]) <= self.tile_sample_min_size:
            return run(x)
        return self._tiled(run, x, self.tile_sample_min_size, self.tile_latent_min_size)

    def _decode(self, z: Tensor) -> Tensor:
        def run(tile: Tensor) -> Tensor:
            return self.decoder(self.post_quant_conv(tile))

        if not self.use_tiling or max(z.shape[-2:]) <= self.tile_latent_min_size:
            return run(z)
        return self._tiled(run, z, self.tile_latent_min_size, self.tile_sample_min_size)

    def _sliced(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([run(one) for one in x.split(1)]) if self.use_slicing else run(x)

    def _tiled(self, run: Callable[[Tensor], Tensor], x: Tensor, size_in: int, size_out: int) -> Tensor:
        """Runs overlapping tiles one by one and blends their seams,
        so that memory does not grow with the picture.

        Not the same picture as without tiles: each tile normalises and attends within itself.
        """
        step = int(size_in * (1 - self.tile_overlap_factor))
        seam = int(size_out * self.tile_overlap_factor)
        keep = size_out - seam
        above, rows = None, []
        for top in range(0, x.shape[-2], step):
            row: list[Tensor] = []
            for left in range(0, x.shape[-1], step):
                tile = run(x[..., top : top + size_in, left : left + size_in])
                if above is not None:
                    tile = blend(above[len(row)], tile, seam, dim=-2)
                if row:
                    tile = blend(row[-1], tile, seam, dim=-1)
                row.append(tile)
            rows.append(torch.cat([tile[..., :keep, :keep] for tile in row], dim=-1))
            above = row
        return torch.cat(rows, dim=-2)

    def _check(self, name: str, x: Tensor, channels: int) -> None:
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"{name} is {list(x.shape)}, not [batch, {channels}, height, width]")

    def enable_slicing(self, use_slicing: bool = True) -> None:
        """One picture of the batch at a time: the same result in less memory."""
        self.use_slicing = use_slicing

    def disable_slicing(self) -> None:
        """The whole batch at once again."""
        self.enable_slicing(False)

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Pictures larger than `config.sample_size` in tiles: nearly the same result in bounded memory."""
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Pictures of any size in one piece again."""
        self.enable_tiling(False)

    def enable_gradient_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass and recompute the rest."""
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = enable

    def disable_gradient_checkpointing(self) -> None:
        """Keeps all activations again."""
        self.enable_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the blocks recompute their activations in the backward pass."""
        return self.encoder.gradient_checkpointing

    def convert_keys(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Attention of the first generation: query, key, value, proj_attn."""
        return {_modern(name): tensor for name, tensor in state_dict.items()}


def blend(before: Tensor, tile: Tensor, seam: int, dim: int) -> Tensor:
    """`tile`, its first `seam` rows or columns faded in from the last ones of the tile before it."""
    n = min(before.shape[dim], tile.shape[dim], seam)
    if n == 0:
        return tile
    shape = [-1, 1] if dim == -2 else [-1]
    fade = (torch.arange(n, dtype=torch.float64, device="cpu") / n).to(tile).view(shape)
    ends, begins = before.narrow(dim, before.shape[dim] - n, n), tile.narrow(dim, 0, n)
    rest = tile.narrow(dim, n, tile.shape[dim] - n)
    return torch.cat([ends * (1 - fade) + begins * fade, rest], dim=dim)


def _modern(name: str) -> str:
    head, _, last = name.rpartition(".")
    stem, _, part = head.rpartition(".")
    return (f"{stem}.{LEGACY_ATTENTION[part]}.{last}" if ".attentions." in name and part in LEGACY_ATTENTION
            else name)
