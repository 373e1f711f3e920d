"""`python -m minidiff --model FOLDER --prompt "..."`: pictures from a Stable Diffusion folder or single file,
or a run.

Read after pipeline.py. Every mistake of the user ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from miniclip.command import run
from miniclip.picture import open_picture
from minidiff.optimize import optimize
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.pipeline_folder import SCHEDULERS
from minidiff.shortcuts import deep_cache, int8, merge_tokens
from minidiff.text_to_image import TextToImage, model_of

RUN_GUIDANCE = 1.5      # of a run of train_diffusion, as train.sample has it
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
    """The parsed command line; a mistake in it exits with status 2."""
    parser = argparse.ArgumentParser("python -m minidiff", "%(prog)s --model FOLDER --prompt TEXT [options]",
                                     "Pictures from a Stable Diffusion checkpoint, or a run of "
                                     "train_diffusion, on this disk; nothing is downloaded.")
    add = parser.add_argument_group("the model").add_argument
    add("--model", required=True, metavar="PATH",
        help="a folder as diffusers writes it, a .safetensors or .ckpt file, or a run of train_diffusion")
    add("--tokenizer", metavar="PATH", help="for a single file: a tokenizer's folder, or "
                                            "bpe_simple_vocab_16e6.txt.gz")
    add("--variant", metavar="NAME", help="of the folder's weight files, e.g. fp16 (default: none)")
    add("--dtype", default="float32", choices=["float32", "float16", "bfloat16"], help="default: %(default)s")
    add("--device", default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    add = parser.add_argument_group("what to draw").add_argument
    add("--prompt", required=True, metavar="TEXT", help="what the picture shows")
    add("--negative", metavar="TEXT", help="what it does not show (default: nothing)")
    add("--image", metavar="FILE", help="start from this picture")
    add("--mask", metavar="FILE", help="with --image: paint anew where this picture is white")
    add("--strength", type=float, metavar="S", help="part of the steps to walk with --image, in (0, 1] "
                                                    "(default: 0.8, with --mask 1)")
    add("--height", type=int, metavar="PIXELS", help="default: the model's own, or that of --image")
    add("--width", type=int, metavar="PIXELS", help="likewise")
    add = parser.add_argument_group("how").add_argument
    add("--sampler", choices=SAMPLERS, help="default: the checkpoint's own")
    add("--steps", type=int, default=50, metavar="N",
        help="denoising steps, 1 to 1000 (default: %(default)s)")
    add("--guidance", type=float, metavar="G",
        help="1 = the prompt alone, 0 = no prompt at all (default: 7.5, for SDXL 5, for a run 1.5)")
    add("--seed", type=int, default=0, metavar="N",
        help="picture i has the seed N + i (default: %(default)s)")
    add = parser.add_argument_group("sooner, or from less memory", "docs/shortcuts.md: what was measured"
                                    ).add_argument
    add("--optimize", choices=["full", "less", "no"], default="full",
        help="on a CPU in float32: the same picture sooner, from copies of the weights. The UNet of SD 1.5 "
             "takes 4.4 GB more with full, 3 GB with less, which gains less (default: %(default)s)")
    add("--guidance-interval", type=float, nargs=2, metavar=("FROM", "TO"), default=(0.0, 1.0),
        help="guidance on this part of the walk only, e.g. 0.2 0.8; other steps take half the time and "
             "follow the prompt less closely")
    add("--deep-cache", type=int, default=1, metavar="N",
        help="the UNet's deep levels on one step of N only: sooner, coarse shapes less exact "
             "(default: 1, exact)")
    add("--merge-tokens", type=float, default=0.0, metavar="RATIO",
        help="so many, 0 to 0.75, of the tokens of the largest self-attention merged with others like them: "
             "less detail in even regions (default: 0, exact)")
    add("--int8", action="store_true",
        help="the UNet's weights as int8: a quarter of the memory, once loaded, but slower: --optimize "
             "leaves them alone")
    add = parser.add_argument_group("how many, and where").add_argument
    add("--count", type=int, default=1, metavar="N", help="pictures to draw (default: %(default)s)")
    add("--batch", type=int, default=1, metavar="N", help="pictures at a time (default: %(default)s)")
    add("--out", default="out", metavar="FOLDER",
        help="for the pictures 0000.png, 0001.png ... (default: %(default)s)")
    return parser.parse_args(argv)


def check(a: argparse.Namespace) -> None:
    """What would otherwise end in a black picture, or late; the pipeline checks the rest."""
    if a.count < 1 or a.batch < 1:
        raise ValueError(f"--count {a.count} and --batch {a.batch} must be at least 1")
    if not -(2**63) <= a.seed <= 2**64 - a.count:
        raise ValueError(f"--seed {a.seed}: with --count {a.count} it must lie in -2**63 .. 2**64 - "
                         f"{a.count}")
    if a.guidance is not None and not math.isfinite(a.guidance):
        raise ValueError(f"--guidance {a.guidance}: not a finite number")


def load(a: argparse.Namespace) -> StableDiffusionPipeline:
    """The pipeline on its device, with the sampler asked for. A single file needs --tokenizer."""
    dtype = getattr(torch, a.dtype)
    if not os.path.isfile(a.model):
        pipe = StableDiffusionPipeline.from_pretrained(a.model, a.variant, dtype)
    elif a.tokenizer is None:
        raise ValueError(f"{a.model}: a single file holds no tokenizer, so --tokenizer is needed")
    else:
        pipe = StableDiffusionPipeline.from_single_file(a.model, a.tokenizer, dtype)
    if a.sampler is not None:
        usual = {"skip_prk_steps": True} if a.sampler == "pndm" else {}     # as Stable Diffusion runs it
        pipe.scheduler = SCHEDULERS[SAMPLERS[a.sampler]].from_config(pipe.scheduler.config, **usual)
    take_shortcuts(pipe, a)
    if a.optimize != "no":
        pipe.optimize(winograd=a.optimize == "full")
    return pipe.to(a.device)


def take_shortcuts(model: StableDiffusionPipeline | TextToImage, a: argparse.Namespace) -> None:
    """Those asked for. Raises ValueError for numbers out of range."""
    model.guidance_interval = tuple(a.guidance_interval)
    if a.deep_cache != 1:
        deep_cache(model.unet, a.deep_cache)
    if a.merge_tokens != 0:
        merge_tokens(model.unet, a.merge_tokens)
    if a.int8:
        int8(model.unet)


def read_picture(path: str | None):
    """An RGB Pillow picture, upright, or None without a path. Raises ImageError for a file that is none."""
    return None if path is None else open_picture(path).convert("RGB")


def draw(a: argparse.Namespace) -> Iterator[list[Any]]:
    """Pictures of a Stable Diffusion checkpoint, a batch at a time."""
    image, mask = read_picture(a.image), read_picture(a.mask)
    pipe = load(a)
    for first in range(0, a.count, a.batch):
        numbers = range(first, min(first + a.batch, a.count))
        yield pipe(
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


def draw_run(a: argparse.Namespace) -> Iterator[list[Any]]:
    """Pictures of a run of train_diffusion. Raises ValueError for flags that it has no use for."""
    for name in ("tokenizer", "negative", "image", "mask", "strength", "height", "width", "sampler",
                 "variant"):
        if getattr(a, name) is not None:
            raise ValueError(f"--{name}: not with {a.model}, which is a run of train_diffusion")
    model = TextToImage.load(a.model).to(a.device)
    take_shortcuts(model, a)
    if a.optimize != "no":
        optimize(model, winograd=a.optimize == "full")
    prompts = model.completed(model.spaced(a.prompt), a.count, a.seed)
    guidance = RUN_GUIDANCE if a.guidance is None else a.guidance
    yield model.draw(prompts, seed=a.seed, steps=a.steps, guidance=guidance, batch=a.batch)


def write(a: argparse.Namespace) -> None:
    """Draws the pictures and writes them under their numbers."""
    check(a)
    os.makedirs(a.out, exist_ok=True)
    number = 0
    for pictures in draw_run(a) if model_of(a.model) else draw(a):
        for picture in pictures:
            path = os.path.join(a.out, f"{number:04d}.png")
            picture.save(path)
            print(path)
            number += 1


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status, 2 after a mistake of the user."""
    a = arguments(argv)
    return run("minidiff", lambda: write(a), (ValueError, OSError, RuntimeError, AssertionError))


if __name__ == "__main__":
    sys.exit(main())
