"""What users of diffusers' pipelines type out of habit, beside the call itself: moving, saving memory,
looking at the parts; options that do nothing here, and names that are left out, each with what to do instead.

Not needed to understand the pipeline. Mirrors: diffusers' DiffusionPipeline and StableDiffusionMixin.
docs/compatibility.md is made of these tables.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import nn

from miniclip.habits import LeftOut, Table, table
from minidiff.optimize import optimize

# Parts of diffusers' pipelines that are never here: they may be given as None
NEVER_HERE = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker",
              "add_watermarker", "requires_aesthetics_score")

PIPELINE_LOADING_IDLE = table({
    "low_cpu_mem_usage load_connected_components mirror": "always so: a model is built without memory",
    "from_flax": "weights are read from safetensors or pickles of torch",
})
PIPELINE_LOADING_REFUSED = table({
    "custom_pipeline custom_revision": "write it as a function over the parts of this one",
    "provider sess_options use_onnx": "export the models, then use onnxruntime",
})
CALL_REFUSED = table({
    "callback callback_steps": "use callback_on_step_end",
    "ip_adapter_image ip_adapter_image_embeds": "IP adapters are left out",
    "padding_mask_crop": "crop image and mask first",
    "masked_image_latents": "give image and mask_image",
    "aesthetic_score negative_aesthetic_score": "only the SDXL refiner has them, and it is left out",
})


class PipelineHabits(LeftOut):
    """Mixin of the pipeline: nothing here changes what is drawn, but for how much memory it takes."""

    offload_device: torch.device | None = None
    progress_options: ClassVar[dict[str, Any]] = {}

    left_out: ClassVar[Table] = table({
        "enable_sequential_cpu_offload enable_group_offload": "use enable_model_cpu_offload",
        "enable_freeu disable_freeu": "it is not part of the model; scale up_blocks' inputs in a subclass",
        "load_ip_adapter set_ip_adapter_scale unload_ip_adapter prepare_ip_adapter_image_embeds encode_image":
            "IP adapters are left out",
        "load_textual_inversion unload_textual_inversion maybe_convert_prompt":
            "tokenizer.add_tokens, text_encoder.resize_token_embeddings, then set the new rows",
        "save_lora_weights write_lora_layers pack_weights": "train.train_diffusion --lora writes such a file",
        "load_lora_into_unet load_lora_into_text_encoder lora_state_dict": "use load_lora_weights",
        "enable_lora_hotswap set_lora_device fused_loras num_fused_loras lora_scale":
            "one adapter at a time: load_lora_weights, set_adapters, fuse_lora, unload_lora_weights",
        "push_to_hub download": "nothing goes over the network; copy the folder with huggingface_hub",
        "register_modules register_for_auto_class register_to_config": "set the attribute: pipe.unet = ...",
        "from_config load_config get_config_dict extract_init_dict to_json_file to_json_string save_config "
        "config config_name has_compatibles ignore_for_config": "the parts have configs; use from_pretrained",
        "check_inputs prepare_latents prepare_extra_step_kwargs get_guidance_scale_embedding upcast_vae":
            "the call does it; to change it, subclass StableDiffusionPipeline",
        "clip_skip cross_attention_kwargs denoising_start denoising_end guidance_rescale":
            "keep what you passed to the call",
        "maybe_free_model_hooks remove_all_hooks reset_device_map hf_device_map model_cpu_offload_seq":
            "there are no hooks; pipe.to(device) ends offloading",
        "progress_bar": "use callback_on_step_end", "name_or_path": "keep the path yourself",
        "parameters unet_name text_encoder_name": "each of pipe.models() has its own",
        "get_timesteps run_safety_checker prepare_mask_latents":
            "the call does it; to change it, subclass StableDiffusionPipeline",
        "set_use_memory_efficient_attention_xformers": "attention is torch's fused kernel already",
    })

    # ---- the parts

    @property
    def components(self) -> dict[str, Any]:
        """All that the constructor takes, by name; the parts that are never here are None."""
        names = ["vae", "text_encoder", "tokenizer", "unet", "scheduler"]
        names += ["text_encoder_2", "tokenizer_2"] if self.is_xl else ["safety_checker"]
        parts = {name: getattr(self, name, None) for name in names}
        return {**parts, "feature_extractor": None, "image_encoder": None}

    @classmethod
    def from_pipe(cls, pipe: Any, **given: Any) -> Any:
        """Another pipeline around the same parts; nothing is copied."""
        kept = {name: part for name, part in pipe.components.items() if name not in NEVER_HERE}
        return cls(**{**kept, **given})

    def models(self) -> list[nn.Module]:
        """The parts with weights: UNet, VAE and the text encoders that there are."""
        return [m for m in (self.unet, self.vae, self.text_encoder, self.text_encoder_2) if m is not None]

    def to(self, *args: Any, silence_dtype_warnings: bool = True, **kwargs: Any) -> Any:
        """Moves or casts all models, as `nn.Module.to`: a device, a dtype, or both, also as `device=` and
        `dtype=`. Ends offloading."""
        self.offload_device = None
        for model in self.models():
            model.to(*args, **kwargs)
        return self

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return self.unet.device if self.offload_device is None else self.offload_device

    @property
    def dtype(self) -> torch.dtype:
        """That of the UNet."""
        return self.unet.dtype

    # ---- time and memory

    def optimize(self, winograd: bool = True) -> Any:
        """Makes all models faster for inference on a CPU in float32, in place, as `minidiff.optimize`; on any
        other device nothing changes.

        LoRA files may be loaded before and after; once one was fused or unloaded, call it again: those layers
        are new. Memory: copies of the weights, from the first picture on; winograd: False needs fewer.
        """
        for model in self.models():
            optimize(model, winograd)
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None,
                                 device: torch.device | str | None = None) -> None:
        """Keeps the models on the CPU, and each on the device only while it works: text encoders, UNet, VAE.

        Raises ValueError where there is neither CUDA nor MPS, and none is named.
        """
        if device is None:
            device = ("cuda" if torch.cuda.is_available()
                      else "mps" if torch.backends.mps.is_available() else None)
        if device is None:
            raise ValueError("enable_model_cpu_offload: no GPU was found here")
        device = torch.device(device)
        self.offload_device = torch.device(device.type, gpu_id) if gpu_id is not None else device
        self.at_work()

    def at_work(self, *models: nn.Module | None) -> None:
        """With offloading: these models on the device, all others on the CPU."""
        for model in [] if self.offload_device is None else self.models():
            model.to(self.offload_device if any(model is m for m in models) else "cpu")

    def enable_vae_slicing(self) -> None:
        """The VAE decodes one picture of the batch at a time."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """The VAE decodes the whole batch at once again."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """The VAE decodes large pictures in overlapping tiles."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """The VAE decodes pictures in one piece again."""
        self.vae.disable_tiling()

    def enable_attention_slicing(self, slice_size: int | str | None = "auto") -> None:
        """Does nothing, and says so: the fused kernel never holds the whole attention matrix."""
        warnings.warn("enable_attention_slicing does nothing here: attention never holds the whole matrix",
                      stacklevel=2)

    set_attention_slice = enable_attention_slicing

    def disable_attention_slicing(self) -> None:
        """Does nothing, as there is none."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Does nothing: attention is torch's fused kernel already."""

    disable_xformers_memory_efficient_attention = enable_xformers_memory_efficient_attention

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Does nothing: the numbers are the same with three projections and with one."""

    unfuse_qkv_projections = fuse_qkv_projections

    # ---- while it draws

    def set_progress_bar_config(self, disable: bool | None = None, **tqdm_options: Any) -> None:
        """disable=True: no progress line, which a terminal alone shows. tqdm's options do nothing."""
        self.progress_options = {"disable": disable}

    @property
    def guidance_scale(self) -> float:
        """That of the call under way, or of the last one; a callback may change it as `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether two texts are mixed."""
        return self._guidance_scale not in (0, 1) and self.unet.config.time_cond_proj_dim is None

    @property
    def num_timesteps(self) -> int:
        """Steps of the call under way, or of the last one."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked, by `pipe._interrupt = True`, to leave out the remaining steps."""
        return self._interrupt

    @staticmethod
    def numpy_to_pil(images: Any) -> list[Any]:
        """Arrays [B, H, W, C] in 0 to 1 -> Pillow pictures."""
        from minidiff.pil import from_arrays, to_pil

        return to_pil(from_arrays(images))
