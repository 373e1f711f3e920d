"""UNet2DConditionModel: the noise predictor of Stable Diffusion.

Read after attention.py. Papers: Ronneberger 2015 (the U), Ho 2020 appendix B, Rombach 2022 section 3.3,
Podell 2023 section 2 (SDXL's size conditioning).
Mirrors: diffusers' unets/unet_2d_condition.py, unet_2d_blocks.py.
Shapes: B batch, C channels, H W height and width, S text tokens, D text width, E time embedding width.

SD 1.5 at 64 x 64 latents, the numbers being C @ H = W; every arrow across is a skip that the way up pops:

    conv_in    320 @ 64 -----------------------------------------------------> conv_out  4 @ 64
    down 0     320 @ 64, 64, then halved to 32 -->  two resnets + attention --> up 3   320 @ 64
    down 1     640 @ 32, 32, then halved to 16 -->  two resnets + attention --> up 2   640 @ 32, doubled to 64
    down 2    1280 @ 16, 16, then halved to 8  -->  two resnets + attention --> up 1  1280 @ 16, doubled to 32
    down 3    1280 @  8,  8                    -->  two resnets             --> up 0  1280 @  8, doubled to 16
    mid       1280 @  8      resnet, attention, resnet
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniclip.output import ModelOutput
from miniclip.weights import ModelFolder
from minidiff.attention import Transformer2DModel
from minidiff.config import DOWN_ATTENDS, MID_ATTENDS, UP_ATTENDS, UNet2DConditionConfig
from minidiff.embeddings import ACTIVATIONS, TimestepEmbedding, Timesteps
from minidiff.habits import ModelHabits
from minidiff.resnet import Downsample2D, ResnetBlock2D, Upsample2D


@dataclass(eq=False, repr=False)
class UNet2DConditionOutput(ModelOutput):
    """The prediction [B, out_channels, H, W] as `.sample`, `["sample"]` or `[0]`."""

    sample: Tensor


class Block(nn.Module):
    """Base of the three kinds of block: resnets, each followed by a transformer where the level attends."""

    gradient_checkpointing = False

    def run(self, module: nn.Module, *args: Any) -> Tensor:
        """module(*args), recomputing its activations in the backward pass if asked to."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False)
        return module(*args)

    def register(self, pairs: list[tuple[nn.Module, nn.Module | None]]) -> None:
        """Takes pairs that were built in the order in which they run, which is the order in which upstream
        draws first weights from a seed; its keys have the transformers first."""
        self.attentions = nn.ModuleList(attention for _, attention in pairs if attention is not None)
        self.resnets = nn.ModuleList(resnet for resnet, _ in pairs)

    def pairs(self) -> list[tuple[nn.Module, nn.Module | None]]:
        """Each resnet with the transformer after it, or with None on a level that does not attend."""
        return list(zip(self.resnets, self.attentions or [None] * len(self.resnets), strict=True))


