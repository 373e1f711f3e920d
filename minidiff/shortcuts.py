"""Shortcuts: pictures sooner, or from less memory, that are not quite the same pictures.

Read last; nothing else needs it. `optimize` keeps the answers; what is here gives some of them up, each
undone by `restore()` or at the end of a `with`, and each exact at its neutral value. They work together, and
with `optimize`, on CPUs and GPUs. docs/shortcuts.md has time against difference, as measured.

    with deep_cache(pipe.unet, every=3), merge_tokens(pipe.unet, ratio=0.5):
        pipe.guidance_interval = 0.2, 0.8       # Kynkaanniemi 2024; of the pipeline and of TextToImage
        pipe("a herb shop at dawn")

Papers: Ma 2023 (DeepCache); Bolya and Hoffman 2023 (ToMe for Stable Diffusion). No upstream.
Shapes: B batch, C channels, H W height and width, T = H*W tokens, n of them kept, r merged into those.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.int8 import INT8, to_int8
from minidiff.attention import Attention, Transformer2DModel
from minidiff.optimize import FASTER, Text, TextLinear
from minidiff.unet import Block, UNet2DConditionModel


class Undo(contextlib.ExitStack):
    """What a shortcut returns: `restore()`, or the end of a `with`, makes the model what it was before."""

    restore = contextlib.ExitStack.close


# -------------------------------------------------------------------------------------------------- DeepCache


def deep_cache(unet: UNet2DConditionModel, every: int = 3, skips: int = 2) -> Undo:
    """The deep levels run on one step of `every`; on the others what they said last is used again, and only
    the outermost level's last `skips` resnets on the way up run, with what leads to their skips.

    every: 1 is exact. skips: 1 to the level's resnets on the way up (3 in Stable Diffusion); more is slower
    and nearer to exact. Gives up: what changes fast in the coarse features, more of it at few steps. A call
    is exact where its features cannot be used again: with another text or shape, at a timestep that is not
    below the one before (another picture), with gradients or with ControlNet's residuals.
    Raises ValueError for numbers out of range, and for a UNet that has a cache.
    """
    most = len(unet.up_blocks[-1].resnets)
    if every < 1 or not 1 <= skips <= most:
        raise ValueError(f"deep_cache: every = {every} must be at least 1, skips = {skips} in 1 to {most}")
    if "forward" in vars(unet):
        raise ValueError("deep_cache: this UNet has one already; restore() it first")
    unet.forward = DeepCache(unet, every, skips).forward
    undo = Undo()
    undo.callback(delattr, unet, "forward")
    return undo


class DeepCache:
    """A UNet's forward with a memory."""

    def __init__(self, unet: UNet2DConditionModel, every: int, skips: int):
        self.unet, self.every, self.skips, self.text = unet, every, skips, Text()
        self.forget()

    def forget(self) -> None:
        """The next call is exact."""
        self.age, self.deep, self.last = 0, None, None

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor | None = None,
                **options: Any) -> Any:
        """As the UNet's own; options by name."""
        given, plain = (sample, timestep, encoder_hidden_states), type(self.unet).forward
        if torch.is_grad_enabled() or any(options.get(name) is not None for name in RESIDUALS):
            self.forget()
            return plain(self.unet, *given, **options)
        goes_on, self.age = self.goes_on(*given), self.age + 1
        if goes_on and self.age < self.every:
            return plain(outermost(self.unet, self.skips, self.deep), *given, **options)
        self.age, self.deep = 0, None
        with self.unet.up_blocks[-1].resnets[-self.skips].register_forward_pre_hook(self.remember):
            return plain(self.unet, *given, **options)

    def goes_on(self, sample: Tensor, timestep: Any, text: Tensor | None) -> bool:
        """Whether this is a later step towards the same picture, as far as can be seen."""
        times = torch.as_tensor(timestep).flatten().tolist()
        shape = sample.shape, sample.dtype, sample.device, len(times)
        before, self.last = self.last, (shape, None if text is None else self.text.same(text), times)
        return (self.deep is not None and before[0] == shape and before[1] is self.last[1]
                and all(now < then for now, then in zip(times, before[2], strict=True)))

    def remember(self, resnet: nn.Module, args: tuple) -> None:
        """Of [deep features, skip] side by side, the first."""
        self.deep = args[0][:, : -self.unet.config.block_out_channels[0]].detach()


RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual",
             "down_intrablock_additional_residuals")


def outermost(unet: UNet2DConditionModel, skips: int, deep: Tensor) -> UNet2DConditionModel:
    """A UNet of the same layers with one level, which is cut as well, and a memory where the others were."""
    shell = copied(unet)
    shell.config = unet.config.changed(mid_block_type="UNetMidBlock2D")     # any: so that it is called
    shell.down_blocks = nn.ModuleList([part(unet.down_blocks[0], slice(0, skips - 1))])
    shell.down_blocks[0].downsamplers = nn.ModuleList()
    shell.mid_block = Memory(deep)
    shell.up_blocks = nn.ModuleList([part(unet.up_blocks[-1], slice(-skips, None))])
    return shell


class Memory(nn.Module):
    """In the place of a MidBlock: says the same whatever it is given."""

    def __init__(self, deep: Tensor):
        super().__init__()
        self.deep = deep

    def forward(self, h: Tensor, temb: Tensor, text: tuple) -> Tensor:
        """What was remembered, [B, C, H, W]."""
        return self.deep


def part(block: Block, kept: slice) -> Block:
    """A block with some of its resnets and their transformers: the very same ones."""
    block = copied(block)
    block.attentions, block.resnets = block.attentions[kept], block.resnets[kept]
    return block


