"""CLIP: a text transformer and a vision transformer that meet in one space,
and the loss that makes them meet.

Read after config.py, before tokenizer.py and image.py; top to bottom, small parts first.
Paper: Radford et al. 2021, section 2.3 and figure 3 (the loss), 2.4 (the towers); Dosovitskiy et al.
2021 (ViT).
Mirrors: transformers/models/clip/modeling_clip.py, with its class names, outputs and checkpoint keys.
Shapes: B batch, S text tokens, T tokens of either tower, D width, nh heads, hd = D / nh, E shared width,
        H W picture height and width, p patch side, Bi pictures, Bt texts.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniclip.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig, ConfigError
from miniclip.habits import PAIR_LEFT_OUT
from miniclip.output import ModelOutput
from miniclip.pretrained import PretrainedModel, TokenTable

# ---------------------------------------------------------------------------------------------------- outputs


@dataclass(eq=False, repr=False)
class BaseModelOutputWithPooling(ModelOutput):
    """What a tower returns.

    last_hidden_state: [B, T, D]; text: after final_layer_norm, vision: before post_layernorm.
    pooler_output:     [B, D], one vector a text or picture, normed, not yet projected.
    hidden_states:     on request, L + 1 tensors [B, T, D]: the first layer's input, then each layer's output.
    attentions:        on request, L tensors [B, nh, T, T] whose rows sum to 1.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False, repr=False)
class CLIPTextModelOutput(ModelOutput):
    """A text tower with its projection: text_embeds [B, E], not normalised, then the tower's fields."""

    text_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False, repr=False)
class CLIPVisionModelOutput(ModelOutput):
    """A vision tower with its projection: image_embeds [B, E], not normalised, then the tower's fields."""

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False, repr=False)
class CLIPOutput(ModelOutput):
    """Both towers. logits_per_image [Bi, Bt]; the embeddings [B, E] have length 1; loss only on request."""

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None  # its pooler_output is projected
    vision_model_output: BaseModelOutputWithPooling | None = None


class Features(Tensor):
    """What `get_text_features` and `get_image_features` return: a tensor [B,
    E] that reads like an output too.

    transformers 4 returned the tensor, transformers 5 an output whose `pooler_output` is that tensor.
    This is the tensor (arithmetic, indexing by number and torch functions are the tensor's and give plain
    tensors), and it carries 5's fields: `.pooler_output`, `.last_hidden_state`,
    `.hidden_states`, `.attentions`, by key as well.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def pooler_output(self) -> Tensor:
        """The features themselves, as a plain tensor [B, E]."""
        return self.as_subclass(Tensor)

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.as_subclass(Tensor)[key]


def features_of(projected: Tensor, out: BaseModelOutputWithPooling, return_dict: bool) -> Features | tuple:
    """`projected` [B, E] as Features with the tower's fields; a tuple of them without return_dict."""
    if not return_dict:
        return dataclasses.replace(out, pooler_output=projected).to_tuple()
    features = projected.as_subclass(Features)
    features.last_hidden_state, features.hidden_states = out.last_hidden_state, out.hidden_states
    features.attentions = out.attentions
    return features


# -------------------------------------------------------------------------------------------------- attention


def attention_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool,
                    dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(hd) + bias) v by torch's kernel; the one that runs. Same arguments as the next."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=causal and bias is None
    )  # fmt: skip


