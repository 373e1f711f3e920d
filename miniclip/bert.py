"""BERT and DistilBERT as text towers, and Chinese-CLIP, which pairs a BERT with CLIP's picture tower.

Read after model.py; wordpiece.py has their tokenizer.
Papers: Devlin et al. 2019 (BERT); Sanh et al. 2019 (DistilBERT); Yang et al. 2022 (Chinese CLIP).
Mirrors: transformers' modeling_chinese_clip.py and modeling_distilbert.py, with their checkpoint keys.
Shapes: B batch, S tokens, D width, nh heads, hd = D / nh.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from miniclip.config import (
    ACTIVATIONS,
    GENERIC_INERT,
    GENERIC_METADATA,
    CLIPConfig,
    CLIPVisionConfig,
    Config,
    ConfigError,
    Count,
    Epsilon,
    Fraction,
    Layers,
    Real,
    TokenId,
    Tokens,
    Vocabulary,
    Width,
)
from miniclip.files import shown
from miniclip.habits import lenient
from miniclip.model import (
    BaseModelOutputWithPooling,
    CLIPModel,
    activation,
    attention_fused,
    attention_written_out,
)

# ---------------------------------------------------------------------------------------------------- configs


@dataclass(frozen=True, eq=False, repr=False)
class BertConfig(Config):
    """A BERT text tower. Defaults: transformers' ChineseCLIPTextConfig, which is BERT-base."""

    vocab_size: Vocabulary = 30522
    hidden_size: Width = 768  # D
    num_hidden_layers: Layers = 12
    num_attention_heads: Count = 12
    intermediate_size: Width = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: Fraction = 0.1  # in training only
    attention_probs_dropout_prob: Fraction = 0.1
    max_position_embeddings: Tokens = 512
    type_vocab_size: Count = 2
    initializer_range: Real = 0.02
    initializer_factor: Real = 1.0
    layer_norm_eps: Epsilon = 1e-12
    pad_token_id: TokenId | None = 0

    inert: ClassVar[dict[str, tuple]] = {
        **GENERIC_INERT,
        "position_embedding_type": ("absolute",),
        "model_type": ("chinese_clip_text_model", "chinese_clip", "bert"),
    }
    metadata: ClassVar[frozenset[str]] = GENERIC_METADATA | frozenset(
        "bos_token_id eos_token_id directionality pooler_fc_size pooler_num_attention_heads "
        "pooler_num_fc_layers pooler_size_per_head pooler_type classifier_dropout projection_dim".split()
    )

    def check(self) -> None:
        """Heads divide the width; the activation is known."""
        _check(self, self.hidden_size, self.num_attention_heads, self.hidden_act)


@dataclass(frozen=True, eq=False, repr=False)
class DistilBertConfig(Config):
    """A DistilBERT text tower; its JSON names differ from BERT's."""

    vocab_size: Vocabulary = 30522
    max_position_embeddings: Tokens = 512
    n_layers: Layers = 6
    n_heads: Count = 12
    dim: Width = 768  # D
    hidden_dim: Width = 3072
    dropout: Fraction = 0.1  # in training only
    attention_dropout: Fraction = 0.1
    activation: str = "gelu"
    initializer_range: Real = 0.02
    pad_token_id: TokenId | None = 0

    inert: ClassVar[dict[str, tuple]] = {
        **GENERIC_INERT,
        "sinusoidal_pos_embds": (False,),  # only says how the position table was once filled
        "model_type": ("distilbert",),
    }
    metadata: ClassVar[frozenset[str]] = GENERIC_METADATA | frozenset(
        "bos_token_id eos_token_id qa_dropout seq_classif_dropout tie_weights_".split()
    )

    def check(self) -> None:
        """Heads divide the width; the activation is known."""
        _check(self, self.dim, self.n_heads, self.activation)

    @property
    def hidden_size(self) -> int:
        """`dim`, under the name that BERT and CLIP give it."""
        return self.dim


def _check(config: BertConfig | DistilBertConfig, width: int, heads: int, act: str) -> None:
    if (config.pad_token_id or 0) >= config.vocab_size:
        raise ConfigError(f"pad_token_id = {config.pad_token_id} is not below vocab_size = "
                          f"{config.vocab_size}")
    if width % heads:
        raise ConfigError(f"width {width} is not a multiple of the number of heads {heads}")
    if act not in ACTIVATIONS:
        raise ConfigError(f"activation {shown(act)} is not one of {', '.join(ACTIVATIONS)}")


