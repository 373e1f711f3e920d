"""An independent judge: names the character that a grey picture shows, or says that it shows none.

Read after data/make_calligraphy.py, whose fonts it learns from. Measures how legible generated pictures are.
    python -m train.judge --fonts FONTS --out out/judge [--fetch]       trains, prints how good it is
    python -m train.judge --run out/judge --pictures DIR [--expect 春]  names pictures
The class "none" is learnt from noise, blots, mixtures, broken glyphs: a judge without it is sure of noise.
Shapes: N pictures, 1 channel, 64x64, -1 ink .. 1 paper.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .data.augment import jitter
from .data.image import SUFFIXES, read_image, to_float
from .data.table import list_captioned
from .errors import UserError
from .glyphs import NONE, SIZE, GlyphClassifier, classify_images, load_judge, save_judge
from .run.cli import MAX_SEED, check_flags, flag, parse_flags, start
from .run.folder import make_folder
from .run.log import Progress

INK_SIDE = 0.84     # the long side of the ink, as a share of the picture: data/make_calligraphy.py's FILL
LOOK_ALIKES = ("泰奏秦舂奉眷椿捧拳券卷養棒青湖漢瞞滴漏滯沛浦湧渦備兩港濕灌潮演漫澗波海清朝幹韓乹"
               "乞吃戟斡翰乳亂軋草卓靴神伸坡坦埋申土地坪坊均坑塊堆埠紳呻暢押抽甲由田軸")
COMMON = ("一上下不中之也了交人他以但何來信個出到前去可同和問因國在多大天好如子學定家對小就工年後得心"
          "想意成我所提文新於是時最會有本果機沒法為無然現生用當發的看真知章而能自要訊請這過道還那都電"
          "麼三且世並主久乎事二五些什今代件任似位住作使便保修候做傳像價元兄先光兒入全八公六共其再凰分"
          "別利制則力功加動務化北區十南即卻原參又及友反取受口叫台各合名向否告呵命品員喜單器四回圖型城"
          "基報場士外夢太央失")
CHARACTERS = "春滿乾坤" + LOOK_ALIKES + COMMON      # 268


@dataclass(frozen=True)
class JudgeConfig:
    """The flags of train.judge."""

    out: str = flag("out/judge", "folder for the trained judge")
    fonts: str = flag("out/fonts", "folder with the fonts")
    fetch: bool = flag(False, "download the fonts that are missing")
    leave_out: str = flag("ukai,seto,zen-antique", "hands kept for the test, never trained on, with commas")
    steps: int = flag(1000, "optimizer steps", at_least=10)
    batch: int = flag(192, "glyphs a step; a quarter as many pictures of nothing come on top", at_least=8)
    seed: int = flag(0, "one seed, one judge", at_least=0, at_most=MAX_SEED)
    overwrite: bool = flag(False, "train anew where --out holds a judge")
    run: str = flag("", "instead of training: a trained judge to use")
    pictures: str = flag("", "with --run: the folder of pictures to name")
    expect: str = flag("", "with --run: what all of them should show")


# ---------------------------------------------------------------------------------------- what it learns from

def glyphs(fonts: list, characters: str = CHARACTERS) -> tuple[Tensor, Tensor, Tensor]:
    """Renders all: pictures uint8 [M, 1, 64, 64], the index of each one's character [M], of its hand [M]."""
    from data.make_calligraphy import draw

    found = []
    for hand, (font, path) in enumerate(fonts):
        for index, character in enumerate(characters):
            glyph = draw(path, character, 4 * SIZE, font.index)
            if glyph is not None:       # blank, or not in this font
                found.append((_fit(glyph[0].crop(glyph[1])), index, hand))
    pictures, labels, hands = zip(*found, strict=True)
    return torch.stack(pictures), torch.tensor(labels), torch.tensor(hands)


def _fit(ink: Image.Image) -> Tensor:
    scale = INK_SIDE * SIZE / max(ink.size)
    ink = ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.BOX)
    paper = Image.new("L", (SIZE, SIZE), 0)
    paper.paste(ink, ((SIZE - ink.width) // 2, (SIZE - ink.height) // 2))
    return 255 - torch.frombuffer(bytearray(paper.tobytes()), dtype=torch.uint8).reshape(1, SIZE, SIZE)


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """One number between low and high for each of n pictures, [N, 1, 1, 1]."""
    return torch.rand(n, 1, 1, 1, generator=generator) * (high - low) + low


def smooth_noise(n: int, channels: int, cells: int, generator: torch.Generator) -> Tensor:
    """[N, channels, 64, 64], a normal value in each of cells x cells points and smooth in between."""
    coarse = torch.randn(n, channels, cells, cells, generator=generator)
    return F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=False)


def augment(x: Tensor, g: torch.Generator) -> Tensor:
    """Other slant, size, place, stroke width, wobble, sharpness, paper and noise for each picture."""
    n = len(x)
    x = jitter(x, g, degrees=8, translate=0.06, scale=0.18, shear=10)
    cells = int(torch.randint(3, 7, (1,), generator=g))
    bend = smooth_noise(n, 2, cells, g).permute(0, 2, 3, 1) * uniform(n, 0, 0.05, g)        # [N, 64, 64, 2]
    grid = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), list(x.shape), align_corners=False) + bend
    x = F.grid_sample(x - 1, grid, align_corners=False) + 1
    width = uniform(n, -0.9, 0.9, g)                            # below 0: thicker strokes, above: thinner
    thick, thin = -F.max_pool2d(-x, 3, 1, 1), F.max_pool2d(x, 3, 1, 1)
    x = x + (thick - x) * (-width).clamp(min=0) + (thin - x) * width.clamp(min=0) * 0.7
    x = torch.lerp(x, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), uniform(n, 0, 1, g))
    ink, paper = uniform(n, -1, -0.3, g), uniform(n, 0.6, 1, g)
    x = ink + (paper - ink) * (x + 1) / 2
    x = x + torch.randn(x.shape, generator=g) * uniform(n, -0.15, 0.25, g).clamp(min=0)     # a third without
    return x.clamp(-1, 1)