def attention_written_out(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, dropout: float
) -> tuple[Tensor, Tensor]:
    """The same in plain maths: for reading, and for those who ask for the weights.
    A test holds the two equal.

    q, k, v: [B, nh, T, hd]. bias: None or broadcastable to [B, nh, T, T], added before the softmax.
    causal: without a bias, token i sees tokens 0..i. Returns the result [B, nh, T, hd] and the weights.
    """
    if causal and bias is None:
        bias = causal_bias(q.shape[2], None, q.dtype, q.device)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])                 # [B, nh, T, T]
    if scores.dtype in (torch.float16, torch.bfloat16):
        # 16 bits cannot hold a softmax's sum
        scores = scores.float()
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(dim=-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v, weights                           # [B, nh, T, hd]


def causal_bias(length: int, mask: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores: 0 where token i may see token j, else the lowest number of the dtype.

    mask: None or [B, S], nonzero = a real token. The lowest number rather than -inf: a row that may see
    nothing (padding on the left) then averages over all tokens instead of becoming NaN.
    Returns [B or 1, 1, S, S].
    """
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    if mask is not None:
        allowed = allowed & mask.bool()[:, None, None, :]                     # [B, 1, S, S]
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)


class CLIPAttention(nn.Module):
    """Multi-head self-attention, [B, T, D] -> [B, T, D] and, on request, the weights [B, nh, T, T]."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(D, D)                                         # upstream's order: k, v, q
        self.v_proj = nn.Linear(D, D)
        self.q_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x: Tensor, bias: Tensor | None, causal: bool,
                want_weights: bool) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] -> [B, T, D] and the weights or None; bias and causal as in attention_written_out."""
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)      # [B, nh, T, hd]

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        dropout = self.dropout if self.training else 0.0
        if want_weights:
            y, weights = attention_written_out(q, k, v, bias, causal, dropout)
        else:
            y, weights = attention_fused(q, k, v, bias, causal, dropout), None
        return self.out_proj(y.transpose(1, 2).flatten(2)), weights           # [B, T, D]


# ---------------------------------------------------------------------------------------------------- encoder


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's cheap GELU: x sigmoid(1.702 x); up to 0.02 away from the exact one."""
    return x * torch.sigmoid(1.702 * x)


def activation(name: str):
    """hidden_act of a config -> function. An unknown name was refused when the config was built."""
    if name in ("gelu_new", "gelu_pytorch_tanh"):                             # two names of one formula
        return lambda x: F.gelu(x, approximate="tanh")
    return {"quick_gelu": quick_gelu, "gelu": F.gelu, "relu": F.relu}[name]


class CLIPMLP(nn.Module):
    """Two linear layers around the config's activation: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.activation_fn = activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], intermediate_size wide inside."""
        return self.fc2(self.activation_fn(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, bias: Tensor | None, causal: bool,
                want_weights: bool) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] -> [B, T, D] and the attention weights [B, nh, T, T] or None."""
        y, weights = self.self_attn(self.layer_norm1(x), bias, causal, want_weights)
        x = x + y
        return x + self.mlp(self.layer_norm2(x)), weights


class CLIPEncoder(nn.Module):
    """The stack of blocks. Returns x [B, T, D], all hidden states or None, all attention weights or None."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))
        # in training: keep only the inputs of blocks, recompute the rest
        self.gradient_checkpointing = bool(getattr(config, "gradient_checkpointing", False))

    def forward(self, x: Tensor, bias: Tensor | None, causal: bool, want_states: bool, want_weights: bool):
        """x [B, T, D]; bias and causal go to every layer, as in attention_written_out."""
        states, attentions = [x], []
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x, weights = checkpoint(layer, x, bias, causal, want_weights, use_reentrant=False)
            else:
                x, weights = layer(x, bias, causal, want_weights)
            states.append(x)
            attentions.append(weights)
        return x, tuple(states) if want_states else None, tuple(attentions) if want_weights else None


def choose(option: bool | None, default: bool) -> bool:
    """An option of a forward call, or, where the call leaves it open, the config's."""
    return default if option is None else bool(option)


# ------------------------------------------------------------------------------------------------- text tower


