"""Configs: frozen dataclasses whose field names are the JSON names of upstream's config files.

Read after files.py; then model.py. `Config` is the ground that minidiff's configs stand on as well.
A field's type says what its numbers may be (`hidden_size: Width`): what real models need, times a margin, so
that no config, whoever wrote it, asks for more time or memory than a model is worth.
Paper: Radford et al. 2021 (CLIP), tables 19 and 20 list the sizes of the published models.
Mirrors: transformers' CLIPTextConfig, CLIPVisionConfig, CLIPConfig; diffusers' ConfigMixin.
Shapes: none here.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

from miniclip.files import shown
from miniclip.habits import ConfigHabits, lenient


class ConfigError(ValueError):
    """A config that cannot be honoured; the one-line message names the source, the field and the value."""


class Range(typing.NamedTuple):
    """From the least to the most, both allowed: a number's value or a tuple's length. NaN never fits."""

    least: float
    most: float


T = TypeVar("T")
Count = Annotated[int, Range(1, 4096)]  # channels of pictures, heads, groups
Width = Annotated[int, Range(1, 65_536)]  # channels inside; 8,192 in the largest models there are
Layers = Annotated[int, Range(1, 256)]  # 48 in ViT-bigG
Pixels = Annotated[int, Range(1, 65_536)]  # a side of a picture, or of its patches
Tokens = Annotated[int, Range(1, 1_000_000)]  # of a text
Vocabulary = Annotated[int, Range(1, 2_000_000)]
TokenId = Annotated[int, Range(-1, 2_000_000)]
Fraction = Annotated[float, Range(0, 1)]  # dropout, betas
Epsilon = Annotated[float, Range(1e-30, 1)]
Real = Annotated[float, Range(-1e6, 1e6)]
Positive = Annotated[float, Range(1e-30, 1e6)]
Levels = Annotated[tuple[T, ...], Range(1, 16)]  # an entry for each level of a U; 4 in Stable Diffusion
Stages = Annotated[tuple[Annotated[int, Range(1, 64)], ...], Range(4, 4)]  # blocks of a ResNet; 36 in RN50x64


class FrozenDict(dict):
    """A dict that is complete once it is made."""

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} cannot be changed; dataclasses.replace makes a changed copy")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse


@dataclass(frozen=True, eq=False, repr=False)
class Config(FrozenDict):
    """Base of all configs. Reads like upstream's: `config.name`, `config["name"]`, `dict(config)`; diffusers'
    `from_config` takes it.

    `inert` lists upstream's fields that we leave out, each with the values under which it does nothing;
    any other value raises. That table is the documentation of what is missing. `metadata` lists upstream's
    fields that change no number whatever they hold.

    Equality, hash and repr are those of a dataclass, written once: to have them made for each of twenty
    classes was a quarter of the time of an import.
    """

    inert: ClassVar[dict[str, tuple]] = {}
    metadata: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name, hint in hints_of(type(self)).items():
            if hasattr(self, name) and (wrong := _outside(getattr(self, name), hint)):
                raise ConfigError(f"{name} = {shown(getattr(self, name))}{wrong}")
        self.check()
        dict.update(self, self._fields())

    def check(self) -> None:
        """Hook: raises ConfigError for values that do not fit together."""

    def _fields(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if type(self) is type(other) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other            # dict's own would compare entries

    def __hash__(self) -> int:
        return hash(tuple(self._fields().values()))

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{k}={v!r}' for k, v in self._fields().items())})"

    def changed(self, **entries: Any) -> Config:
        """A copy with other values; entries that are no fields are kept in the dict, unread."""
        own = [f.name for f in dataclasses.fields(self)]
        copy = dataclasses.replace(self, **{k: v for k, v in entries.items() if k in own})
        dict.update(copy, {k: v for k, v in {**self, **entries}.items() if k not in own})
        return copy

    def __reduce__(self) -> tuple:              # for copies and pickles, which fill a dict by its keys
        return _restored, (type(self), vars(self).copy(), dict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> Config:
        """Strict reading of a JSON object. Keys that start with "_" are metadata; lists become tuples.

        Raises ConfigError for an unknown field, a value of the wrong type, or a left-out feature in use.
        """
        chosen, aside = cls.sort_fields(values, source)
        try:
            config = cls(**chosen)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        config.keep_aside(aside)
        return config

    @classmethod
    def sort_fields(cls, values: dict[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Checks a JSON object as from_dict does; returns its fields, lists as tuples, and its metadata."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        hints = hints_of(cls)
        chosen, aside = {}, {}
        for name, value in values.items():
            if name in known:
                value = known[name].default if value is None and hints[name] is bool else _tuples(value)
                if not _fits(value, hints[name]):
                    raise ConfigError(f"{source}: {name} = {shown(value)} is not of type "
                                      f"{_name(hints[name])}")
                chosen[name] = value
            elif name in cls.inert:
                if not any(value is v or (value == v and type(value) is type(v)) for v in cls.inert[name]):
                    raise ConfigError(f"{source}: {name} = {shown(value)} is not supported, only "
                                      f"{cls.inert[name]}")
            elif name.startswith("_") or name in cls.metadata:
                aside[name] = value
            else:
                raise ConfigError(f"{source}: unknown field {shown(name)}; {cls.__name__} knows "
                                  f"{', '.join(known)}")
        return chosen, aside

    def keep_aside(self, aside: dict[str, Any]) -> None:
        """Hook: the metadata that came with a config; here it is dropped."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict of all fields, tuples as lists, nested configs as dicts."""
        return {f.name: _lists(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _restored(kind: type[Config], attributes: dict[str, Any], entries: dict[str, Any]) -> Config:
    config = kind.__new__(kind)
    vars(config).update(attributes)
    dict.update(config, entries)
    return config


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _lists(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    return [_lists(v) for v in value] if isinstance(value, tuple) else value


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass, its range included."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's declared type; an int passes for a float, a bool for neither."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        return _fits(value, args[0])
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        element = args[0]
        return isinstance(value, tuple) and all(_fits(v, element) for v in value)
    if origin is typing.Literal:
        return value in args
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _outside(value: Any, hint: Any) -> str:
    """What is wrong with a number, or with a tuple's length or entries, by the ranges of its type; "" if
    nothing is, and for values of other types."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return next((_outside(value, arg) for arg in args if _fits(value, arg)), "")
    if origin is tuple and isinstance(value, tuple):
        return next((wrong for entry in value if (wrong := _outside(entry, args[0]))), "")
    if origin is not Annotated or not _fits(value, args[0]):
        return ""
    (least, most), a_tuple = args[1], isinstance(value, tuple)
    if not least <= (len(value) if a_tuple else value) <= most:
        return f" must {'have' if a_tuple else 'lie in'} {least:g} .. {most:.10g}{' entries' * a_tuple}"
    return _outside(value, args[0])


def _name(hint: Any) -> str:
    """A type as Python writes it, without its ranges."""
    if typing.get_origin(hint) is Annotated:
        return _name(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_name(arg) for arg in typing.get_args(hint)).replace("NoneType", "None")
    if typing.get_origin(hint) is tuple:
        return f"tuple[{_name(typing.get_args(hint)[0])}, ...]"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


# Fields that transformers 4 wrote into every config.json: settings of text generation, of training and of
# labels. No forward pass of CLIP reads them; dropout is a field of 2021 that no released code applied.
GENERIC_METADATA = frozenset(
    """
    architectures attn_implementation bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    decoder_start_token_id
    diversity_penalty do_sample dropout dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label label2id length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_labels num_return_sequences output_scores prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    use_bfloat16 use_cache
    """.split()
)
GENERIC_INERT = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False,),
    "is_encoder_decoder": (False,),
    "output_attentions": (False,),  # CLIP's own configs have these two; elsewhere ask in the forward call
    "output_hidden_states": (False,),
    "pruned_heads": ({}, None),
}
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True, eq=False, repr=False)
class ModelConfig(ConfigHabits, Config):
    """What the configs of CLIP share: what a forward call returns unless it says itself what it wants."""

    output_attentions: bool = field(default=False, kw_only=True, hash=False)
    output_hidden_states: bool = field(default=False, kw_only=True, hash=False)
    return_dict: bool = field(default=True, kw_only=True, hash=False)     # False: a tuple


@lenient
@dataclass(frozen=True, eq=False, repr=False)
class CLIPTextConfig(ModelConfig):
    """The text tower. Defaults: OpenAI's ViT-B/32. `from_dict` also takes the config of a whole CLIP
    model."""

    vocab_size: Vocabulary = 49408
    hidden_size: Width = 512  # D, width of the residual stream
    intermediate_size: Width = 2048  # width inside the MLP, 4 D in every released model
    projection_dim: Width | None = 512  # E, width of the space shared with pictures
    num_hidden_layers: Layers = 12
    num_attention_heads: Count = 8
    max_position_embeddings: Tokens = 77  # most tokens of a text
    hidden_act: str = "quick_gelu"  # "gelu" in OpenCLIP's own models; a wrong one fails silently
    layer_norm_eps: Epsilon = 1e-5
    attention_dropout: Fraction = 0.0  # in training only
    initializer_range: Real = 0.02
    initializer_factor: Real = 1.0
    # upstream's default, not the tokenizer's pad (49407); the tower never reads it
    pad_token_id: TokenId | None = 1
    bos_token_id: TokenId | None = 49406
    eos_token_id: TokenId | None = 49407  # 2 selects the old pooling rule: position of the largest id

    model_type: ClassVar[str] = "clip_text_model"
    inert: ClassVar[dict[str, tuple]] = {**GENERIC_INERT, "model_type": ("clip_text_model", "clip")}
    metadata: ClassVar[frozenset[str]] = GENERIC_METADATA

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> CLIPTextConfig:
        """Reads a text tower's config, or the text half of a whole CLIP's."""
        if "text_config" in values or "text_config_dict" in values:
            return CLIPConfig.from_dict(values, source).text_config
        return super().from_dict(values, source)

    @classmethod
    def for_tokenizer(cls, tokenizer: Any, **sizes: Any) -> CLIPTextConfig:
        """A config that fits a tokenizer: its vocabulary, its special ids, its greatest length;
        the rest from `sizes`.

        The end token's id decides where a text is read out,
        so a tokenizer of your own needs a config of its own.
        """
        given = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return cls(**{**given, **ids, **sizes})

    def check(self) -> None:
        """Heads divide the width; the activation is known."""
        _check_tower(self)


@lenient
@dataclass(frozen=True, eq=False, repr=False)
class CLIPVisionConfig(ModelConfig):
    """The picture tower, a ViT. Defaults: ViT-B/32. `from_dict` also takes the config of a whole CLIP
    model."""

    hidden_size: Width = 768  # D
    intermediate_size: Width = 3072
    projection_dim: Width | None = 512  # E
    num_hidden_layers: Layers = 12
    num_attention_heads: Count = 12
    num_channels: Count = 3
    image_size: Pixels = 224  # height and width in pixels
    patch_size: Pixels = 32  # pixels
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5
    attention_dropout: Fraction = 0.0
    initializer_range: Real = 0.02
    initializer_factor: Real = 1.0

    model_type: ClassVar[str] = "clip_vision_model"
    inert: ClassVar[dict[str, tuple]] = {**GENERIC_INERT, "model_type": ("clip_vision_model", "clip")}
    metadata: ClassVar[frozenset[str]] = GENERIC_METADATA | {"bos_token_id", "eos_token_id", "pad_token_id"}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> CLIPVisionConfig:
        """Reads a vision tower's config, or the vision half of a whole CLIP's."""
        if "vision_config" in values or "vision_config_dict" in values:
            return CLIPConfig.from_dict(values, source).vision_config
        return super().from_dict(values, source)

    def check(self) -> None:
        """Heads divide the width; the activation is known."""
        _check_tower(self)
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size = {self.patch_size} does not fit into image_size = "
                              f"{self.image_size}")


@lenient
@dataclass(frozen=True, eq=False, repr=False)
class CLIPConfig(ModelConfig):
    """Both towers. `CLIPConfig(text_config={...}, vision_config={...})`; each may be a dict or a config."""

    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision_config: CLIPVisionConfig = field(default_factory=CLIPVisionConfig)
    projection_dim: Width = 512  # E; this one counts, not the towers' own
    logit_scale_init_value: Real = 2.6592  # log of the inverse temperature; ln(1 / 0.07) rounded by upstream
    initializer_factor: Real = 1.0

    model_type: ClassVar[str] = "clip"
    inert: ClassVar[dict[str, tuple]] = {**GENERIC_INERT, "model_type": ("clip",)}
    metadata: ClassVar[frozenset[str]] = GENERIC_METADATA | {"bos_token_id", "eos_token_id", "pad_token_id"}
    sub_configs: ClassVar[dict[str, type]] = {"text_config": CLIPTextConfig,
                                              "vision_config": CLIPVisionConfig}

    def check(self) -> None:
        """Both towers are configs."""
        for name, kind in self.sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                object.__setattr__(self, name, kind.from_dict(value or {}, source=name))

    @classmethod
    def sort_fields(cls, values: dict[str, Any], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads both towers; where the legacy text_config_dict or vision_config_dict is there, it wins."""
        values = dict(values)
        for name, kind in cls.sub_configs.items():
            values[name] = read_tower(kind, values.get(name), values.pop(f"{name}_dict", None),
                                      f"{source}: {name}")
        return super().sort_fields(values, source)

    @classmethod
    def from_text_vision_configs(cls, text_config: Config, vision_config: Config,
                                 **fields: Any) -> CLIPConfig:
        """A CLIP out of the configs of its towers."""
        return cls(text_config=text_config, vision_config=vision_config, **fields)

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Config:
        """The text tower's; upstream's two options choose among decoders, of which there are none."""
        return self.text_config


def read_tower(kind: type, values: Any, legacy: Any, source: str) -> Config:
    """One tower of a CLIP config. The legacy `*_config_dict` wins, its defaults included,
    as upstream has it."""
    for given in (values, legacy):
        if not isinstance(given, (dict, kind, type(None))):
            raise ConfigError(f"{source} = {shown(given)} is not an object")
    if isinstance(values, kind) and legacy is None:
        return values
    read = dict(values or {})
    if legacy is not None:
        read = {**read, **kind.from_dict(legacy, f"{source}_dict").to_dict()}
    return kind.from_dict(read, source)


def _check_tower(config: Config) -> None:
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise ConfigError(f"hidden_size = {width} is not a multiple of num_attention_heads = {heads}")
    if config.hidden_act not in ACTIVATIONS:
        raise ConfigError(f"hidden_act = {shown(config.hidden_act)} is not one of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True, eq=False, repr=False)
class CLIPResNetConfig(Config):
    """OpenAI's CLIP with a ResNet for pictures. Defaults: RN50. No field of it has an upstream JSON name."""

    text_config: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vision_layers: Stages = (3, 4, 6, 3)  # blocks in each of the four stages
    vision_width: Width = 64  # channels after the stem; the last stage has 32 times as many
    image_size: Pixels = 224
    projection_dim: Width = 1024  # E
    logit_scale_init_value: Real = 2.6592

    inert: ClassVar[dict[str, tuple]] = {"model_type": ("clip_resnet",)}
    metadata: ClassVar[frozenset[str]] = GENERIC_METADATA

    def check(self) -> None:
        """The text tower is a config; the side is one that the ResNet can halve five times."""
        if not isinstance(self.text_config, CLIPTextConfig):
            object.__setattr__(self, "text_config",
                               CLIPTextConfig.from_dict(self.text_config or {}, "text_config"))
        if self.image_size % 32:
            raise ConfigError(f"image_size = {self.image_size} is not a multiple of 32, by which this ResNet "
                              "shrinks")

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> CLIPResNetConfig:
        """Config.from_dict, with text_config an object, a CLIPTextConfig, or absent."""
        text = read_tower(CLIPTextConfig, values.get("text_config"), None, f"{source}: text_config")
        return super().from_dict({**values, "text_config": text}, source)
