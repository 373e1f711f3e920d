"""What users of diffusers type out of habit: options that do nothing here, names that only lead to ours, and
names that are left out on purpose, each with what to do instead; for samplers, the UNet and the VAE.

Not needed to understand a sampler or a model: nothing here computes. docs/compatibility.md is made of these
tables. Mirrors: diffusers' ConfigMixin, SchedulerMixin, ModelMixin and AttentionMixin.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from miniclip.habits import (
    DOWNLOADS,
    LOADING_IDLE,
    LOADING_REFUSED,
    SAVING_IDLE,
    SAVING_REFUSED,
    LeftOut,
    Table,
    settle,
    table,
)
from miniclip.weights import read_json, write_json


class WithConfig(LeftOut):
    """Mixin of what has a `config`."""

    config: Any

    def register_to_config(self, **entries: Any) -> None:
        """Changes what the config says from now on; layers and tables that are made already stay."""
        self.config = self.config.changed(**entries)


# ----------------------------------------------------------------------------------------------- schedulers

SCHEDULER_LOADING_IDLE = LOADING_IDLE | table({
    "torch_dtype dtype variant": "a scheduler has no weights",
    "user_agent local_dir local_dir_use_symlinks": LOADING_IDLE["cache_dir"],
})
SCHEDULER_LOADING_REFUSED = LOADING_REFUSED | table({
    "return_unused_kwargs": "no argument stays unused: an unknown one is an error",
    "return_commit_hash": LOADING_IDLE["cache_dir"],
})
SCHEDULER_SAVING_REFUSED = SAVING_REFUSED | table({
    "commit_message private create_pr subfolder": SAVING_REFUSED["push_to_hub"],
})
SET_TIMESTEPS_REFUSED = {"mu": "it sets flow_shift by the picture's size: give flow_shift in the config"}

# All schedulers of diffusion models begin with the same five
BY_PLACE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")

DDPM_LEFT_OUT = {"one": "write torch.tensor(1.0)"}
PNDM_LEFT_OUT = {"pndm_order": "it is 4, the order of the rule in step_plms"}
EULER_LEFT_OUT = {"is_scale_input_called": "step does not ask; call scale_model_input before the model"}
DPM_LEFT_OUT = table({
    "dpm_solver_first_order_update": "call step, with solver_order=1 in the config",
    "multistep_dpm_solver_second_order_update": "call step, with solver_order=2 in the config",
    "multistep_dpm_solver_third_order_update": "call step, with solver_order=3 in the config",
    "lower_order_nums": "read len(scheduler.model_outputs), the number of answers so far",
})
LCM_LEFT_OUT = {"final_alpha_cumprod": "the last step goes to the prediction itself, so nothing reads it"}


def by_name(where: str, values: Sequence[Any], fields: Mapping[str, Any],
            names: Sequence[str]) -> dict[str, Any]:
    """`fields` and, with their names, the arguments given by place; None means not given.

    Raises TypeError for more arguments than names, or for one that is given twice.
    """
    if len(values) > len(names):
        raise TypeError(f"{where} takes {', '.join(names)} by place, all other fields by name")
    named = {name: value for name, value in zip(names, values) if value is not None}
    return dict(**named, **fields)


def overriding(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is a config field among the keywords of from_config and from_pretrained; settles the options."""
    known = SCHEDULER_LOADING_IDLE | SCHEDULER_LOADING_REFUSED
    options = {name: value for name, value in given.items() if name in known}
    settle(where, options, SCHEDULER_LOADING_IDLE, SCHEDULER_LOADING_REFUSED)
    return {name: value for name, value in given.items() if name not in known}


class SchedulerHabits(WithConfig):
    """The names that diffusers' schedulers inherit, but for those that schedule.py has."""

    config_name = "scheduler_config.json"
    has_compatibles = True
    by_place = BY_PLACE                         # the fields that the constructor takes by place
    left_out: ClassVar = table({
        "push_to_hub": SAVING_REFUSED["push_to_hub"],
        "register_for_auto_class": "code from a folder is never run",
        "get_config_dict": "it is called load_config",
        "extract_init_dict ignore_for_config": "config_class is the dataclass of all fields",
    })

    @property
    def compatibles(self) -> list[type]:
        """The samplers that draw with the same models: all seven of diffusion, or the one of flow."""
        from minidiff import samplers  # which import this module

        every = [getattr(samplers, name) for name in samplers.__all__ if name.endswith("Scheduler")]
        return [kind for kind in every if kind.by_place == self.by_place]

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *, subfolder: str | None = None,
                    **options: Any) -> dict[str, Any]:
        """The file as it is, `_class_name` included: what from_config takes."""
        settle(f"{cls.__name__}.load_config", options, SCHEDULER_LOADING_IDLE, SCHEDULER_LOADING_REFUSED)
        return read_json(cls.config_file(pretrained_model_name_or_path, subfolder))

    @classmethod
    def config_file(cls, folder: str | os.PathLike, subfolder: str | None = None) -> str:
        """Where a folder has its config."""
        return os.path.join(os.fspath(folder), subfolder or "", cls.config_name)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False,
                    **options: Any) -> None:
        """save_pretrained: a sampler is its config."""
        self.save_pretrained(save_directory, push_to_hub, **options)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False,
                        **options: Any) -> None:
        """Writes `scheduler_config.json`, readable by diffusers, into a folder that is made if need be."""
        settle(f"{type(self).__name__}.save_pretrained", {"push_to_hub": push_to_hub, **options},
               SAVING_IDLE, SCHEDULER_SAVING_REFUSED)
        os.makedirs(save_directory, exist_ok=True)
        self.to_json_file(self.config_file(save_directory))

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes the config to a file of any name."""
        write_json(json_file_path, self._json())

    def to_json_string(self) -> str:
        """The config as the file has it."""
        return json.dumps(self._json(), indent=2, ensure_ascii=False) + "\n"

    def _json(self) -> dict[str, Any]:
        return {"_class_name": type(self).__name__, "_diffusers_version": "0.30.0", **self.config.to_dict()}

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    @property
    def _internal_dict(self) -> Any:
        """diffusers' pipelines write here when they mend an early SD 1 config; `config` answers for it."""
        return self.config

    @_internal_dict.setter
    def _internal_dict(self, values: Mapping[str, Any]) -> None:
        changed = {name: value for name, value in values.items() if self.config.get(name) != value}
        self.config = self.config.changed(**changed)