class CLIPTextEmbeddings(nn.Module):
    """A vector for each token id plus a learned vector for each position: [B, S] -> [B, S, D]."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """[B, S] -> [B, S, D]; positions default to 0 .. S-1. Raises ValueError for too large an S."""
        S, most = input_ids.shape[1], self.position_embedding.num_embeddings
        if S > most:
            raise ValueError(f"input_ids: {S} tokens, but the model has max_position_embeddings = {most}; "
                             "truncate")
        if position_ids is None:
            return self.token_embedding(input_ids) + self.position_embedding.weight[:S]
        return self.token_embedding(input_ids) + self.position_embedding(position_ids)


class CLIPTextTransformer(nn.Module):
    """The text tower itself. Causal, though it only reads: OpenAI kept the option of a language-model
    loss."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        init_tower(self, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """input_ids [B, S] int; attention_mask [B, S], nonzero = a real token, or None: all are.

        output_attentions, output_hidden_states: fills these fields of the result. return_dict: False gives a
        tuple. None leaves each of the three to the config.
        """
        if input_ids is None:
            raise ValueError("input_ids is missing: the text tower reads token ids [B, S]")
        input_ids = input_ids.view(-1, input_ids.shape[-1])                   # [B, S]
        x = self.embeddings(input_ids, position_ids)                          # [B, S, D]
        bias = None
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                shapes = f"{list(attention_mask.shape)}, but input_ids {list(input_ids.shape)}"
                raise ValueError(f"attention_mask has shape {shapes}")
            bias = causal_bias(x.shape[1], attention_mask, x.dtype, x.device)
        x, states, attentions = self.encoder(
            x, bias, True, choose(output_hidden_states, self.config.output_hidden_states),
            choose(output_attentions, self.config.output_attentions),
        )  # fmt: skip
        x = self.final_layer_norm(x)
        out = BaseModelOutputWithPooling(x, self.pool(x, input_ids), states, attentions)
        return out if choose(return_dict, self.config.return_dict) else out.to_tuple()

    def pool(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """[B, S, D] -> [B, D]: the vector at the end-of-text token,
        the only one that has seen the whole text.

        The old rule (eos_token_id == 2, a wrong value in early configs) takes the largest id, which was the
        end-of-text token until someone added tokens. A row without that token gives position 0, as upstream.
        """
        ids = input_ids.int()                                                 # ONNX knows no argmax of int64
        where = ids if self.eos_token_id == 2 else (ids == self.eos_token_id).int()
        return x[torch.arange(x.shape[0], device=x.device), where.argmax(dim=1)]  # the first of equals


# ----------------------------------------------------------------------------------------------- vision tower


class CLIPVisionEmbeddings(nn.Module):
    """Cuts a picture into patches, maps each to a vector, puts a class token in front, adds positions."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        D, p = config.hidden_size, config.patch_size
        self.image_size, self.patch_size = config.image_size, p
        self.class_embedding = nn.Parameter(torch.randn(D))
        self.patch_embedding = nn.Conv2d(config.num_channels, D, kernel_size=p, stride=p, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // p) ** 2 + 1, D)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        """[B, C, H, W] -> [B, T, D]. ValueError for another size than the config's, unless interpolating."""
        B, _, H, W = pixel_values.shape
        if not interpolate_pos_encoding and (H, W) != (self.image_size, self.image_size):
            raise ValueError(f"Input image size ({H}*{W}) doesn't match model "
                             f"({self.image_size}*{self.image_size}).")
        x = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # [B, D, H/p, W/p]
        x = x.flatten(2).transpose(1, 2)                                      # [B, HW/p^2, D]
        x = torch.cat([self.class_embedding.expand(B, 1, -1), x], dim=1)      # [B, T, D], T = HW/p^2 + 1
        positions = self.position_embedding.weight                            # [T, D]
        if interpolate_pos_encoding and (H, W) != (self.image_size, self.image_size):
            positions = self.interpolate(positions, H // self.patch_size, W // self.patch_size)
        return x + positions

    def interpolate(self, positions: Tensor, rows: int, columns: int) -> Tensor:
        """Stretches the grid of positions to rows x columns by bicubic interpolation;
        the class token keeps its own.

        Without antialiasing, as transformers has it; OpenCLIP antialiases, so the two differ.
        """
        side = math.isqrt(len(positions) - 1)
        # [1, D, side, side]
        grid = positions[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([positions[:1], grid[0].flatten(1).T])               # [rows * columns + 1, D]


class CLIPVisionTransformer(nn.Module):
    """The vision tower itself: every patch sees every patch."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = CLIPVisionEmbeddings(config)
        # sic: the key has the typo
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        init_tower(self, config)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """pixel_values [B, C, H, W], normalised. Other sizes than the config's need
        interpolate_pos_encoding; the rest as in CLIPTextTransformer."""
        if pixel_values is None:
            raise ValueError("pixel_values is missing: the vision tower reads pictures [B, C, H, W]")
        x = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding))  # [B, T, D]
        x, states, attentions = self.encoder(
            x, None, False, choose(output_hidden_states, self.config.output_hidden_states),
            choose(output_attentions, self.config.output_attentions),
        )  # fmt: skip
        pooled = self.post_layernorm(x[:, 0])                                 # [B, D], the class token
        out = BaseModelOutputWithPooling(x, pooled, states, attentions)
        return out if choose(return_dict, self.config.return_dict) else out.to_tuple()


# -------------------------------------------------------------------------------------------- initial weights


def init_tower(tower: nn.Module, config: CLIPTextConfig | CLIPVisionConfig) -> None:
    """Random weights as transformers 5 draws them, the same from the same seed: normal, biases 0, norms 1.

    OpenAI's own code differs: there q, k, v are wide and out_proj narrow in the text tower,
    here the other way round; its positions are drawn with 0.01, here 0.02;
    and its ViT keeps torch's default in the blocks.
    """
    D, L, factor = config.hidden_size, config.num_hidden_layers, config.initializer_factor
    narrow, wide = D**-0.5 * (2 * L) ** -0.5 * factor, D**-0.5 * factor
    e = tower.embeddings
    if isinstance(e, CLIPTextEmbeddings):
        draw(e, {e.token_embedding.weight: 0.02 * factor, e.position_embedding.weight: 0.02 * factor})
    else:
        usual = config.initializer_range * factor
        draw(e, {e.class_embedding: wide, e.patch_embedding.weight: usual,
                 e.position_embedding.weight: usual})
    for layer in tower.encoder.layers:
        attn, mlp = layer.self_attn, layer.mlp
        draw(attn, {attn.q_proj.weight: narrow, attn.k_proj.weight: narrow, attn.v_proj.weight: narrow,
                    attn.out_proj.weight: wide})
        draw(mlp, {mlp.fc1.weight: (2 * D) ** -0.5 * factor, mlp.fc2.weight: narrow})


def draw(group: nn.Module, deviations: dict[Tensor, float]) -> None:
    """Draws the weights of a group of layers with these standard deviations, and sets their biases to 0.

    transformers first draws each layer for itself, in the order in which they were made; those numbers are
    thrown away, but a seed's next numbers are others after them.
    """
    for layer in group.children():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Embedding)) and layer.weight in deviations:
            nn.init.normal_(layer.weight)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for weight, deviation in deviations.items():
        nn.init.normal_(weight, std=deviation)


def projection(width: int, shared: int | None) -> nn.Linear:
    """[B, D] -> [B, E], no bias: the last step into the shared space. Its weights are yet to be drawn."""
    if shared is None:
        raise ConfigError("projection_dim = None, but this model projects")
    return nn.Linear(width, shared, bias=False)


# ---------------------------------------------------------------------------------------------- public models


class CLIPPreTrainedModel(PretrainedModel):
    """What the public models share: reading every generation of keys, writing config.json."""

    model_type = "clip"
    own_heads: tuple[str, ...] = ()  # projections of this class, to be kept when it is read from a whole CLIP

    @classmethod
    def convert_keys(cls, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keys of any transformers generation -> ours, which are transformers 4's.

        5.6 and later drop the prefix from a lone tower;
        before 4.31 the constant position_ids were stored; and a tower may be read from the file of a whole
        CLIP, whose other tensors are then left aside.
        """
        prefix = {"clip_text_model": "text_model.", "clip_vision_model": "vision_model."}.get(cls.model_type)
        kept = {k: v for k, v in state_dict.items() if not k.endswith(".embeddings.position_ids")}
        kept.pop("embeddings.position_ids", None)
        if prefix is None:
            return kept
        if not any(k.startswith(prefix) for k in kept):
            bare = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "final_layer_norm.")
            kept = {prefix + k if k.startswith(bare) else k: v for k, v in kept.items()}
        if "logit_scale" in kept:                                             # a whole CLIP
            kept = {k: v for k, v in kept.items() if k.startswith((prefix, *cls.own_heads))}
        return kept

    def export_config(self) -> dict[str, Any]:
        """config.json as transformers 4 and 5 read it."""
        dtype = str(self.dtype).removeprefix("torch.")
        head = {"architectures": [type(self).__name__], "model_type": self.model_type, "torch_dtype": dtype}
        return {**head, **self.config.to_dict()}


class _TextModel(TokenTable, CLIPPreTrainedModel):
    """The part common to CLIPTextModel and CLIPTextModelWithProjection."""

    config_class = CLIPTextConfig
    model_type = "clip_text_model"

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)


class CLIPTextModel(_TextModel):
    """The text tower alone: Stable Diffusion's text encoder. `model(input_ids)`."""

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None,
                **options: bool | None) -> BaseModelOutputWithPooling | tuple:
        """input_ids [B, S] -> last_hidden_state [B, S, D], pooler_output [B, D]; see CLIPTextTransformer."""
        return self.text_model(input_ids, attention_mask, position_ids, **options)