@lenient
@dataclass(frozen=True, eq=False, repr=False)
class ChineseCLIPConfig(CLIPConfig):
    """Chinese-CLIP: text_config is a BertConfig, the rest as CLIPConfig."""

    text_config: BertConfig = field(default_factory=BertConfig)

    model_type: ClassVar[str] = "chinese_clip"
    inert: ClassVar[dict[str, tuple]] = {**GENERIC_INERT, "model_type": ("chinese_clip",)}
    metadata: ClassVar[frozenset[str]] = CLIPConfig.metadata | {"initializer_range"}
    sub_configs: ClassVar[dict[str, type]] = {"text_config": BertConfig, "vision_config": CLIPVisionConfig}

    def check(self) -> None:
        """Both towers are configs."""
        for name, kind in self.sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                object.__setattr__(self, name, kind.from_dict(_without_type(value), source=name))

    @classmethod
    def sort_fields(cls, values: dict[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """CLIPConfig's, with a BertConfig for the text and the towers' own model_type ignored."""
        values = {name: _without_type(v) if name in cls.sub_configs else v for name, v in values.items()}
        return super().sort_fields(values, source)


def _without_type(values: Any) -> Any:
    """The towers' model_type says Chinese-CLIP, whose picture tower is CLIP's to the last key."""
    return {k: v for k, v in values.items() if k != "model_type"} if isinstance(values, dict) else values


# -------------------------------------------------------------------------------------- shared by both towers


def padding_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, S], nonzero = a real token -> what is added to the scores, [B, 1, 1, S]; None stays None."""
    if mask is None:
        return None
    hidden = ~mask.bool()[:, None, None, :]
    lowest = torch.finfo(dtype).min
    return torch.zeros(hidden.shape, dtype=dtype, device=mask.device).masked_fill(hidden, lowest)


def attend(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, bias: Tensor | None, dropout: float, want: bool
) -> tuple[Tensor, Tensor | None]:
    """q, k, v: [B, S, D] -> [B, S, D], and the weights [B, nh, S, S] if wanted."""
    q, k, v = (y.unflatten(-1, (num_heads, -1)).transpose(1, 2) for y in (q, k, v))   # [B, nh, S, hd]
    if want:
        y, weights = attention_written_out(q, k, v, bias, False, dropout)
    else:
        y, weights = attention_fused(q, k, v, bias, False, dropout), None
    return y.transpose(1, 2).flatten(2), weights


def init_bert(tower: nn.Module, deviation: float) -> None:
    """Normal weights, zero biases, and the padding token's vector 0."""
    for module in tower.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=deviation)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()


class Embeddings(nn.Module):
    """Word + position (+ segment) vectors, normed: [B, S] -> [B, S, D]."""

    def __init__(self, vocab: int, positions: int, types: int, D: int, pad: int | None, eps: float,
                 dropout: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, D, padding_idx=pad)
        self.position_embeddings = nn.Embedding(positions, D)
        if types:                                                             # DistilBERT has none
            self.token_type_embeddings = nn.Embedding(types, D)
        self.LayerNorm = nn.LayerNorm(D, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None,
                token_type_ids: Tensor | None) -> Tensor:
        """[B, S] -> [B, S, D]; positions default to 0 .. S-1, types to 0. ValueError for too large an S."""
        S, most = input_ids.shape[1], self.position_embeddings.num_embeddings
        if S > most:
            raise ValueError(f"input_ids: {S} tokens, but the model has max_position_embeddings = {most}; "
                             "truncate")
        x = self.word_embeddings(input_ids)                                   # [B, S, D]
        if hasattr(self, "token_type_embeddings"):
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embeddings(types)
        places = self.position_embeddings
        x = x + (places.weight[:S] if position_ids is None else places(position_ids))
        return self.dropout(self.LayerNorm(x))


class PostNormTower(nn.Module):
    """What BERT and DistilBERT share: embeddings, blocks with the norm after the sum,
    the first token as summary."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """input_ids [B, S] -> last_hidden_state [B, S, D] and pooler_output [B, D], its first position."""
        if input_ids is None:
            raise ValueError("input_ids is missing: the text tower reads token ids [B, S]")
        x = self.embeddings(input_ids, position_ids, token_type_ids)
        bias = padding_bias(attention_mask, x.dtype)
        states, attentions = [x], []
        for block in self.blocks():
            x, weights = block(x, bias, bool(output_attentions))
            states.append(x)
            attentions.append(weights)
        states = tuple(states) if output_hidden_states else None
        out = BaseModelOutputWithPooling(x, x[:, 0], states, tuple(attentions) if output_attentions else None)
        return out if return_dict is not False else out.to_tuple()

    def blocks(self) -> nn.ModuleList:
        """Hook: the tower's blocks, each called with (x, bias, want)."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------- BERT


class BertSelfAttention(nn.Module):
    """Attention without its output projection, which is a BertOutput: [B, S, D] -> [B, S, D]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        D = config.hidden_size
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.num_heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob

    def forward(self, x: Tensor, bias: Tensor | None, want: bool) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> the same and, if wanted, the weights [B, nh, S, S]; bias as padding_bias gives it."""
        dropout = self.dropout if self.training else 0.0
        return attend(self.query(x), self.key(x), self.value(x), self.num_heads, bias, dropout, want)