def copied(module: nn.Module) -> nn.Module:
    """Another module with the same children, which may be given others."""
    module = copy.copy(module)
    module._modules = dict(module._modules)
    return module


# ---------------------------------------------------------------------------------------------- token merging


def merge_tokens(unet: UNet2DConditionModel, ratio: float = 0.5) -> Undo:
    """Self-attention at the highest level that attends sees `ratio` of its tokens less: those most alike to
    one of those that stay, which stands for their mean; each gets its answer.

    ratio: 0 is exact, 0.75 the most. Gives up: small detail in even regions. Masked calls are exact.
    Raises ValueError for another ratio, for a UNet without self-attention or with merged tokens.
    """
    if not 0 <= ratio <= 0.75:
        raise ValueError(f"merge_tokens: ratio = {ratio} must lie in 0 to 0.75")
    levels = zip(unet.down_blocks, reversed(unet.up_blocks), strict=True)
    levels = ([*down.attentions, *up.attentions] for down, up in levels)
    transformers = next(filter(None, levels), [])
    blocks = [block for transformer in transformers for block in transformer.transformer_blocks
              if not block.only_cross_attention]
    if not blocks:
        raise ValueError("merge_tokens: this UNet has no self-attention")
    if any(isinstance(getattr(hook, "__self__", None), TokenMerging)
           for hook in blocks[0].attn1._forward_pre_hooks.values()):
        raise ValueError("merge_tokens: this UNet merges tokens already; restore() it first")
    merging, undo = TokenMerging(ratio), Undo()
    for transformer in transformers:
        undo.enter_context(transformer.register_forward_pre_hook(merging.see))
    for block in blocks:
        undo.enter_context(block.attn1.register_forward_pre_hook(merging.merge))
        undo.enter_context(block.attn1.register_forward_hook(merging.unmerge))
    return undo


class TokenMerging:
    """The hooks around self-attention."""

    def __init__(self, ratio: float):
        self.ratio, self.size, self.rows = ratio, (0, 0), None

    def see(self, transformer: Transformer2DModel, args: tuple) -> None:
        """Of what height and width the map is whose positions are the tokens."""
        self.size = args[0].shape[-2:]

    def merge(self, attention: Attention, args: tuple) -> tuple | None:
        """x [B, T, C] -> [B, T - r, C]."""
        x, _, mask = args
        r = min(int(self.ratio * x.shape[1]), x.shape[1] - squares(self.size))
        self.rows = None if r == 0 or mask is not None else merged_rows(x, self.size, r)
        return None if self.rows is None else (mean_rows(x, self.rows, x.shape[1] - r), None, None)

    def unmerge(self, attention: Attention, args: tuple, out: Tensor) -> Tensor:
        """[B, T - r, C] -> [B, T, C]."""
        return out if self.rows is None else out.flatten(0, 1)[self.rows + first_rows(out)]


def squares(size: tuple[int, int]) -> int:
    """How many squares of 2 x 2 cover a map."""
    return ((size[0] + 1) // 2) * ((size[1] + 1) // 2)


def merged_rows(x: Tensor, size: tuple[int, int], r: int) -> Tensor:
    """To which row of the merged tokens each token of x [B, T, C] goes: [B, T], from 0 to T - r - 1.

    The upper left token of each square of 2 x 2 stays; the r others with the greatest cosine to one of
    those go to it; the rest have rows of their own.
    """
    B, T, _ = x.shape
    place = torch.arange(T, device=x.device)
    stays = (place // size[1] % 2 == 0) & (place % size[1] % 2 == 0)
    unit, n = F.normalize(x, dim=-1), squares(size)
    likeness, nearest = (unit[:, ~stays] @ unit[:, stays].transpose(1, 2)).max(-1)      # [B, T - n]
    rank = likeness.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    rows = torch.empty(B, T, dtype=torch.long, device=x.device)
    rows[:, stays] = place[:n]
    rows[:, ~stays] = torch.where(rank < r, nearest, n + rank - r)
    return rows


def mean_rows(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """The mean of the tokens of x [B, T, C] that go to each row: [B, count, C]."""
    B, _, C = x.shape
    y = x.new_zeros(B, count, C)
    flat = (rows + first_rows(y)).flatten()
    y = y.flatten(0, 1).index_add_(0, flat, x.flatten(0, 1))
    return (y / flat.bincount(minlength=B * count)[:, None]).view(B, count, C)


def first_rows(y: Tensor) -> Tensor:
    """Where the rows of each of the batch begin when [B, T, C] is flat: [B, 1]."""
    return torch.arange(len(y), device=y.device)[:, None] * y.shape[1]


# ------------------------------------------------------------------------------------------------------- int8


def int8(model: nn.Module) -> nn.Module:
    """Weights of convolutions and linear layers become whole numbers from -127 to 127 and a factor for each
    output channel, in place; returns the model. A quarter of float32's memory.

    Gives up: the weights' last digits, for good (load them again), and time: each use makes floats of them,
    and `optimize` leaves such layers alone. The state dict has the rounded weights under the usual keys; they
    cannot be trained or loaded into. LoRA layers stay as they are: load and fuse a LoRA before.
    """
    plain = {TextLinear: nn.Linear, **{fast: slow for slow, fast in FASTER.items()}}
    for layer in list(model.modules()):
        kind = plain.get(type(layer), type(layer))
        if kind in (nn.Conv2d, nn.Linear):
            vars(layer).pop("made", None)               # optimize's copies
            to_int8(layer, INT8[kind])
    return model
