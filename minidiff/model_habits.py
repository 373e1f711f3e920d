"""What users of diffusers' models type out of habit, beside the forward call: config files, attention
switches that change nothing here, and names that are left out, each with what to do instead.

Not needed to understand a model. Mirrors: diffusers' ModelMixin, ConfigMixin, AttentionMixin and what the
UNet and the VAE add. docs/compatibility.md is made of this table.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from miniclip.habits import DOWNLOADS, LeftOut, Table, table
from miniclip.weights import read_json, write_json


class ModelHabits(LeftOut):
    """Mixin of the UNet and the VAE; nothing here changes what they compute."""

    _supports_gradient_checkpointing = True     # upstream's trainers ask

    left_out: ClassVar[Table] = table({
        "attn_processors set_attn_processor set_attention_backend reset_attention_backend":
            "attention is minidiff.attention.Attention; replace its modules",
        "add_adapter add_adapters set_adapter set_adapters load_lora_adapter save_lora_adapter unload_lora "
        "delete_adapters disable_adapters disable_lora enable_adapters enable_lora enable_lora_hotswap "
        "fuse_lora unfuse_lora active_adapters set_lora_device get_list_adapters get_active_adapters "
        "load_attn_procs save_attn_procs": "load a LoRA by the pipeline, train one by train_diffusion --lora",
        "enable_freeu disable_freeu": "it is no part of the model",
        "enable_forward_chunking disable_forward_chunking": "the feed-forward layers run whole",
        "enable_group_offload enable_layerwise_casting enable_cache disable_cache cache_context "
        "is_cache_enabled apply_layerwise_casting": "use the pipeline's enable_model_cpu_offload",
        "enable_parallelism": "torch.distributed does it: see docs/training.md",
        "compile_repeated_blocks": "torch.compile(model)",
        "dequantize is_quantized quantization_method": "weights are floating-point numbers here",
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
    })

    @classmethod
    def load_config(cls, folder: str | os.PathLike, subfolder: str = "", **habits: Any) -> dict[str, Any]:
        """The dict of a folder's config.json, for `from_config`. Raises WeightsError."""
        return read_json(os.path.join(os.fspath(folder), subfolder, "config.json"))

    def save_config(self, folder: str | os.PathLike, **habits: Any) -> None:
        """Writes config.json alone."""
        os.makedirs(folder, exist_ok=True)
        write_json(os.path.join(os.fspath(folder), "config.json"), self.export_config())

    def register_to_config(self, **entries: Any) -> None:
        """Changes what the config says from now on; the layers stay as they are."""
        self.config = self.config.changed(**entries)

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