class BertOutput(nn.Module):
    """dense, dropout, then norm(y + x): the end of both halves of a block."""

    def __init__(self, in_features: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y [B, S, in_features] and the skip x [B, S, D] -> [B, S, D]."""
        return self.LayerNorm(self.dropout(self.dense(y)) + x)


class BertLayer(nn.Module):
    """Post-norm block: x = norm(x + attention(x)), then norm(x + mlp(x)).
    Nested names are checkpoint keys."""

    def __init__(self, config: BertConfig):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.attention = nn.ModuleDict({"self": BertSelfAttention(config), "output": BertOutput(D, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, inner)})
        self.output = BertOutput(inner, config)
        self.act = activation(config.hidden_act)

    def forward(self, x: Tensor, bias: Tensor | None, want: bool) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> the same and, if wanted, the weights [B, nh, S, S]."""
        y, weights = self.attention["self"](x, bias, want)
        x = self.attention["output"](y, x)
        return self.output(self.act(self.intermediate["dense"](x)), x), weights


class BertTower(PostNormTower):
    """BERT without its pooler. Keys: embeddings.*, encoder.layer.N.*."""

    def __init__(self, config: BertConfig):
        super().__init__()
        c = config
        self.embeddings = Embeddings(
            c.vocab_size, c.max_position_embeddings, c.type_vocab_size, c.hidden_size, c.pad_token_id,
            c.layer_norm_eps, c.hidden_dropout_prob,
        )  # fmt: skip
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(c)
                                                             for _ in range(c.num_hidden_layers))})
        init_bert(self, config.initializer_range)

    def blocks(self) -> nn.ModuleList:
        """encoder.layer.N."""
        return self.encoder["layer"]


# ------------------------------------------------------------------------------------------------- DistilBERT


class DistilBertAttention(nn.Module):
    """Self-attention with its output projection: [B, S, D] -> [B, S, D]."""

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        D = config.dim
        self.q_lin, self.k_lin, self.v_lin = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.out_lin = nn.Linear(D, D)
        self.num_heads, self.dropout = config.n_heads, config.attention_dropout

    def forward(self, x: Tensor, bias: Tensor | None, want: bool) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> the same and, if wanted, the weights [B, nh, S, S]; bias as padding_bias gives it."""
        dropout = self.dropout if self.training else 0.0
        y, weights = attend(self.q_lin(x), self.k_lin(x), self.v_lin(x), self.num_heads, bias, dropout, want)
        return self.out_lin(y), weights


class DistilBertBlock(nn.Module):
    """BERT's block under other names, and without dropout after attention."""

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        D, inner = config.dim, config.hidden_dim
        self.attention = DistilBertAttention(config)
        self.sa_layer_norm = nn.LayerNorm(D, eps=1e-12)
        self.ffn = nn.ModuleDict({"lin1": nn.Linear(D, inner), "lin2": nn.Linear(inner, D)})
        self.output_layer_norm = nn.LayerNorm(D, eps=1e-12)
        self.dropout, self.act = nn.Dropout(config.dropout), activation(config.activation)

    def forward(self, x: Tensor, bias: Tensor | None, want: bool) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> the same and, if wanted, the weights [B, nh, S, S]."""
        y, weights = self.attention(x, bias, want)
        x = self.sa_layer_norm(y + x)
        y = self.dropout(self.ffn["lin2"](self.act(self.ffn["lin1"](x))))
        return self.output_layer_norm(y + x), weights


class DistilBertTower(PostNormTower):
    """transformers' DistilBertModel. Keys: embeddings.*, transformer.layer.N.*."""

    def __init__(self, config: DistilBertConfig):
        super().__init__()
        c = config
        self.embeddings = Embeddings(
            c.vocab_size, c.max_position_embeddings, 0, c.dim, c.pad_token_id, 1e-12, c.dropout
        )
        self.transformer = nn.ModuleDict({"layer": nn.ModuleList(DistilBertBlock(c)
                                                                 for _ in range(c.n_layers))})
        init_bert(self, config.initializer_range)

    def blocks(self) -> nn.ModuleList:
        """transformer.layer.N."""
        return self.transformer["layer"]


# ----------------------------------------------------------------------------------------------- Chinese-CLIP


class ChineseCLIPModel(CLIPModel):
    """Chinese-CLIP: CLIPModel whose text tower is a BERT read out at its first token."""

    config_class = ChineseCLIPConfig
    model_type = "chinese_clip"
    text_tower = BertTower

    @classmethod
    def convert_keys(cls, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Old files carry a pooler that the model never used."""
        kept = super().convert_keys(state_dict)
        return {k: v for k, v in kept.items() if not k.startswith("text_model.pooler.")}

    def forward(self, *args: Any, token_type_ids: Tensor | None = None, **kwargs: Any):
        """CLIPModel.forward. token_type_ids, which BERT's tokenizer gives, are 0 for a single text."""
        if token_type_ids is not None and bool(token_type_ids.any()):
            raise ValueError("token_type_ids: only single texts, whose types are all 0, are supported here")
        return super().forward(*args, **kwargs)
