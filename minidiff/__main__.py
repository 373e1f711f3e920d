"""`python -m minidiff --model FOLDER --prompt "..."`: pictures from a Stable Diffusion folder or single file.

Read after pipeline.py. Every mistake of the user ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from minidiff.pipeline import SCHEDULERS, StableDiffusionPipeline

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minidiff", description="Pictures from a Stable Diffusion checkpoint.")
    add = parser.add_argument
    add("--model", required=True, help="a folder as diffusers writes it, or a .safetensors or .ckpt file")
    add("--tokenizer", help="for a single file: a tokenizer's folder, or bpe_simple_vocab_16e6.txt.gz")
    add("--prompt", required=True)
    add("--negative", help="negative prompt")
    add("--image", help="start from this picture")
    add("--mask", help="with --image: paint anew where this picture is white")
    add("--strength", type=float, help="part of the steps to walk with --image, in (0, 1]")
    add("--count", type=int, default=1, help="pictures to draw; picture i has the seed seed + i")
    add("--batch", type=int, default=1, help="pictures at a time")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=50)
    add("--guidance", type=float, help="1 = the prompt alone, 0 = no prompt at all; default 7.5, SDXL 5")
    add("--height", type=int)
    add("--width", type=int)
    add("--sampler", choices=SAMPLERS, help="default: the checkpoint's own")
    add("--variant", help="e.g. fp16")
    add("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    add("--device", default="cpu", help="cpu, cuda, mps")
    add("--out", default="out", help="folder for the pictures, 0000.png and so on")
    return parser.parse_args(argv)


def load(a: argparse.Namespace) -> StableDiffusionPipeline:
    dtype = getattr(torch, a.dtype)
    if os.path.isdir(a.model):
        pipe = StableDiffusionPipeline.from_pretrained(a.model, a.variant, dtype)
    elif a.tokenizer is None:
        raise ValueError(f"{a.model}: a single file holds no tokenizer, so --tokenizer is needed")
    else:
        pipe = StableDiffusionPipeline.from_single_file(a.model, a.tokenizer, dtype)
    if a.sampler is not None:
        usual = {"skip_prk_steps": True} if a.sampler == "pndm" else {}     # as Stable Diffusion runs it
        pipe.scheduler = SCHEDULERS[SAMPLERS[a.sampler]].from_config(pipe.scheduler.config, **usual)
    return pipe.to(a.device)


def read_picture(path: str | None):
    if path is None:
        return None
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: no picture that can be read: {error}") from None


def main(argv: list[str] | None = None) -> int:
    a = arguments(argv)
    try:
        if a.count < 1 or a.batch < 1:
            raise ValueError(f"--count {a.count} and --batch {a.batch} must be at least 1")
        os.makedirs(a.out, exist_ok=True)
        image, mask = read_picture(a.image), read_picture(a.mask)
        pipe = load(a)
        for first in range(0, a.count, a.batch):
            numbers = range(first, min(first + a.batch, a.count))
            pictures = pipe(
                a.prompt,
                image=image,
                mask_image=mask,
                strength=a.strength,
                height=a.height,
                width=a.width,
                num_inference_steps=a.steps,
                guidance_scale=a.guidance,
                negative_prompt=a.negative,
                num_images_per_prompt=len(numbers),
                generator=[torch.Generator().manual_seed(a.seed + i) for i in numbers],
            ).images
            for i, picture in zip(numbers, pictures, strict=True):
                path = os.path.join(a.out, f"{i:04d}.png")
                picture.save(path)
                print(path)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        print(f"minidiff: {str(error).splitlines()[0] if str(error) else type(error).__name__}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
