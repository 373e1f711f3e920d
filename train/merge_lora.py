"""Puts what LoRA learned into a model's weights: python -m train.merge_lora --model FOLDER --lora FILE --out
FOLDER

Read after lora.py, which knows the file layouts of diffusers and peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from miniclip.image_text import ImageTextModel
from minidiff.lora import FILE, merge_lora
from minidiff.pipeline import StableDiffusionPipeline

from .errors import UserError
from .lora import PEFT_FILE, merge_adapter
from .run.cli import check_flags, flag, parse_flags, start
from .run.folder import make_folder


@dataclass(frozen=True)
class MergeConfig:
    """The flags of train.merge_lora."""

    model: str = flag("", "model folder: of Stable Diffusion (with model_index.json) or of a CLIP")
    lora: str = flag("", f"LoRA file or its folder: {FILE} for Stable Diffusion, {PEFT_FILE} for a CLIP")
    scale: float = flag(1.0, "how much of it; 0 is nothing", at_least=-1000, at_most=1000)
    out: str = flag("", "model folder to write")


def main(cfg: MergeConfig) -> None:
    """Writes the merged model to --out.

    Raises UserError, and WeightsError or ConfigError for a model or a LoRA file that does not fit.
    """
    check_flags(cfg)
    for name in ("model", "lora", "out"):
        if not getattr(cfg, name):
            raise UserError(f"--{name}: is needed")
    if (Path(cfg.model) / "model_index.json").exists():
        pipe = StableDiffusionPipeline.from_pretrained(cfg.model)
        merge_lora(pipe.unet, lora_file(cfg.lora, FILE), cfg.scale)
        pipe.save_pretrained(make_folder(cfg.out))
    else:
        model = ImageTextModel.load(cfg.model)
        merge_adapter(model.model, lora_file(cfg.lora, PEFT_FILE), cfg.scale)
        model.save(make_folder(cfg.out))
    print(f"{cfg.out}: {cfg.model} with {cfg.lora} in its weights")


def lora_file(path: str, name: str) -> Path:
    """The file itself, or the one of this name in a folder."""
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise UserError(f"--lora {path}: "
                        f"{f'no {name} in this folder' if Path(path).is_dir() else 'no such file'}")
    return file


if __name__ == "__main__":
    start(lambda: main(parse_flags(MergeConfig, __doc__.split("\n\n")[0])))