KINDS = ("noise", "clouds", "blots", "blank", "mean of two", "two overlaid", "half erased", "scrambled")


def nothing(a: Tensor, b: Tensor, g: torch.Generator) -> Tensor:
    """Pictures [N, 1, 64, 64] of no character, made from two batches of glyphs: row i is of KINDS[i % 8]."""
    n, kind = len(a), torch.arange(len(a)) % len(KINDS)
    cells = int(torch.randint(4, 14, (1,), generator=g))
    cloud, noise = smooth_noise(n, 1, cells, g), torch.randn(a.shape, generator=g)
    angle = uniform(n, 0, 6.283, g)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, SIZE)] * 2, indexing="ij")
    erased = x * angle.cos() + y * angle.sin() > uniform(n, -0.2, 0.1, g)
    made = torch.stack([
        noise * uniform(n, 0.2, 1.5, g) + uniform(n, -0.5, 1, g),
        cloud * uniform(n, 0.2, 1.0, g) + uniform(n, -0.5, 1, g),
        torch.tanh((cloud + uniform(n, 0, 1, g)) * 8),
        uniform(n, -1, 1, g).expand_as(a),
        (a + b) / 2,
        torch.minimum(a, b),
        torch.where(erased, 1.0, a),
        scramble(a, 4 if torch.rand((), generator=g) < 0.5 else 3, g),
    ])                                                                                  # [8, N, 1, 64, 64]
    return made[kind, torch.arange(n)].clamp(-1, 1)


def scramble(x: Tensor, parts: int, g: torch.Generator) -> Tensor:
    """Cuts each picture into parts x parts tiles and shuffles them (the same way for all in the batch)."""
    side = -(-SIZE // parts)
    tiles = F.unfold(F.pad(x, [0, side * parts - SIZE] * 2, value=1.0), side, stride=side)
    tiles = tiles[..., torch.randperm(parts * parts, generator=g)]
    return F.fold(tiles, side * parts, side, stride=side)[..., :SIZE, :SIZE]


# --------------------------------------------------------------------------------------- training and testing

def train(model: GlyphClassifier, pictures: Tensor, labels: Tensor, cfg: JudgeConfig) -> None:
    """pictures uint8 [M, 1, 64, 64], labels [M]: AdamW, its rate falls on a cosine to 1 %."""
    g = torch.Generator().manual_seed(cfg.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 50) * (0.505 + 0.495 * math.cos(math.pi * s / cfg.steps)))
    progress = Progress(cfg.steps)
    model.train()
    for step in range(cfg.steps):
        parts = (cfg.batch, cfg.batch // 4, cfg.batch // 4)
        pick = torch.randint(len(labels), (sum(parts),), generator=g)
        real, a, b = to_float(pictures[pick]).split(parts)
        x = augment(torch.cat([real, nothing(a, b, g)]), g)
        y = torch.cat([labels[pick[:cfg.batch]], torch.full([len(a)], len(model.names) - 1)])
        loss = F.cross_entropy(model(x), y, label_smoothing=0.05)
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} at step {step}: nothing saved")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.show(step + 1, f"loss {loss.item():.3f}")
    progress.close()


def share(model: GlyphClassifier, pictures: Tensor, names: list[str]) -> float:
    """The share of pictures that get their name."""
    found, _ = classify_images(model, pictures)
    return sum(a == b for a, b in zip(found, names, strict=True)) / len(names)