class DownBlock(Block):
    """Resnets (and transformers), then half the size. Returns the map and one skip for each map it made."""

    def __init__(self, widths: list[int], make_resnet: partial, make_attention: partial | None, layers: int,
                 depths: list[int], padding: int | None):
        super().__init__()
        out, widths_in = widths[-1], [widths[0]] + [widths[-1]] * (layers - 1)
        self.register([(make_resnet(width, out), make_attention and make_attention(out, depths[j]))
                       for j, width in enumerate(widths_in)])
        self.downsamplers = nn.ModuleList([Downsample2D(out, padding)] if padding is not None
                                          else [])

    def forward(self, h: Tensor, temb: Tensor, text: tuple,
                residual: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """h [B, C, H, W], temb [B, E]; text: context and two masks; residual: a T2I-Adapter's."""
        skips = []
        for resnet, attention in self.pairs():
            h = self.run(resnet, h, temb)
            h = h if attention is None else self.run(attention, h, *text)
            skips.append(h)
        # T2I-Adapter: before the halving where the level attends,
        if self.attentions and residual is not None:
            h = skips[-1] = h + residual
        for downsampler in self.downsamplers:
            h = downsampler(h)                                              # [B, C, H/2, W/2]
            skips.append(h)
        if not self.attentions and residual is not None:    # and after it where it does not
            h = skips[-1] = h + residual
        return h, skips


class MidBlock(Block):
    """A resnet, then (transformer, resnet) if it attends."""

    def __init__(self, channels: int, make_resnet: partial, make_attention: partial | None,
                 depths: list[int]):
        super().__init__()
        resnet = partial(make_resnet, channels, channels)
        pairs = [(resnet(), make_attention and make_attention(channels, depths[0]))]
        self.register(pairs if make_attention is None else [*pairs, (resnet(), None)])

    def forward(self, h: Tensor, temb: Tensor, text: tuple) -> Tensor:
        """h [B, C, H, W] -> the same shape; text: context and the two masks of Transformer2DModel."""
        h = self.run(self.resnets[0], h, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            h = self.run(resnet, self.run(attention, h, *text), temb)
        return h


class UpBlock(Block):
    """Pops one skip for each resnet, concatenates it, then doubles the size (to that of the next skip)."""

    def __init__(self, widths_in: list[int], out: int, make_resnet: partial, make_attention: partial | None,
                 depths: list[int], upsample: bool):
        super().__init__()
        self.register([(make_resnet(width, out), make_attention and make_attention(out, depths[j]))
                       for j, width in enumerate(widths_in)])
        self.upsamplers = nn.ModuleList([Upsample2D(out)] if upsample else [])

    def forward(self, h: Tensor, skips: list[Tensor], temb: Tensor, text: tuple) -> Tensor:
        """h [B, C, H, W] -> the next level's map; takes its skips off the end of `skips`, in place."""
        for resnet, attention in self.pairs():
            h = torch.cat([h, skips.pop()], dim=1)                          # [B, C + C_skip, H, W]
            h = self.run(resnet, h, temb)
            h = h if attention is None else self.run(attention, h, *text)
        for upsampler in self.upsamplers:
            h = upsampler(h, skips[-1].shape[-2:])      # so odd sizes meet their skips
        return h


class UNet2DConditionModel(ModelHabits, ModelFolder, nn.Module):
    """Predicts the noise (or v, or x0) in a noisy picture, given the time and a text.

    Built from a UNet2DConditionConfig or from its fields: `UNet2DConditionModel(block_out_channels=(32,
    64), ...)`.
    Keys, shapes and their order in the state dict are diffusers'.
    Raises ConfigError for what it cannot honour.
    """

    config_class = UNet2DConditionConfig
    weights_stem = "diffusion_pytorch_model"

    def __init__(self, config: UNet2DConditionConfig | None = None, **fields: Any):
        super().__init__()
        self.config = c = config or UNet2DConditionConfig.from_dict(fields, "UNet2DConditionModel")
        top, E = c.block_out_channels[0], 4 * c.block_out_channels[0]
        self.conv_in = nn.Conv2d(c.in_channels, top, 3, padding=1)
        self.time_proj = Timesteps(top, c.flip_sin_to_cos, c.freq_shift)
        self.time_embedding = TimestepEmbedding(top, E, c.act_fn, c.time_cond_proj_dim)
        if c.encoder_hid_dim is not None:
            self.encoder_hid_proj = nn.Linear(c.encoder_hid_dim, c.per_level("cross_attention_dim")[0])
        self.class_embedding = self._class_embedding(E)
        if c.addition_embed_type == "text_time":
            self.add_time_proj = Timesteps(c.addition_time_embed_dim, c.flip_sin_to_cos, c.freq_shift)
            # silu, whatever act_fn
            self.add_embedding = TimestepEmbedding(c.projection_class_embeddings_input_dim, E)
        # up before mid: upstream's order
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        self._build_levels(temb_channels=2 * E if c.class_embeddings_concat else E)
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, top, c.norm_eps)
        self.conv_out = nn.Conv2d(top, c.out_channels, 3, padding=1)

    def _class_embedding(self, E: int) -> nn.Module | None:
        c = self.config
        if c.class_embed_type is None:
            return None if c.num_class_embeds is None else nn.Embedding(c.num_class_embeds, E)
        if c.class_embed_type == "timestep":
            return TimestepEmbedding(c.block_out_channels[0], E, c.act_fn)
        if c.class_embed_type == "projection":
            return TimestepEmbedding(c.projection_class_embeddings_input_dim, E)
        if c.class_embed_type == "simple_projection":
            return nn.Linear(c.projection_class_embeddings_input_dim, E)
        return nn.Identity()

    def _build_levels(self, temb_channels: int) -> None:
        """The constructor mirrors the forward pass: `stack` holds the channel counts that `skips` will
        hold."""
        c, last = self.config, len(self.config.block_out_channels) - 1
        channels, layers, depths = c.block_out_channels, c.per_level("layers_per_block"), self._depths()
        make_resnet = partial(ResnetBlock2D, temb_channels=temb_channels, groups=c.norm_num_groups,
                              eps=c.norm_eps, act_fn=c.act_fn, dropout=c.dropout)
        stack = [channels[0]]                                                   # conv_in's map
        for i, name in enumerate(c.down_block_types):
            widths = [channels[max(i - 1, 0)], channels[i]]
            padding = None if i == last else c.downsample_padding
            attention = self._attention(i) if DOWN_ATTENDS[name] else None
            self.down_blocks.append(DownBlock(widths, make_resnet, attention, layers[i], depths[i], padding))
            stack += [channels[i]] * (layers[i] + (i < last))

        if c.mid_block_type is not None:
            attention = self._attention(last, mid=True) if MID_ATTENDS[c.mid_block_type] else None
            scaled_resnet = partial(make_resnet, output_scale_factor=c.mid_block_scale_factor)
            self.mid_block = MidBlock(channels[last], scaled_resnet, attention, depths[last])

        below = channels[last]
        for i, name in zip(range(last, -1, -1), c.up_block_types, strict=True):
            widths_in = [(below if j == 0 else channels[i]) + stack.pop() for j in range(layers[i] + 1)]
            attention = self._attention(i) if UP_ATTENDS[name] else None
            up_depths = self._depths(up=True)[i]
            self.up_blocks.append(UpBlock(widths_in, channels[i], make_resnet, attention, up_depths,
                                          upsample=i > 0))
            below = channels[i]
        assert not stack

    def _attention(self, level: int, mid: bool = False) -> partial:
        c = self.config
        return partial(Transformer2DModel, context_dim=c.per_level("cross_attention_dim")[level],
                       heads=c.per_level("attention_head_dim")[level],  # upstream's misnomer: a count
                       groups=c.norm_num_groups, use_linear_projection=c.use_linear_projection,
                       only_cross_attention=not mid and c.per_level("only_cross_attention")[level])

    def _depths(self, up: bool = False) -> list[list[int]]:
        """Transformer layers after each resnet of each level,
        the levels counted from the top on both ways."""
        c = self.config
        depths = c.per_level("transformer_layers_per_block")
        if up and c.reverse_transformer_layers_per_block is not None:
            depths = c.reverse_transformer_layers_per_block[::-1]
        counts = [n + up for n in c.per_level("layers_per_block")]
        return [list(d) if isinstance(d, tuple) else [d] * n for d, n in zip(depths, counts, strict=True)]

    def forward(self, sample: Tensor, timestep: Tensor | float | int,
                encoder_hidden_states: Tensor | None = None,
                class_labels: Tensor | None = None, timestep_cond: Tensor | None = None,
                attention_mask: Tensor | None = None, cross_attention_kwargs: dict[str, Any] | None = None,
                added_cond_kwargs: dict[str, Tensor] | None = None,
                down_block_additional_residuals: Sequence[Tensor] | None = None,
                mid_block_additional_residual: Tensor | None = None,
                down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
                encoder_attention_mask: Tensor | None = None,
                return_dict: bool = True) -> UNet2DConditionOutput | tuple[Tensor]:
        """One prediction.

        sample [B, in_channels, H, W] of any H and W; timestep a number, [1] or [B];
        encoder_hidden_states [B, S, D], which only a model without cross-attention may leave out;
        attention_mask [B, H*W] and encoder_attention_mask [B, S], 1 = look, 0 = do not. The residuals are a
        ControlNet's (down_block_..., mid_block_...) or a T2I-Adapter's (down_intrablock_...),
        never changed in place. added_cond_kwargs holds SDXL's text_embeds [B, P] and time_ids [B, 6].
        Returns `.sample` [B, out_channels, H, W]. Raises ValueError for inputs that do not fit the config.
        """
        self._check(sample, encoder_hidden_states, cross_attention_kwargs)
        adapter = list(down_intrablock_additional_residuals or ())
        control = list(down_block_additional_residuals or ())
        if control and mid_block_additional_residual is None:   # the old way to pass a T2I-Adapter's features
            adapter, control = control, []
        x = 2 * sample - 1 if self.config.center_input_sample else sample
        temb = self.embed_time(x, timestep, timestep_cond, class_labels, added_cond_kwargs)     # [B, E]
        text = (self.embed_text(encoder_hidden_states), bias(attention_mask, x),
                bias(encoder_attention_mask, x))

        h = self.conv_in(x)                                                 # [B, C0, H, W]
        skips = [h]
        for block in self.down_blocks:
            h, made = block(h, temb, text, adapter.pop(0) if adapter else None)
            skips += made                                                   # last: [B, C, H/2^n, W/2^n]
        if control:
            if len(control) != len(skips):
                raise ValueError(f"{len(control)} down_block_additional_residuals for {len(skips)} skips")
            skips = [skip + residual for skip, residual in zip(skips, control, strict=True)]

        if self.config.mid_block_type is not None:
            h = self.mid_block(h, temb, text)
        if adapter and adapter[0].shape == h.shape:
            h = h + adapter.pop(0)
        if control:
            h = h + mid_block_additional_residual

        for block in self.up_blocks:
            h = block(h, skips, temb, text)                                 # back to [B, C0, H, W]
        assert not skips
        out = self.conv_out(ACTIVATIONS[self.config.act_fn](self.conv_norm_out(h)))
        return UNet2DConditionOutput(out) if return_dict else (out,)

    def embed_time(self, x: Tensor, timestep: Tensor | float | int, timestep_cond: Tensor | None,
                   class_labels: Tensor | None, added: dict[str, Tensor] | None) -> Tensor:
        """The embedding that all resnets add: time, LCM's guidance, class, SDXL's sizes -> [B, E]."""
        c = self.config
        t = torch.as_tensor(timestep, device=x.device).reshape(-1)
        if t.shape[0] not in (x.shape[0], 1):
            raise ValueError(f"timestep has {t.shape[0]} entries for a batch of {x.shape[0]}")
        temb = self.time_embedding(self.time_proj(t.expand(x.shape[0])).to(x.dtype), timestep_cond)
        if self.class_embedding is not None:
            if class_labels is None:
                raise ValueError("class_labels are missing: this model has a class embedding")
            if c.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(x.dtype)
            labels = class_labels if c.class_embed_type is None else class_labels.to(x.dtype)
            embedded = self.class_embedding(labels)
            temb = torch.cat([temb, embedded], dim=-1) if c.class_embeddings_concat else temb + embedded
        if c.addition_embed_type == "text_time":
            temb = temb + self.embed_sizes(added or {}, x)
        return temb

    def embed_sizes(self, added: dict[str, Tensor], x: Tensor) -> Tensor:
        """SDXL: the pooled text beside six sinusoid-embedded numbers (original size, crop corner,
        target size)."""
        for name in ("text_embeds", "time_ids"):
            if name not in added:
                raise ValueError(f"added_cond_kwargs lacks {name!r}: addition_embed_type = 'text_time' needs "
                                 "it")
        sizes = self.add_time_proj(added["time_ids"].flatten()).reshape(x.shape[0], -1)
        return self.add_embedding(torch.cat([added["text_embeds"], sizes], dim=-1).to(x.dtype))

    def embed_text(self, text: Tensor | None) -> Tensor | None:
        """[B, S, encoder_hid_dim] -> [B, S, D]; without an encoder_hid_dim the text goes through as it is."""
        return text if self.config.encoder_hid_dim is None or text is None else self.encoder_hid_proj(text)

    def _check(self, sample: Tensor, text: Tensor | None, kwargs: dict[str, Any] | None) -> None:
        c = self.config
        if sample.ndim != 4 or sample.shape[1] != c.in_channels:
            raise ValueError(f"sample is {list(sample.shape)}, not [batch, {c.in_channels}, height, width]")
        widths = {c.encoder_hid_dim} if c.encoder_hid_dim else set(c.per_level("cross_attention_dim"))
        if text is None and any(map(c.attends, range(len(c.block_out_channels)))):
            D = " or ".join(map(str, sorted(widths)))
            raise ValueError("encoder_hidden_states are missing: this model attends to a text "
                             f"[{len(sample)}, tokens, {D}]")
        if text is not None and (text.ndim != 3 or text.shape[0] != sample.shape[0]):
            raise ValueError(f"encoder_hidden_states is {list(text.shape)}, not [{len(sample)}, tokens, "
                             "width]")
        if text is not None and text.shape[-1] not in widths:
            raise ValueError(f"encoder_hidden_states are {text.shape[-1]} wide, this model takes "
                             f"{sorted(widths)}")
        if kwargs and kwargs != {"scale": 1.0}:
            raise ValueError(f"cross_attention_kwargs = {kwargs} is not supported: attention takes no "
                             "options here")

    def enable_gradient_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep a block's inputs only,
        recompute the rest in the backward pass."""
        for block in [*self.down_blocks, *self.up_blocks, *filter(None, [getattr(self, "mid_block", None)])]:
            block.gradient_checkpointing = enable

    def disable_gradient_checkpointing(self) -> None:
        """Keeps all activations again."""
        self.enable_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the blocks recompute their activations in the backward pass."""
        return self.down_blocks[0].gradient_checkpointing


def bias(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask [B, S], 1 = look, 0 = do not, as what is added to the scores: [B, 1, S]."""
    return None if mask is None else ((1 - mask.to(x.dtype)) * -10000.0)[:, None]