# -------------------------------------------------------------------------------------------------- models


class ModelHabits(WithConfig):
    """Mixin of the UNet and the VAE; nothing here changes what they compute."""

    config_name = "config.json"
    _supports_gradient_checkpointing = True     # upstream's trainers ask
    arguments_left_out: ClassVar[dict[str, Table]] = {
        "from_config": {"return_unused_kwargs": "no argument stays unused: an unknown one is an error"},
        "enable_gradient_checkpointing": {"gradient_checkpointing_func": "it is torch.utils.checkpoint"},
    }

    left_out: ClassVar[Table] = table({
        "attn_processors set_attn_processor set_attention_backend reset_attention_backend":
            "attention is minidiff.attention.Attention; replace its modules",
        "add_adapter add_adapters set_adapter set_adapters load_lora_adapter save_lora_adapter unload_lora "
        "delete_adapters disable_adapters disable_lora enable_adapters enable_lora enable_lora_hotswap "
        "fuse_lora unfuse_lora active_adapters set_lora_device get_list_adapters get_active_adapters "
        "load_attn_procs save_attn_procs": "load a LoRA by the pipeline, train one by train_diffusion --lora",
        "enable_freeu disable_freeu": "it is no part of the model",
        "enable_forward_chunking disable_forward_chunking": "the feed-forward layers run whole",
        "enable_group_offload enable_layerwise_casting apply_layerwise_casting":
            "use the pipeline's enable_model_cpu_offload",
        "enable_cache disable_cache cache_context is_cache_enabled": "use minidiff.deep_cache(unet)",
        "enable_parallelism": "torch.distributed does it: see docs/training.md",
        "compile_repeated_blocks": "torch.compile(model)",
        "dequantize is_quantized quantization_method": "minidiff.int8(model) rounds the weights",
        "push_to_hub register_for_auto_class": DOWNLOADS,
        "from_single_file": "StableDiffusionPipeline.from_single_file reads all parts",
        "tiled_encode tiled_decode blend_v blend_h": "enable_tiling, then encode and decode",
        "get_aug_embed get_class_embed get_time_embed process_encoder_hidden_states":
            "embed_time, embed_text",
        "use_normalized_aspect_ratio encode_tiled": "not in this model",
        "extract_init_dict get_config_dict ignore_for_config has_compatibles to_json_file to_json_string":
            "model.config.to_dict()",
        "use_tiling_default use_slicing_default": "use_tiling, use_slicing",
        "hf_device_map": "one model, one device: model.device",
        "enable_npu_flash_attention disable_npu_flash_attention set_use_npu_flash_attention "
        "enable_xla_flash_attention disable_xla_flash_attention set_use_xla_flash_attention":
            "torch's fused kernel chooses for the device",
        "unet_name text_encoder_name": "the pipeline calls them unet and text_encoder",
    })

    @classmethod
    def load_config(cls, folder: str | os.PathLike, subfolder: str = "", **options: Any) -> dict[str, Any]:
        """The dict of a folder's config.json, for `from_config`. Raises WeightsError."""
        settle(f"{cls.__name__}.load_config", options, LOADING_IDLE, LOADING_REFUSED)
        return read_json(os.path.join(os.fspath(folder), subfolder, "config.json"))

    def save_config(self, folder: str | os.PathLike, push_to_hub: bool = False) -> None:
        """Writes config.json alone."""
        settle(f"{type(self).__name__}.save_config", {"push_to_hub": push_to_hub}, {}, SAVING_REFUSED)
        os.makedirs(folder, exist_ok=True)
        write_json(os.path.join(os.fspath(folder), "config.json"), self.export_config())

    def set_attention_slice(self, slice_size: int | str | list[int] | None = "auto") -> None:
        """Does nothing: attention never holds the whole matrix."""

    def set_default_attn_processor(self) -> None:
        """Does nothing: there is one way of attention."""

    def fuse_qkv_projections(self) -> None:
        """Does nothing: the numbers are the same with three projections and with one."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Does nothing: attention is torch's fused kernel already."""

    unfuse_qkv_projections = set_default_attn_processor
    disable_xformers_memory_efficient_attention = set_default_attn_processor
    set_use_memory_efficient_attention_xformers = enable_xformers_memory_efficient_attention
