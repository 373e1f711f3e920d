"""Sample images from a trained run: python -m train.sample --run out/calligraphy --prompt "春 草書"

Read after train_diffusion.py. Needs nothing but the run folder.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from minidiff.optimize import optimize
from minidiff.text_to_image import TextToImage

from .data.grid import grid_columns, save_grid, save_image
from .explain import explain
from .run.cli import MAX_SEED, check_flags, flag, model_folder, parse_flags, pick_device, start
from .run.folder import make_folder
from .run.log import Progress
from .strokes import load_writer


@dataclass(frozen=True)
class SampleConfig:
    """The flags of train.sample."""

    run: str = flag("out/calligraphy", "run folder of train.train_diffusion")
    prompt: str = flag("", "what to write, such as 春 草書; 春 alone leaves the hand open; empty: anything")
    count: int = flag(20, "how many images", at_least=1, at_most=100_000)
    seed: int = flag(0, "one seed, one set of images", at_least=0, at_most=MAX_SEED)
    out: str = flag("out/samples", "folder for 0000.png ..., numbered on from those there, and grid.png")
    guidance: float = flag(1.5, "0 ignores the prompt, 1 follows it, more exaggerates it", at_least=-1000,
                           at_most=1000)
    steps: int = flag(30, "denoising steps", at_least=1, at_most=1000)
    batch: int = flag(20, "images at a time", at_least=1, at_most=100_000)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")
    explain: str = flag("", "FILE.html: in place of images, one page that shows step by step how the prompt "
                            "is written, and what each part of the model does for it")


def main(cfg: SampleConfig) -> None:
    """Leaves the images and grid.png in --out, or the page of --explain.

    Raises UserError, and WeightsError or ConfigError for a model that cannot be read.
    """
    check_flags(cfg)
    model = optimize(load_writer(model_folder(cfg.run))).to(pick_device(cfg.device))
    prompt = understood(model, cfg.prompt)
    if cfg.explain:
        (prompt,) = model.completed(prompt, 1, cfg.seed)
        explain(model, prompt, Path(cfg.explain), cfg.seed, cfg.steps, cfg.guidance)
        print(f"open {cfg.explain}")
        return
    out = make_folder(cfg.out)

    progress = Progress(cfg.count, unit="picture")
    prompts = model.completed(prompt, cfg.count, cfg.seed)
    images = model.sample(prompts, cfg.seed, cfg.steps, cfg.guidance, cfg.batch,
                          lambda done: progress.show(done, prompt))
    progress.close()
    names = free_names(out, cfg.count)
    for name, image in zip(names, images, strict=True):
        save_image(image, out / name)
    save_grid(images, out / "grid.png", grid_columns(cfg.count))
    which = names[0] if cfg.count == 1 else f"{names[0]} to {names[-1]}"
    print(f"{cfg.count} pictures in {out}, {which}, and these together in {out / 'grid.png'}")


def free_names(out: Path, count: int) -> list[str]:
    """0000.png and so on, or on from the highest number that is there: no image is lost."""
    taken = [int(path.stem) for path in out.glob("*.png") if re.fullmatch("[0-9]+", path.stem)]
    first = max(taken, default=-1) + 1
    return [f"{i:04d}.png" for i in range(first, first + count)]


def understood(model: TextToImage, prompt: str) -> str:
    """The prompt with words apart that are written together; says on stderr what this run cannot know."""
    spaced = model.spaced(prompt)
    if spaced != " ".join(prompt.split()):
        print(f"note: {prompt} is read as {spaced}", file=sys.stderr)
    if unknown := model.unknown_words(spaced):
        known = " ".join(list(model.known_words())[:40])
        print(f"warning: this run never saw {'、'.join(unknown)}; it knows {known}", file=sys.stderr)
    if apart := model.never_together(spaced):
        beside = [f"; {word} goes with {' '.join(others[:20])}" for word, others in apart.items() if others]
        print(f"warning: no training caption holds {'、'.join(apart)} together, so expect one of them in a "
              f"picture{''.join(beside)}", file=sys.stderr)
    return spaced


if __name__ == "__main__":
    start(lambda: main(parse_flags(SampleConfig, __doc__.split("\n\n")[0])))
