"""PretrainedModel: what transformers' models can do besides computing, for CLIP's.

Not needed to understand a model: nothing here computes. Read when you meet a method of it.
Mirrors: transformers' PreTrainedModel and its mixins; what is left out of them, and why, is in habits.py.
Shapes: V tokens of the vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.config import Config
from miniclip.files import WeightsError, read_json, shown
from miniclip.habits import (
    BOTH_TOWERS,
    CHECKPOINTING_IDLE,
    CHECKPOINTING_REFUSED,
    LOADING_IDLE,
    LOADING_REFUSED,
    MODEL_LEFT_OUT,
    settle,
    with_changes,
)
from miniclip.weights import ModelFolder, load_folder, load_strict, skip_init


class PretrainedModel(ModelFolder, nn.Module):
    """A model in a folder, with transformers' services around it."""

    left_out = MODEL_LEFT_OUT
    weights_stem = "model"
    main_input_name = "input_ids"
    base_model_prefix = "clip"                  # the attribute that holds the model under a projection
    supports_gradient_checkpointing = True

    # ------------------------------------------------------------------------------------------------ folders

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        subfolder: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        *,
        config: Config | str | os.PathLike | None = None,
        state_dict: dict[str, Tensor] | None = None,
        output_loading_info: bool = False,
        **options: Any,
    ):
        """Reads a model from a local folder; returns it in eval mode, on the CPU.

        dtype: float32 if None; "auto" is what the folder's config.json names; torch_dtype is its older name.
        config: in place of the folder's config.json. state_dict: in place of its weights; they are copied.
        output_loading_info: returns (model, info), whose sets are empty: loading is strict.
        options: fields of the config to change, e.g. output_attentions=True; and upstream's other options,
        which do nothing here or raise, see habits.py.
        Raises WeightsError for a file, ConfigError for a field.
        """
        where, dtype = pretrained_model_name_or_path, torch_dtype if dtype is None else dtype
        folder = os.path.join(where or "", subfolder or "")
        if str(dtype) == "auto":
            dtype = stated_dtype(folder) if folder else None
        changes = {f.name: options.pop(f.name) for f in dataclasses.fields(cls.config_class)
                   if f.name in options}
        if config is None and not changes and state_dict is None:
            model = super().from_pretrained(where, subfolder, variant, dtype=dtype, **options)
        else:
            settle(f"{cls.__name__}.from_pretrained", options, LOADING_IDLE, LOADING_REFUSED)
            if not isinstance(config, Config):
                config = cls.read_config(folder if config is None else config)
            model = cls.filled(with_changes(config, changes), state_dict, folder, variant, dtype)
        info = {kind: set() for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
        return (model, info) if output_loading_info else model

    @classmethod
    def read_config(cls, folder: str | os.PathLike) -> Config:
        """The config of a folder, as this class reads it."""
        source = os.path.join(folder, "config.json")
        return cls.config_from_folder(read_json(source), source)

    @classmethod
    def filled(cls, config: Config, state_dict: dict[str, Tensor] | None, folder: str, variant: str | None,
               dtype: torch.dtype | str | None):
        """A model of a config, with copies of given tensors, or else with the weights of a folder."""
        chosen, dtype = dtype, getattr(torch, str(dtype or "float32").removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise WeightsError(f"dtype = {shown(chosen)} is not a floating-point dtype such as torch.float16")
        with skip_init():
            model = cls(config).to(dtype)
        if state_dict is None:
            tensors = load_folder(folder, cls.weights_stem, variant, dtype, model.num_parameters())
        else:
            tensors = {name: tensor.detach().clone() for name, tensor in state_dict.items()}
        load_strict(model, model.convert_keys(tensors), folder or "state_dict", cls.ignored_keys)
        return model.eval()

    def init_weights(self) -> None:
        """Draws all weights anew, as the constructor does."""
        self.load_state_dict(type(self)(self.config).state_dict())

    # -------------------------------------------------------------------------------------------------- parts

    @property
    def base_model(self) -> nn.Module:
        """The tower under a projection; else the model itself."""
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> nn.Module:
        """What turns the input into vectors, where a model has one input. Raises NotImplementedError."""
        raise NotImplementedError(f"{type(self).__name__}.get_input_embeddings: {BOTH_TOWERS}")

    def get_output_embeddings(self) -> None:
        """None: CLIP predicts no tokens."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: no two weights of CLIP are one."""

    @classmethod
    def can_generate(cls) -> bool:
        """False: CLIP writes no text."""
        return False

    def set_attn_implementation(self, attn_implementation: str | dict,
                                allow_all_kernels: bool = False) -> None:
        """Does nothing: attention is torch's fused kernel, and output_attentions=True writes it out."""

    # -------------------------------------------------------------------------------- recomputing, gradients

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None,
                                      **options: Any) -> None:
        """Trades time for memory in training: blocks are recomputed in the backward pass; same gradients.

        use_reentrant, among the kwargs, does nothing: either way gives these gradients.
        """
        settle("gradient_checkpointing_enable", {**(gradient_checkpointing_kwargs or {}), **options},
               CHECKPOINTING_IDLE, CHECKPOINTING_REFUSED)
        self._recompute(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps all activations again."""
        self._recompute(False)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None,
                                        **options: Any) -> None:
        """gradient_checkpointing_enable under its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        """gradient_checkpointing_disable under its newer name."""
        self.gradient_checkpointing_disable()

    def _recompute(self, on: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = on

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are recomputed."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    is_activation_checkpointing = is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Gradients reach what comes out of the embeddings, even where those are frozen."""
        self.disable_input_require_grads()
        embeddings = [tower.embeddings for tower in self.children() if hasattr(tower, "embeddings")]
        self._input_hooks = [module.register_forward_hook(lambda module, given, out: out.requires_grad_())
                             for module in embeddings]

    def disable_input_require_grads(self) -> None:
        """Takes enable_input_require_grads back."""
        for hook in vars(self).pop("_input_hooks", ()):
            hook.remove()


class TokenTable:
    """Mixin of a text model: its token table, read, replaced, and resized."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The token table [V, D]."""
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Puts another table in its place; config.vocab_size stays."""
        self.text_model.embeddings.token_embedding = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None,
                                pad_to_multiple_of: int | None = None,
                                mean_resizing: bool = True) -> nn.Embedding:
        """Appends rows to the token table, or cuts rows off; config.vocab_size follows. Returns the table.

        new_num_tokens: None keeps their number. pad_to_multiple_of: rounds the number of rows up to it.
        mean_resizing: new rows lie at the mean of the old ones; otherwise they are drawn with
        initializer_range. Raises ValueError if pad_to_multiple_of is no integer.
        """
        old = self.get_input_embeddings()
        if pad_to_multiple_of is not None and not isinstance(pad_to_multiple_of, int):
            raise ValueError(f"pad_to_multiple_of = {pad_to_multiple_of!r} is no integer")
        rows, unit = new_num_tokens or old.num_embeddings, pad_to_multiple_of or 1
        rows = -(-rows // unit) * unit
        if rows != old.num_embeddings:
            deviation = None if mean_resizing else self.config.initializer_range
            self.set_input_embeddings(resized(old, rows, deviation))
            self.config = self.text_model.config = dataclasses.replace(self.config, vocab_size=rows)
        return self.get_input_embeddings()


def resized(old: nn.Embedding, rows: int, deviation: float | None) -> nn.Embedding:
    """A table of so many rows, the first ones those of `old`; new ones lie around the old ones' mean, or,
    with a deviation, around 0. The random numbers are drawn in upstream's order."""
    new = nn.Embedding(rows, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
    new.requires_grad_(old.weight.requires_grad)
    kept = min(rows, old.num_embeddings)
    with torch.no_grad():
        if deviation is not None:
            nn.init.normal_(new.weight, std=deviation)
        elif rows > kept:
            new.weight[kept:] = around_mean(old.weight, rows - kept)
        new.weight[:kept] = old.weight[:kept]
    return new


def around_mean(table: Tensor, count: int) -> Tensor:
    """[V, D] -> [count, D], drawn with the rows' mean and 1e-9 of their covariance; the mean itself where
    that matrix is not positive definite, as with fewer rows than columns."""
    table = table.float()
    mean = table.mean(0)
    covariance = 1e-9 * ((table - mean).T @ (table - mean) / len(table))
    if not torch.distributions.constraints.positive_definite.check(covariance):
        return mean.expand(count, -1)
    return torch.distributions.MultivariateNormal(mean, covariance).sample((count,))


def stated_dtype(folder: str) -> str | None:
    """What config.json in a folder says the dtype of the weights is; None if it does not."""
    values = read_json(os.path.join(folder, "config.json"))
    return values.get("dtype") or values.get("torch_dtype")