def measure(model: GlyphClassifier, pictures: Tensor, labels: Tensor, hands: Tensor, styles: list[str],
            left_out: set[str]) -> dict:
    """What the judge gets right on new changes and on hands that it never saw; prints it, and returns it."""
    g = torch.Generator().manual_seed(987_654_321)      # no augmentation of the training
    clean = to_float(pictures)
    names = [model.names[i] for i in labels.tolist()]
    report = {}
    for index, style in enumerate(styles):
        rows = (hands == index).nonzero()[:, 0]
        mine = [names[i] for i in rows.tolist()]
        key = f"hand {style}, {'never trained on' if style in left_out else 'trained on'}"
        report[key] = [share(model, x, mine) for x in (clean[rows], augment(clean[rows], g))]
    for kind in ("trained on", "never trained on"):
        rows = [value for key, value in report.items() if key.endswith(f", {kind}")]
        if rows:
            report[f"all hands {kind}"] = torch.tensor(rows).mean(0).tolist()
    a, b = clean[torch.randint(len(clean), (2, 2048), generator=g)]
    spoilt = nothing(a, b, g)
    for index, kind in enumerate(KINDS):
        rows = spoilt[index::len(KINDS)]
        none = [NONE] * len(rows)
        report[f"{kind}: seen as none"] = [share(model, x, none) for x in (rows, augment(rows, g))]
    print(f"{'right, of clean pictures and of changed ones':50} {'clean':>8} {'changed':>8}")
    for key, (plain, changed) in report.items():
        print(f"{key:50} {plain:8.1%} {changed:8.1%}")
    return report


def load_fonts(cfg: JudgeConfig) -> list:
    """The hands to learn from, each once. Raises UserError where a font is missing,
    and outside a checkout."""
    try:
        from data.make_calligraphy import FONTS, MORE_FONTS, MakerError, distinct, locate
    except ModuleNotFoundError:
        raise UserError("the judge learns from the fonts that data/make_calligraphy.py names: train it in a "
                        "checkout of the project") from None
    try:
        return distinct(locate(FONTS + MORE_FONTS, Path(cfg.fonts), cfg.fetch), CHARACTERS)
    except MakerError as error:
        raise UserError(str(error)) from None


def fit(cfg: JudgeConfig) -> None:
    """Trains a judge, measures it and saves it."""
    found = [name for name in ("judge.pt", "judge.json") if (Path(cfg.out) / name).exists()]
    if found and not cfg.overwrite:
        raise UserError(f"--out {cfg.out}: holds a judge already ({found[0]}); --overwrite trains another in "
                        "its place, another --out leaves it as it is")
    start, out, left_out = time.monotonic(), make_folder(cfg.out), set(filter(None, cfg.leave_out.split(",")))
    fonts = load_fonts(cfg)
    styles = [font.style for font, _ in fonts]
    if left_out - set(styles):
        raise UserError(f"--leave-out {cfg.leave_out}: of {' '.join(styles)}")
    torch.manual_seed(cfg.seed)
    pictures, labels, hands = glyphs(fonts)
    print(f"{len(pictures)} glyphs of {len(CHARACTERS)} characters in {len(fonts)} hands, {len(left_out)} "
          f"of these left out of the training ({time.monotonic() - start:.0f} s)", flush=True)
    known = torch.tensor([style not in left_out for style in styles])[hands]
    model = GlyphClassifier(list(CHARACTERS))
    train(model, pictures[known], labels[known], cfg)
    save_judge(model, out, measure(model, pictures, labels, hands, styles, left_out))
    print(f"{out}: trained in {time.monotonic() - start:.0f} s")


# -------------------------------------------------------------------------------------------- naming pictures

def classify(cfg: JudgeConfig) -> None:
    """Names each picture below a folder; it should show --expect, or its caption's first character."""
    model, folder = load_judge(cfg.run), Path(cfg.pictures)
    flat = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES and p.stem != "grid")
    if flat and not (folder / "captions.csv").exists():         # what train.sample writes
        expected = [(path, cfg.expect) for path in flat]
    else:
        expected = [(entry.path, cfg.expect or entry.caption[0]) for entry in list_captioned(folder)]
    pictures = to_float(torch.stack([read_image(path, SIZE, 1) for path, _ in expected]))
    names, probabilities = classify_images(model, pictures)
    right = 0
    for (path, wanted), name, p in zip(expected, names, probabilities.tolist(), strict=True):
        right += name == wanted
        note = "" if name == wanted or not wanted else f"  not {wanted}"
        print(f"{path.relative_to(folder)}  {name}  {p:.3f}{note}")
    if any(wanted for _, wanted in expected):
        print(f"named right: {right} of {len(expected)} = {right / len(expected):.1%}")


def main(cfg: JudgeConfig) -> None:
    """Trains a judge or, with --run, names pictures with one.

    Raises UserError, and DataError for pictures that cannot be read.
    """
    check_flags(cfg)
    if bool(cfg.run) != bool(cfg.pictures):
        raise UserError("--run and --pictures go together: a trained judge, and what it shall name")
    if cfg.expect and cfg.expect not in CHARACTERS:
        raise UserError(f"--expect {cfg.expect}: not one of the {len(CHARACTERS)} characters that are judged")
    classify(cfg) if cfg.run else fit(cfg)


if __name__ == "__main__":
    start(lambda: main(parse_flags(JudgeConfig, __doc__.split("\n\n")[0])))
