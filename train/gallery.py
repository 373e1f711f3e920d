"""What a run can show, on one page: python -m train.gallery --run out/calligraphy

Read after sample.py, replay.py and paint.py, which it calls. Leaves in RUN/gallery twenty samples of a
prompt, one character replayed stroke by stroke with the ink of the run's own picture, and the text written
into a landscape; all are shown in RUN/gallery.html, with the commands that make them again.
"""

from __future__ import annotations

import dataclasses
import html
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from . import paint, replay, report, sample
from .run.cli import MAX_SEED, check_flags, command, flag, parse_flags, start
from .run.folder import clear, make_folder

SAMPLES = 20


@dataclass(frozen=True)
class GalleryConfig:
    """The flags of train.gallery."""

    run: str = flag("out/calligraphy", "run folder of train.train_diffusion, of pictures of characters")
    prompt: str = flag("春 草書", "of the samples")
    char: str = flag("春", "what is written stroke by stroke")
    text: str = flag("春滿乾坤", "what is written into the landscape")
    seal: str = flag("乾坤", "its seal; empty: none")
    hand: str = flag("楷書", "in which hand both are written")
    seed: int = flag(7, "one seed, one page", at_least=0, at_most=MAX_SEED)


def main(cfg: GalleryConfig) -> None:
    """Makes the pictures and the page. Raises what the scripts raise that it calls."""
    check_flags(cfg)
    folder, parts = Path(cfg.run) / "gallery", []
    clear(Path(cfg.run), within=folder.name)        # train.sample would number on from its pictures
    make_folder(folder)
    for title, script, settings, shown in steps(cfg, folder):
        script.main(settings)
        again = command(script.__name__.rpartition(".")[2], **asked_for(settings))
        pictures = [report.picture(folder / name, f"gallery/{name}") for name in shown]
        parts += [f"<h2>{html.escape(title)}</h2>", *pictures, f"<pre>{html.escape(again)}</pre>"]
    page = Path(cfg.run) / "gallery.html"
    report.write_page(page, f"Written by {cfg.run}", parts)
    print(f"open {page}")


def steps(cfg: GalleryConfig, folder: Path) -> list[tuple[str, ModuleType, Any, list[str]]]:
    """What is made: a title, the script, its settings, and the files that the page shows, in the folder."""
    picture = folder / "picture" / "0000.png"
    return [
        (f"{cfg.prompt}, {SAMPLES} times", sample, sample.SampleConfig(
            run=cfg.run, prompt=cfg.prompt, count=SAMPLES, seed=cfg.seed, out=str(folder / "samples")),
         ["samples/grid.png"]),
        (f"{cfg.char} {cfg.hand}", sample, sample.SampleConfig(
            run=cfg.run, prompt=f"{cfg.char} {cfg.hand}", count=1, seed=cfg.seed, out=str(picture.parent)),
         ["picture/0000.png"]),
        (f"{cfg.char} stroke by stroke, in the ink of that picture", replay, replay.ReplayConfig(
            of=str(picture), char=cfg.char, out=str(folder / "strokes")),
         [f"strokes/{cfg.char}.gif", f"strokes/{cfg.char}_stages.png"]),
        (f"{cfg.text} in a landscape", paint, paint.PaintConfig(
            run=cfg.run, text=cfg.text, hand=cfg.hand, seal=cfg.seal, animate=True, seed=cfg.seed,
            out=str(folder / "paintings")), [f"paintings/painting-{cfg.seed}.gif"]),
    ]


def asked_for(settings: Any) -> dict[str, Any]:
    """The flags that are not at their defaults."""
    return {f.name: value for f in dataclasses.fields(settings)
            if (value := getattr(settings, f.name)) != f.default}


if __name__ == "__main__":
    start(lambda: main(parse_flags(GalleryConfig, __doc__.split("\n\n")[0])))
