"""The UNet's config: diffusers' field names, defaults and JSON.
Schedulers and the VAE keep theirs beside their maths.

Read first of minidiff; then schedule.py or embeddings.py. Mirrors: diffusers' UNet2DConditionModel.__init__.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from miniclip.config import (
    Config,
    ConfigError,
    Count,
    Epsilon,
    Fraction,
    Levels,
    Pixels,
    Positive,
    Range,
    Real,
    Vocabulary,
    Width,
)
from miniclip.files import shown

# Whether a level attends: an exact table keyed by upstream's block names.
DOWN_ATTENDS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_ATTENDS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
# None: no middle at all
MID_ATTENDS = {"UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True, None: False}

Sides = Pixels | Annotated[tuple[Pixels, ...], Range(2, 2)]     # a square's, or H and W
Resnets = Annotated[int, Range(1, 64)]      # of a level; 2 in Stable Diffusion
Depth = Annotated[int, Range(0, 256)]       # transformer blocks after a resnet; 10 in SDXL
Depths = Depth | Annotated[tuple[Depth, ...], Range(1, 65)]     # at a level, or after each of its resnets
MOST_BLOCKS = 1_000     # resnets and transformer blocks, were all as deep as the deepest; 176 in SDXL


@dataclass(frozen=True, eq=False, repr=False)
class UNet2DConditionConfig(Config):
    """Fields and defaults of diffusers' UNet2DConditionModel; those left out are in `inert`."""

    sample_size: Sides | None = None            # the usual H and W; any size runs
    in_channels: Count = 4                      # 9 for inpainting, 8 for InstructPix2Pix
    out_channels: Count = 4
    center_input_sample: bool = False           # map inputs from [0, 1] to [-1, 1] first
    flip_sin_to_cos: bool = True                # cosines first in the timestep embedding
    freq_shift: Real = 0
    down_block_types: Levels[str] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: Levels[str] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | Levels[bool] = False       # attn1 looks at the text too (the x4 upscaler)
    block_out_channels: Levels[Width] = (320, 640, 1280, 1280)
    layers_per_block: Resnets | Levels[Resnets] = 2         # resnets on each way down; one more on the way up
    downsample_padding: Annotated[int, Range(0, 1)] = 1
    mid_block_scale_factor: Positive = 1        # divides the middle resnets' sums
    dropout: Fraction = 0.0                     # in the resnets only, as upstream
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    norm_num_groups: Count = 32
    norm_eps: Epsilon = 1e-5
    # width of encoder_hidden_states, per level if a tuple
    cross_attention_dim: Width | Levels[Width] = 1280
    transformer_layers_per_block: Depth | Levels[Depths] = 1
    reverse_transformer_layers_per_block: Levels[Depths] | None = None  # given in the order of the way up
    encoder_hid_dim: Width | None = None        # width of the text before encoder_hid_proj
    encoder_hid_dim_type: Literal["text_proj"] | None = None
    attention_head_dim: Count | Levels[Count] = 8   # upstream's misnomer: the COUNT of heads
    use_linear_projection: bool = False
    class_embed_type: Literal["timestep", "identity", "projection", "simple_projection"] | None = None
    addition_embed_type: Literal["text_time"] | None = None     # SDXL: pooled text and sizes
    addition_time_embed_dim: Width | None = None
    num_class_embeds: Vocabulary | None = None
    upcast_attention: bool = False              # no effect on the fused attention, here as upstream
    time_cond_proj_dim: Width | None = None     # LCM's guidance embedding
    projection_class_embeddings_input_dim: Width | None = None
    class_embeddings_concat: bool = False       # AudioLDM: beside the time embedding, not added to it

    inert: ClassVar[dict[str, tuple]] = {
        "num_attention_heads": (None,),
        "dual_cross_attention": (False, None),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False, None),
        "resnet_out_scale_factor": (1.0, 1, None),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
        "addition_embed_type_num_heads": (64, None),
    }

    def check(self) -> None:
        """Blocks exist, lists have an entry for each level, numbers divide."""
        levels = len(self.down_block_types)
        _known("down_block_types", self.down_block_types, DOWN_ATTENDS)
        _known("up_block_types", self.up_block_types, UP_ATTENDS)
        _known("mid_block_type", (self.mid_block_type,), MID_ATTENDS)
        for name in ("up_block_types", "block_out_channels", "only_cross_attention", "attention_head_dim",
                     "cross_attention_dim", "layers_per_block", "transformer_layers_per_block"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ConfigError(f"{name} = {shown(value)} has {len(value)} entries for {levels} "
                                  "down_block_types")
        self._check_numbers()
        self._check_conditions()

    def _check_numbers(self) -> None:
        up = self.reverse_transformer_layers_per_block or ()
        depth = max(_flat((self.transformer_layers_per_block, *up)))
        blocks = (sum(2 * n + 1 for n in self.per_level("layers_per_block")) + 1) * (1 + depth)
        if blocks > MOST_BLOCKS:
            raise ConfigError(f"layers_per_block = {shown(self.layers_per_block)} with transformers of up to "
                              f"{depth} blocks makes {blocks} blocks, more than {MOST_BLOCKS}")
        for i, channels in enumerate(self.block_out_channels):
            if channels % self.norm_num_groups != 0:
                raise ConfigError(f"norm_num_groups = {self.norm_num_groups} does not divide "
                                  f"block_out_channels[{i}] = {channels}")
            if self.attends(i) and channels % self.per_level("attention_head_dim")[i] != 0:
                heads = self.per_level("attention_head_dim")[i]
                raise ConfigError(f"attention_head_dim = {heads} (a count of heads) does not divide "
                                  f"block_out_channels[{i}] = {channels}")

    def _check_conditions(self) -> None:
        layers, down = self.per_level("layers_per_block"), self.per_level("transformer_layers_per_block")
        up = self.reverse_transformer_layers_per_block
        if up is None and any(isinstance(n, tuple) for n in down):
            raise ConfigError("a nested transformer_layers_per_block needs "
                              "reverse_transformer_layers_per_block")
        for name, depths, counts in (("", down, layers), ("reverse_", up, [n + 1 for n in layers[::-1]])):
            if depths is not None and (len(depths) != len(counts) or any(
                    isinstance(depth, tuple) and len(depth) < n for depth, n in zip(depths, counts))):
                raise ConfigError(f"{name}transformer_layers_per_block = {shown(depths)} has no entry for "
                                  f"each resnet of layers_per_block = {shown(self.layers_per_block)}")
        if self.encoder_hid_dim_type is not None and self.encoder_hid_dim is None:
            raise ConfigError(f"encoder_hid_dim_type = {self.encoder_hid_dim_type!r} needs encoder_hid_dim")
        if self.encoder_hid_dim is not None and len(set(self.per_level("cross_attention_dim"))) > 1:
            raise ConfigError("encoder_hid_dim projects to one width, but cross_attention_dim = "
                              f"{shown(self.cross_attention_dim)}")
        for field, value in (("class_embed_type", self.class_embed_type),
                             ("addition_embed_type", self.addition_embed_type)):
            if value in ("projection", "simple_projection", "text_time") and \
                    self.projection_class_embeddings_input_dim is None:
                raise ConfigError(f"{field} = {value!r} needs projection_class_embeddings_input_dim")
        if self.addition_embed_type is not None and self.addition_time_embed_dim is None:
            raise ConfigError("addition_embed_type = 'text_time' needs addition_time_embed_dim")

    def attends(self, level: int) -> bool:
        """Whether a level attends on its way down, its way up, or in the middle below it."""
        last = len(self.down_block_types) - 1
        return (DOWN_ATTENDS[self.down_block_types[level]] or UP_ATTENDS[self.up_block_types[last - level]]
                or (level == last and MID_ATTENDS[self.mid_block_type]))

    def per_level(self, name: str) -> tuple[Any, ...]:
        """A field's values from the top level down, one number standing for all levels."""
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.down_block_types)


def _known(field: str, names: tuple, table: dict) -> None:
    for name in names:
        if name not in table:
            raise ConfigError(f"{field}: unknown block {shown(name)}; known are {', '.join(map(str, table))}")


def _flat(value: Any) -> tuple[int, ...]:
    """The numbers of tuples in tuples."""
    return tuple(n for part in value for n in _flat(part)) if isinstance(value, tuple) else (value,)
