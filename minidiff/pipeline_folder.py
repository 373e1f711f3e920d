"""A pipeline's folder and its single file: which parts there are, of which classes, and where each lies.

Read after pipeline.py. Mirrors: diffusers' pipeline_utils.py and loaders/single_file.py.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from miniclip.files import WeightsError, read_json, shown, write_json
from miniclip.habits import LOADING_IDLE, LOADING_REFUSED, SAVING_IDLE, SAVING_REFUSED, settle
from miniclip.model import CLIPTextModel, CLIPTextModelWithProjection
from miniclip.tokenizer import CLIPTokenizer
from minidiff import samplers
from minidiff.convert import load_single_file, scheduler_config
from minidiff.pipeline_habits import NEVER_HERE, PIPELINE_LOADING_IDLE, PIPELINE_LOADING_REFUSED
from minidiff.schedule import Scheduler
from minidiff.unet import UNet2DConditionModel
from minidiff.vae import AutoencoderKL

if TYPE_CHECKING:
    from minidiff.pipeline import StableDiffusionPipeline

# Those of diffusion models: no Stable Diffusion pipeline of upstream takes the one of flow
SCHEDULERS: dict[str, type[Scheduler]] = {
    name: kind for name, kind in vars(samplers).items()
    if name.endswith("Scheduler") and issubclass(kind, Scheduler)
}
# The parts of a folder, and the classes that each may be; a part that is not here is left aside
PARTS: dict[str, dict[str, Any]] = {
    "unet": {"UNet2DConditionModel": UNet2DConditionModel},
    "vae": {"AutoencoderKL": AutoencoderKL},
    "scheduler": SCHEDULERS,
    "tokenizer": {"CLIPTokenizer": CLIPTokenizer, "CLIPTokenizerFast": CLIPTokenizer},
    "tokenizer_2": {"CLIPTokenizer": CLIPTokenizer, "CLIPTokenizerFast": CLIPTokenizer},
    "text_encoder": {"CLIPTextModel": CLIPTextModel},
    "text_encoder_2": {"CLIPTextModelWithProjection": CLIPTextModelWithProjection},
}
NEEDED = ("unet", "vae", "scheduler", "tokenizer", "text_encoder")


class PipelineFolder:
    """Mixin of the pipeline: reading and writing it."""

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, variant: str | None = None,
        torch_dtype: torch.dtype | str | None = None, dtype: torch.dtype | str | None = None, **given: Any
    ) -> StableDiffusionPipeline:
        """Reads a local folder as diffusers writes it: model_index.json and one folder for each part.

        given: parts to take in place of the folder's, by their names, such as `unet=...`; None leaves one out
        (`safety_checker=None`; without text encoders the calls need prompt_embeds). Upstream's other options
        do nothing here or raise; see pipeline_habits.py.
        Raises WeightsError or ConfigError. The safety checker and other parts that it may hold are left
        aside.
        """
        folder = os.fspath(folder)
        source = os.path.join(folder, "model_index.json")
        index = read_json(source)
        parts = {name: given.pop(name) for name in PARTS if name in given}
        settle(f"{cls.__name__}.from_pretrained", {k: v for k, v in given.items() if k not in NEVER_HERE},
               {**LOADING_IDLE, **PIPELINE_LOADING_IDLE}, {**LOADING_REFUSED, **PIPELINE_LOADING_REFUSED})
        own = {k: v for k, v in given.items() if k in NEVER_HERE}
        for name in PARTS:
            listed = index.get(name)
            if name not in parts and isinstance(listed, list) and listed and listed[-1] is not None:
                part = _class_of(listed[-1], PARTS[name], f"{source}: {name}")
                options = {"variant": variant, "dtype": torch_dtype if dtype is None else dtype}
                parts[name] = part.from_pretrained(folder, subfolder=name,
                                                   **(options if issubclass(part, nn.Module) else {}))
        # as upstream has it, an SDXL folder may do without what encodes prompts
        optional = ("tokenizer", "text_encoder") if "XL" in str(index.get("_class_name")) else ()
        if missing := [name for name in NEEDED if name not in parts and name not in optional]:
            raise WeightsError(f"{source}: the part {missing[0]!r} is missing, so this is no text-to-image "
                               "pipeline")
        if index.get("requires_aesthetics_score"):
            raise WeightsError(f"{source}: requires_aesthetics_score (the SDXL refiner) is not supported")
        zeros = index.get("force_zeros_for_empty_prompt", True)
        return cls(**{**dict.fromkeys(NEEDED), **own, **parts, "force_zeros_for_empty_prompt": zeros})

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike,
        tokenizer: str | os.PathLike | CLIPTokenizer,
        torch_dtype: torch.dtype | None = None,
    ) -> StableDiffusionPipeline:
        """Reads one .safetensors or .ckpt file in the original layout of SD 1, SD 2 or SDXL.

        tokenizer: such files hold none. A tokenizer, a folder with its files,
        or OpenAI's bpe_simple_vocab_16e6.txt.gz.
        """
        parts: dict[str, Any] = load_single_file(path, torch_dtype)
        if missing := [name for name in ("unet", "vae", "text_encoder") if name not in parts]:
            raise WeightsError(f"{os.fspath(path)}: holds no {missing[0]}, so it makes no pipeline")
        name, config = scheduler_config(parts)
        parts["scheduler"] = SCHEDULERS[name](**config)
        first_pads_with_end = not parts["unet"].config.use_linear_projection or "text_encoder_2" in parts
        parts["tokenizer"] = _tokenizer(tokenizer, {} if first_pads_with_end else {"pad_token": "!"})
        if "text_encoder_2" in parts:
            parts["tokenizer_2"] = _tokenizer(tokenizer, {"pad_token": "!"})
        return cls(**parts)

    def save_pretrained(self, folder: str | os.PathLike, variant: str | None = None,
                        max_shard_size: int | str = 10 * 10**9, safe_serialization: bool = True,
                        **habits: Any) -> None:
        """Writes a folder that diffusers reads; the options are those of each model's save_pretrained."""
        settle(f"{type(self).__name__}.save_pretrained", habits, SAVING_IDLE, SAVING_REFUSED)
        folder = os.fspath(folder)
        options = {"variant": variant, "max_shard_size": max_shard_size,
                   "safe_serialization": safe_serialization}
        index: dict[str, Any] = {"_class_name": f"StableDiffusion{'XL' * self.is_xl}Pipeline",
                                 "_diffusers_version": "0.30.0"}
        for name in PARTS:
            part = getattr(self, name)
            library = "transformers" if name.startswith(("text", "token")) else "diffusers"
            if part is not None:
                part.save_pretrained(os.path.join(folder, name),
                                     **(options if isinstance(part, nn.Module) else {}))
                index[name] = [library, type(part).__name__]
            elif self.is_xl or not name.endswith("_2"):
                index[name] = [None, None]
        index |= {name: [None, None] for name in ("feature_extractor", "image_encoder")}
        index |= {} if self.is_xl else {"safety_checker": [None, None], "requires_safety_checker": False}
        index |= {"force_zeros_for_empty_prompt": self.force_zeros_for_empty_prompt} if self.is_xl else {}
        write_json(os.path.join(folder, "model_index.json"), index)


def _class_of(name: Any, classes: dict[str, Any], source: str) -> Any:
    """The class that a folder names; names from the JAX port mean the same classes."""
    plain = name.removeprefix("Flax") if isinstance(name, str) else name
    if not isinstance(plain, str) or plain not in classes:
        raise WeightsError(f"{source}: {shown(name)} is not supported, only {', '.join(classes)}")
    return classes[plain]


def _tokenizer(given: Any, options: dict[str, Any]) -> CLIPTokenizer:
    if isinstance(given, CLIPTokenizer):
        return CLIPTokenizer(given.vocab, given.merges, model_max_length=given.model_max_length, **options)
    read = CLIPTokenizer.from_pretrained if os.path.isdir(given) else CLIPTokenizer.from_bpe_file
    return read(given, **options)
