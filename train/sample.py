"""Write pictures with a trained run: python -m train.sample --run out/calligraphy --prompt "春 草書" --count 20

Read after train_diffusion.py. Needs nothing but the run folder.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from train.common import (
    Progress,
    UserError,
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
    count: int = flag(20, "how many pictures")
    seed: int = flag(0, "one seed, one set of pictures")
    out: str = flag("out/samples", "folder for 0000.png, 0001.png ... and grid.png")
    guidance: float = flag(1.5, "0 ignores the prompt, 1 follows it, more exaggerates it")
    steps: int = flag(30, "denoising steps")
    batch: int = flag(20, "pictures at a time")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")


def main(cfg: SampleConfig) -> None:
    for name in ("count", "steps", "batch"):
        if not 1 <= getattr(cfg, name) <= (1000 if name == "steps" else 100_000):
            raise UserError(f"--{name} {getattr(cfg, name)}: must lie in 1 .. {1000 if name == 'steps' else 100000}")
    device = pick_device(cfg.device)
    model = Path(cfg.run) / "model"
    if not model.is_dir():
        raise UserError(f"--run {cfg.run}: no run folder here (it would hold a folder `model`)")
    writer = Writer.load(model).to(device)
    warn_unknown(writer, cfg.prompt)
    out = make_folder(cfg.out)

    progress = Progress(cfg.count, unit="picture")
    prompts = writer.completed(cfg.prompt, cfg.count, cfg.seed)
    pictures = writer.write(prompts, cfg.seed, cfg.steps, cfg.guidance, cfg.batch,
                            lambda done: progress.show(done, cfg.prompt))
    progress.close()
    for i, picture in enumerate(pictures):
        save_picture(picture, out / f"{i:04d}.png")
    save_grid(pictures, out / "grid.png", grid_columns(cfg.count))
    print(f"{cfg.count} pictures in {out}, all together in {out / 'grid.png'}")


def warn_unknown(writer: Writer, prompt: str) -> None:
    unknown = writer.unknown_words(prompt)
    if unknown:
        known = dict.fromkeys(word for caption in writer.captions for word in caption.split())
        known = " ".join(list(known)[:40])
        print(f"warning: this run never saw {'、'.join(unknown)}; it knows {known}", file=sys.stderr)


if __name__ == "__main__":
    run(lambda: main(parse_flags(SampleConfig, __doc__.split("\n\n")[0])))