class CLIPTextModelWithProjection(_TextModel):
    """The text tower and its projection: SDXL's second text encoder."""

    own_heads = ("text_projection.",)
    base_model_prefix = "text_model"

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config)
        self.text_projection = projection(config.hidden_size, config.projection_dim)
        deviation = config.hidden_size**-0.5 * config.initializer_factor
        draw(self, {self.text_projection.weight: deviation})

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, *, return_dict: bool | None = None,
                **options: bool | None) -> CLIPTextModelOutput | tuple:
        """As CLIPTextTransformer.forward, but text_embeds [B, E] comes first, and no pooler_output."""
        out = self.text_model(input_ids, attention_mask, position_ids, return_dict=True, **options)
        embeds = self.text_projection(out.pooler_output)                      # [B, E]
        out = CLIPTextModelOutput(embeds, out.last_hidden_state, out.hidden_states, out.attentions)
        return out if choose(return_dict, self.config.return_dict) else out.to_tuple()


class _VisionModel(CLIPPreTrainedModel):
    """The part common to CLIPVisionModel and CLIPVisionModelWithProjection."""

    config_class = CLIPVisionConfig
    model_type = "clip_vision_model"
    main_input_name = "pixel_values"
    left_out = {"resize_token_embeddings": "pictures have no tokens"}

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = CLIPVisionTransformer(config)

    def get_input_embeddings(self) -> nn.Conv2d:
        """The convolution that turns patches into vectors."""
        return self.vision_model.embeddings.patch_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Puts another layer in its place."""
        self.vision_model.embeddings.patch_embedding = value


class CLIPVisionModel(_VisionModel):
    """The vision tower alone. `model(pixel_values)`."""

    def forward(self, pixel_values: Tensor | None = None, interpolate_pos_encoding: bool = False,
                **options: bool | None) -> BaseModelOutputWithPooling | tuple:
        """pixel_values [B, C, H, W] -> last_hidden_state [B, T, D], pooler_output [B, D];
        see CLIPVisionTransformer."""
        return self.vision_model(pixel_values, interpolate_pos_encoding, **options)


class CLIPVisionModelWithProjection(_VisionModel):
    """The vision tower and its projection."""

    own_heads = ("visual_projection.",)
    base_model_prefix = "vision_model"

    def __init__(self, config: CLIPVisionConfig):
        super().__init__(config)
        self.visual_projection = projection(config.hidden_size, config.projection_dim)
        deviation = config.hidden_size**-0.5 * config.initializer_factor
        draw(self, {self.visual_projection.weight: deviation})

    def forward(self, pixel_values: Tensor | None = None, interpolate_pos_encoding: bool = False, *,
                return_dict: bool | None = None, **options: bool | None) -> CLIPVisionModelOutput | tuple:
        """As CLIPVisionTransformer.forward, but image_embeds [B, E] comes first, and no pooler_output."""
        out = self.vision_model(pixel_values, interpolate_pos_encoding, return_dict=True, **options)
        embeds = self.visual_projection(out.pooler_output)                    # [B, E]
        out = CLIPVisionModelOutput(embeds, out.last_hidden_state, out.hidden_states, out.attentions)
        return out if choose(return_dict, self.config.return_dict) else out.to_tuple()


def normalize(x: Tensor) -> Tensor:
    """Scales the last axis to length 1. A zero vector stays zero (upstream: NaN);
    16 bits are summed in 32."""
    y = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    length = y.pow(2).sum(dim=-1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny).pow(0.5)
    return (y / length).to(x.dtype)


def clip_loss(similarity: Tensor) -> Tensor:
    """Radford 2021, figure 3: the mean of two cross-entropies, each text finding its picture and the reverse.

    similarity: [B, B] logits whose diagonal holds the pairs. Captions that occur twice in a batch need
    `loss.contrastive_loss`. Raises ValueError if the batch has not as many texts as pictures.
    """
    if similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"the loss needs pairs, but the batch has logits of shape {list(similarity.shape)}")
    pairs = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, pairs) + F.cross_entropy(similarity.T, pairs)) / 2


class CLIPModel(CLIPPreTrainedModel):
    """Both towers. `CLIPModel(CLIPConfig())` has random weights;
    `CLIPModel.from_pretrained(folder)` reads them."""

    config_class = CLIPConfig
    left_out = PAIR_LEFT_OUT
    text_tower = CLIPTextTransformer
    vision_tower = CLIPVisionTransformer

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        text, vision, factor = config.text_config, config.vision_config, config.initializer_factor
        self.text_model = self.text_tower(text)
        self.vision_model = self.vision_tower(vision)
        self.visual_projection = projection(vision.hidden_size, config.projection_dim)
        self.text_projection = projection(text.hidden_size, config.projection_dim)
        draw(self, {self.text_projection.weight: text.hidden_size**-0.5 * factor,
                    self.visual_projection.weight: vision.hidden_size**-0.5 * factor})
        # ln of 1/temperature
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        if getattr(config, "gradient_checkpointing", False):
            self.gradient_checkpointing_enable()

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                          position_ids: Tensor | None = None, *, return_dict: bool | None = None,
                          **options: Any) -> Features | tuple:
        """input_ids [B, S] -> projected text vectors [B, E], not normalised; as CLIPTextTransformer.forward.

        Serves transformers 4's idiom (the result is a tensor) and 5's (`.pooler_output`); see Features.
        """
        out = self.text_model(input_ids, attention_mask, position_ids, return_dict=True, **options)
        return features_of(self.text_projection(out.pooler_output), out,
                           choose(return_dict, self.config.return_dict))

    def get_image_features(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, *,
                           return_dict: bool | None = None, **options: bool | None) -> Features | tuple:
        """pixel_values [B, C, H, W] -> projected picture vectors [B, E], not normalised.

        Serves transformers 4's idiom (the result is a tensor) and 5's (`.pooler_output`); see Features.
        """
        out = self.vision_model(pixel_values, interpolate_pos_encoding, return_dict=True, **options)
        return features_of(self.visual_projection(out.pooler_output), out,
                           choose(return_dict, self.config.return_dict))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CLIPOutput | tuple:
        """input_ids [Bt, S], pixel_values [Bi, C, H, W] -> CLIPOutput; with return_loss Bt must equal Bi.

        output_attentions, output_hidden_states: None leaves them to the towers' configs.
        """
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        text = self.text_model(input_ids, attention_mask, position_ids, return_dict=True, **asked)
        vision = self.vision_model(pixel_values, interpolate_pos_encoding, return_dict=True, **asked)
        # [Bt, E]; stored projected, as in
        text.pooler_output = self.text_projection(text.pooler_output)
        vision.pooler_output = self.visual_projection(vision.pooler_output)   # [Bi, E]; transformers 5, not 4
        text_embeds, image_embeds = normalize(text.pooler_output), normalize(vision.pooler_output)
        logits_per_text = text_embeds @ image_embeds.T * self.logit_scale.exp()  # [Bt, Bi]
        loss = clip_loss(logits_per_text) if return_loss else None
        out = CLIPOutput(loss, logits_per_text.T, logits_per_text, text_embeds, image_embeds, text, vision)
        return out if choose(return_dict, self.config.return_dict) else out.to_tuple()
