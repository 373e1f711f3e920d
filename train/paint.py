"""Write into a painting: python -m train.paint --run out/calligraphy --onto landscape --text 春滿乾坤

Read after landscape.py and composition.py. Leaves painting-SEED.png and, with --animate, painting-SEED.gif.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from miniclip.weights import atomic_write
from minidiff.optimize import optimize
from minidiff.text_to_image import TextToImage, model_of

from .animate import animation as writing
from .composition import LAYOUTS, Box, Seal, Sheet, compose, finished, frames_of, write_on  # noqa: F401
from .data.image import read_whole
from .data.table import list_captioned
from .errors import UserError
from .landscape import landscape
from .run.cli import MAX_SEED, check_flags, command, flag, parse_flags, start
from .run.folder import make_folder
from .seal import CUTS, MOST
from .strokes import load_run, strokes_model_of, written

LONGEST = 56                # characters of a text
STEPS = 8                   # in which a picture appears in the animation
WRITTEN, EVERY = 384, 5     # of strokes: pixels of a character, and of how many frames one is kept
GIF_BYTES = 200 * 2**10
GIF_WIDTHS = (720, 640, 560, 480, 420, 360, 300, 250, 200, 160, 128, 96, 64)
GIF_COLOURS = 64
FRAME_MS, LAST_MS = 90, 3000


@dataclass(frozen=True)
class PaintConfig:
    """The flags of train.paint."""

    run: str = flag("out/strokes", "what writes: a run of train.train_diffusion, on strokes or on pictures, "
                                   "or a folder of pictures of characters such as data/calligraphy")
    onto: str = flag("landscape", "a painting of yours, 64 to 8192 pixels a side; landscape: one is painted")
    text: str = flag("春滿乾坤", "what to write")
    hand: str = flag("楷書", "in which hand")
    layout: str = flag("column", "column: from top to bottom; row; both from right to left", choices=LAYOUTS)
    place: str = flag("auto", "auto: where the painting is emptiest; x,y: upper left corner in pixels")
    scale: float = flag(1.0, "of the characters", at_least=0.1, at_most=10)
    seal: str = flag("", f"1 to {MOST} characters of a seal below the text; empty: none")
    cut: str = flag("auto", "朱文: red characters, 白文: white ones on red", choices=("auto", *CUTS))
    animate: bool = flag(False, "also write a GIF in which the text appears")
    width: int = flag(1024, "of the landscape, in pixels", at_least=64, at_most=4096)
    height: int = flag(1536, "of the landscape, in pixels", at_least=64, at_most=4096)
    seed: int = flag(0, "one seed, one picture", at_least=0, at_most=MAX_SEED)
    out: str = flag("out/paintings", "folder for the pictures")


def main(cfg: PaintConfig) -> None:
    """Leaves the picture, and the animation if asked, in --out. Raises UserError or DataError."""
    check_flags(cfg)
    check_text(cfg)
    out = make_folder(cfg.out)
    painting = read_painting(cfg)
    stages = inks_of(cfg.run, cfg.text, cfg.hand, cfg.seed)
    seal = seal_of(cfg)
    inks = [growing[-1] for growing in stages]
    sheet = write_on(painting, inks, cfg.layout, cfg.place, seal, cfg.seed, cfg.scale)
    still = out / f"painting-{cfg.seed}.png"
    with atomic_write(still) as file:
        Image.fromarray(finished(painting, sheet).transpose(1, 2, 0)).save(file, "png", compress_level=4)
    print(f"{cfg.text} at {sheet.cells[0].side} pixels a character in {still}{where(sheet)}")
    if cfg.animate:
        moving = still.with_suffix(".gif")
        data = animation(painting, sheet, stages)
        with atomic_write(moving) as file:
            file.write(data)
        print(f"{moving}: {len(data) / 1024:.0f} KiB")


def where(sheet: Sheet) -> str:
    """How empty the place is that was found, in words."""
    return "" if sheet.emptier is None else f"; {sheet.emptier:.1%} of the places are emptier"


def check_text(cfg: PaintConfig) -> None:
    """Raises UserError for a text or a seal of no or too many characters."""
    if not 1 <= len(cfg.text) <= LONGEST or cfg.text.split() != [cfg.text]:
        raise UserError(f"--text {cfg.text[:80]}: must be 1 to {LONGEST} characters without spaces")
    if len(cfg.seal) > MOST or len(cfg.seal.split()) > 1:
        raise UserError(f"--seal {cfg.seal[:80]}: must be at most {MOST} characters without spaces")


def read_painting(cfg: PaintConfig) -> np.ndarray:
    """uint8 [3, H, W], painted or read. Raises DataError that names the file."""
    if cfg.onto == "landscape":
        return landscape(cfg.height, cfg.width, cfg.seed)
    return read_whole(cfg.onto, 3).numpy()


def seal_of(cfg: PaintConfig) -> Seal | None:
    """The seal that is asked for; its cut goes by the seed."""
    if not cfg.seal:
        return None
    cut = CUTS[cfg.seed % len(CUTS)] if cfg.cut == "auto" else cfg.cut
    return Seal([inks[-1] for inks in inks_of(cfg.run, cfg.seal, cfg.hand, cfg.seed + 1)], cut)


# ---------------------------------------------------------------------------------------------- who writes it


def inks_of(run: str, text: str, hand: str, seed: int) -> list[list[np.ndarray]]:
    """Of each character its inks float32 [h, w] as they grow, the last being all of it. Raises UserError."""
    if strokes_model_of(run):
        characters = written(load_run(run), text, hand, seed)
        return [writing(character, WRITTEN, seed + k)[::-EVERY][::-1]
                for k, character in enumerate(characters)]
    if model_of(run):
        return [appearing(ink) for ink in drawn_inks(run, text, hand, seed)]
    if (Path(run) / "captions.csv").is_file():
        return [appearing(ink) for ink in pictured_inks(Path(run), text, hand)]
    raise UserError(f"--run {run}: neither a run of train.train_diffusion nor a folder of pictures with "
                    f"captions.csv; {command('train_diffusion', out=run)} trains one")


def drawn_inks(run: str, text: str, hand: str, seed: int) -> list[np.ndarray]:
    """The characters as a diffusion model draws them, each time anew."""
    model = optimize(TextToImage.load(run))
    prompts = [f"{char} {hand}".strip() for char in text]
    if unknown := sorted({word for prompt in prompts for word in model.unknown_words(prompt)}):
        raise UserError(f"--run {run} never saw {'、'.join(unknown)}; it knows "
                        f"{' '.join(list(model.known_words())[:40])}")
    images = model.sample(prompts, seed)
    return list(((1 - images.mean(1)) / 2).clamp(0, 1).numpy().astype(np.float32))


def pictured_inks(folder: Path, text: str, hand: str) -> list[np.ndarray]:
    """The characters from a folder of black on white pictures with captions such as 春 楷書."""
    files = {entry.caption: entry.path for entry in list_captioned(folder)}
    inks = []
    for char in text:
        if (path := files.get(f"{char} {hand}".strip())) is None:
            raise UserError(f"--run {folder}: no picture of {char} {hand}; there are "
                            f"{' '.join(list(files)[:40])}")
        inks.append(1 - read_whole(path, 1)[0].float().numpy() / 255)
    return inks


def appearing(ink: np.ndarray) -> list[np.ndarray]:
    """An ink [h, w] in steps, from upper left to lower right: for those whose strokes are not known."""
    h, w = ink.shape
    along = np.linspace(0, 0.7, h)[:, None] + np.linspace(0, 0.3, w)[None]
    return [ink * np.clip((at - along) * 6, 0, 1) for at in np.linspace(0.1, 1.17, STEPS)[:-1]] + [ink]


# ---------------------------------------------------------------------------------------------- the animation


def animation(painting: np.ndarray, sheet: Sheet, stages: list[list[np.ndarray]]) -> bytes:
    """A GIF as wide as GIF_BYTES allow: ink is only ever added; the last frame is the finished picture."""
    for width in (w for w in (*GIF_WIDTHS, 32) if w <= max(painting.shape[2], 32)):
        seal = sheet.stamp and Box(*(round(n * width / painting.shape[2]) for n in sheet.stamp))
        data = encoded(*frames_of(painting, sheet, stages, width), seal)
        if len(data) <= GIF_BYTES:
            break
    return data


def encoded(bare: np.ndarray, whole: np.ndarray, shown: list[np.ndarray], seal: Box | None) -> bytes:
    """The bytes of the GIF. bare, whole uint8 [h, w, 3] and shown: of `frames_of`; seal: its place there."""
    palette = palette_of(bare, whole, seal)
    colours = np.asarray(palette.getpalette()[:3 * GIF_COLOURS], float).reshape(-1, 3) @ (0.299, 0.587, 0.114)

    def indices(rgb: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(rgb).quantize(palette=palette, dither=Image.Dither.NONE))

    now, last = indices(bare), indices(whole)
    frames = [now]
    for share in shown[:-1]:
        mixed = indices((bare + (whole.astype(float) - bare) * share[..., None] + 0.5).astype(np.uint8))
        darker = (colours[mixed] < colours[now]) & (colours[mixed] >= colours[last])
        now = np.where(darker, mixed, now).astype(np.uint8)
        frames.append(now)
    return as_gif([*frames, last], palette)


def palette_of(bare: np.ndarray, whole: np.ndarray, seal: Box | None) -> Image.Image:
    """Colours for both pictures, with some set apart for the seal, which is small."""
    parts = [bare, whole]
    if seal:
        red = Image.fromarray(whole).crop((seal.x, seal.y, seal.x + seal.side, seal.y + seal.side))
        parts.append(np.asarray(red.resize((bare.shape[1], max(1, bare.shape[0] // 6)))))
    return Image.fromarray(np.concatenate(parts)).quantize(GIF_COLOURS, Image.Quantize.MEDIANCUT,
                                                           dither=Image.Dither.NONE)


def as_gif(frames: list[np.ndarray], palette: Image.Image) -> bytes:
    """Frames of palette indices uint8 [h, w] as a GIF that plays again and again."""
    images = []
    for frame in frames:
        image = Image.fromarray(frame)
        image.putpalette(palette.getpalette())
        images.append(image)
    file = io.BytesIO()
    times = [FRAME_MS] * (len(images) - 1) + [LAST_MS]
    images[0].save(file, "gif", save_all=True, append_images=images[1:], duration=times, loop=0, disposal=1)
    return file.getvalue()


if __name__ == "__main__":
    start(lambda: main(parse_flags(PaintConfig, __doc__.split("\n\n")[0])))
