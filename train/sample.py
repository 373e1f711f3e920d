"""Write pictures with a trained run: python -m train.sample --run out/calligraphy --prompt "春 草書" --count 20

Read after train_diffusion.py. Needs nothing but the run folder.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from train.common import (
    SEEDS,
    Progress,
    UserError,
    check_flags,
    flag,
    grid_columns,
    make_folder,
    parse_flags,
    pick_device,
    run,
    save_grid,
    save_picture,
)
from train.writer import Writer


@dataclass(frozen=True)
class SampleConfig:
    run: str = flag("out/calligraphy", "run folder of train.train_diffusion")
    prompt: str = flag("", "what to write, such as 春 草書; 春 alone leaves the hand open; empty: anything")
    count: int = flag(20, "how many pictures", at_least=1, at_most=100_000)
    seed: int = flag(0, "one seed, one set of pictures", **SEEDS)
    out: str = flag("out/samples", "folder for 0000.png ..., numbered on from those there, and grid.png")
    guidance: float = flag(1.5, "0 ignores the prompt, 1 follows it, more exaggerates it", at_least=-1000,
                           at_most=1000)
    steps: int = flag(30, "denoising steps", at_least=1, at_most=1000)
    batch: int = flag(20, "pictures at a time", at_least=1, at_most=100_000)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")


def main(cfg: SampleConfig) -> None:
    check_flags(cfg)
    device = pick_device(cfg.device)
    model = Path(cfg.run) / "model"
    if not model.is_dir():
        raise UserError(f"--run {cfg.run}: no run folder here (it would hold a folder `model`)")
    writer = Writer.load(model).to(device)
    prompt = understood(writer, cfg.prompt)
    out = make_folder(cfg.out)

    progress = Progress(cfg.count, unit="picture")
    prompts = writer.completed(prompt, cfg.count, cfg.seed)
    pictures = writer.write(prompts, cfg.seed, cfg.steps, cfg.guidance, cfg.batch,
                            lambda done: progress.show(done, prompt))
    progress.close()
    names = free_names(out, cfg.count)
    for name, picture in zip(names, pictures, strict=True):
        save_picture(picture, out / name)
    save_grid(pictures, out / "grid.png", grid_columns(cfg.count))
    which = names[0] if cfg.count == 1 else f"{names[0]} to {names[-1]}"
    print(f"{cfg.count} pictures in {out}, {which}, and these together in {out / 'grid.png'}")


def free_names(out: Path, count: int) -> list[str]:
    """0000.png and so on, or on from the highest number that is there: no picture is lost."""
    taken = [int(path.stem) for path in out.glob("*.png") if re.fullmatch("[0-9]+", path.stem)]
    first = max(taken, default=-1) + 1
    return [f"{i:04d}.png" for i in range(first, first + count)]


def understood(writer: Writer, prompt: str) -> str:
    """The prompt with words apart that are written together; says on stderr what this run cannot know."""
    spaced = writer.spaced(prompt)
    if spaced != " ".join(prompt.split()):
        print(f"note: {prompt} is read as {spaced}", file=sys.stderr)
    if unknown := writer.unknown_words(spaced):
        known = " ".join(list(writer.known_words())[:40])
        print(f"warning: this run never saw {'、'.join(unknown)}; it knows {known}", file=sys.stderr)
    if apart := writer.strangers(spaced):
        beside = [f"; {word} goes with {' '.join(others[:20])}" for word, others in apart.items() if others]
        print(f"warning: no training caption holds {'、'.join(apart)} together, so expect one of them in a "
              f"picture{''.join(beside)}", file=sys.stderr)
    return spaced


if __name__ == "__main__":
    run(lambda: main(parse_flags(SampleConfig, __doc__.split("\n\n")[0])))
