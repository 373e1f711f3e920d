"""Renders calligraphy from fonts: the 20 committed pictures again, or any other characters and hands.

Read after: nothing. train/data/ reads what this writes (class folders and a captions.csv).
    python -m data.make_calligraphy --out DIR --fonts FONTS --fetch    the committed 20, fonts fetched first
    python -m data.make_calligraphy --out DIR --fonts FONTS --common 1000 --size 64
Only --fetch touches the network, through apt-get and npm. Without it, a missing font is one clear line.
"""

import argparse
import csv
import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.packages import MakerError, members, read_bz2

OVERSAMPLE = 4      # drawn this much larger and averaged down: smoother edges than the rasteriser's own
FILL = 0.84         # the long side of the ink, as a share of the picture
EM = 0.92           # the em, as a share of the picture, where sizes must stay comparable (一 beside 龜)
INK = 127           # a pixel is ink above this: faint antialiasing must not decide where the middle is
SAME = 0.15         # hands that differ by less are one: editions of a font by 0 to 0.14, others from 0.23
LARGE_SET = 64      # from so many characters on, the em is fixed
CHARACTERS = "春滿乾坤"
FREQUENCIES = "Unihan_DictionaryLikeData.txt.bz2"


def start(main: Callable[[], int], *errors: type[Exception]) -> NoReturn:
    """Runs a maker; what may go wrong, and `errors`, ends it with one line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # Chinese on any Windows console
    try:
        sys.exit(main())
    except (MakerError, OSError, subprocess.TimeoutExpired, *errors) as error:
        sys.exit(f"error: {error}")


class Font(NamedTuple):
    """A hand: the file that draws it, where that comes from, and the names its pictures go by."""

    style: str      # file name of the pictures
    hand: str       # its name in a caption
    file: str       # looked for anywhere below the fonts folder
    package: str    # "Debian NAME VERSION" or "npm NAME VERSION", the version that was tried
    licence: str
    index: int = 0  # of the face in a .ttc


def _fontsource(name: str, version: str, subset: str = "japanese", hand: str = "") -> Font:
    """npm packages hold one file with the whole subset beside a hundred slices of it: take the whole one."""
    file, package = f"{name}-{subset}-400-normal.woff2", f"npm @fontsource/{name} {version}"
    return Font(name, hand or name, file, package, "OFL-1.1")


KOUZAN, SOSEKI = "Debian fonts-kouzan-mouhitsu 20170411-3", "Debian fonts-aoyagi-soseki 20070207-17"
FONTS = [
    Font("kouzan-kaisho", "楷書", "kouzan-mouhitsu.ttf", KOUZAN, "public-domain"),
    Font("kouzan-gyosho", "行書", "kouzan-mouhitsu-gyosho.ttf", KOUZAN, "public-domain"),
    Font("kouzan-sousho", "草書", "KouzanBrushFontSousyo.ttf", KOUZAN, "public-domain"),
    Font("aoyagi-soseki", "行楷", "aoyagi-soseki.ttf", SOSEKI, "public-domain"),
    _fontsource("yuji-syuku", "5.3.0", hand="重楷"),
]
# More hands, for a judge that must know a character in any of them (train/judge.py); not committed.
# Left out, as no hands of their own: yuji-boku and yuji-mai have the kanji of yuji-syuku; those of Debian's
# fonts-arphic-bkai00mp, fonts-arphic-bsmi00lp and fonts-cwtex-kai are nearly those of ukai, uming and ukai;
# fonts-aoyagi-kouzan-t is by the writer of kouzan-kaisho.
MORE_FONTS = [
    Font("ukai", "ukai", "ukai.ttc", "Debian fonts-arphic-ukai 0.2.20080216.2-5", "Arphic-PL", 2),
    Font("uming", "uming", "uming.ttc", "Debian fonts-arphic-uming 0.2.20080216.2-11", "Arphic-PL", 2),
    Font("cwtex-fangsong", "cwtex-fangsong", "cwfs.ttf", "Debian fonts-cwtex-fs 1.0-4", "GPL-2+"),
    Font("cwtex-ming", "cwtex-ming", "cwming.ttf", "Debian fonts-cwtex-ming 1.0-4", "GPL-2+"),
    Font("seto", "seto", "setofont.ttf", "Debian fonts-seto 6.20-8", "OFL-1.1"),
    Font("yozfont", "yozfont", "YOzBE_.ttf", "Debian fonts-yozvox-yozfont-edu 14.04-2", "OFL-1.1"),
    Font("oradano", "oradano", "OradanoGSRR.ttf", "Debian fonts-oradano-mincho-gsrr 0.2018-3", "custom"),
    _fontsource("lxgw-wenkai-tc", "5.3.0", "chinese-traditional"),
    _fontsource("klee-one", "5.3.0"),
    _fontsource("zen-antique", "5.3.0"),
    _fontsource("kaisei-tokumin", "5.3.0"),
    _fontsource("hina-mincho", "5.2.8"),
    _fontsource("yusei-magic", "5.3.0"),
    _fontsource("yomogi", "5.3.0"),
    _fontsource("zen-kurenaido", "5.3.0"),
]


# --------------------------------------------------------------------------------- finding and fetching fonts

def find(folder: Path, name: str, how: str) -> Path:
    """The file called `name` anywhere below `folder`; MakerError that says how to get it."""
    found = sorted(path for path in Path(folder).rglob(name) if path.is_file())
    if not found:
        raise MakerError(f"{name}: not below {folder}; it comes with {how}: add --fetch, or put it there")
    return found[0]


def fetch(package: str, names: list[str], folder: Path):
    """Downloads `package` and leaves its files `names` in `folder`; does nothing for those already there."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in names if not any(folder.rglob(name))]
    if not names:
        return
    kind, package, version = package.split()
    print(f"fetching {package} ({kind})", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        (_unpack_debian if kind == "Debian" else _unpack_npm)(package, version, names, Path(scratch), folder)


def run_client(command: list[str], where: Path, package: str):
    """Runs apt-get, dpkg-deb or npm in the folder `where`. Raises MakerError where it is missing or fails,
    and TimeoutExpired after ten minutes."""
    program = shutil.which(command[0])  # also finds npm.cmd on Windows
    if program is None:
        raise MakerError(f"{package}: cannot be fetched, no {command[0]} here; put its files there by hand")
    done = subprocess.run([program, *command[1:]], cwd=where, capture_output=True, timeout=600, check=False,
                          encoding="utf-8", errors="replace")
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise MakerError(f"{package}: {command[0]} failed with {done.returncode}: {reason}")


def _unpack_debian(package: str, version: str, names: list[str], scratch: Path, folder: Path):
    run_client(["apt-get", "download", package], scratch, package)  # unpacked, not installed: needs no root
    run_client(["dpkg-deb", "-x", next(scratch.glob("*.deb")).name, "files"], scratch, package)
    for name in names:
        for path in sorted(scratch.rglob(name))[:1]:
            shutil.copyfile(path, folder / name)


def _unpack_npm(package: str, version: str, names: list[str], scratch: Path, folder: Path):
    # a tarball: no scripts run
    run_client(["npm", "pack", "--silent", f"{package}@{version}"], scratch, package)
    found = members(next(scratch.glob("*.tgz")), lambda inner: inner.rpartition("/")[2] in names)
    for inner, content in found.items():
        (folder / inner.rpartition("/")[2]).write_bytes(content)


# ---------------------------------------------------------------------------------------------------- drawing

@functools.lru_cache(maxsize=64)  # opening a .woff2 means decompressing all of it: 0.1 s
def _face(path: Path, size: float, index: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(os.fspath(path), size, index=index)
    except (OSError, ValueError) as error:
        raise MakerError(f"{path}: not a font that Pillow can open ({error})") from None


@functools.lru_cache(maxsize=64)
def _no_glyph(path: Path, size: float, index: int) -> bytes:
    """What this font draws for a character it lacks: often a box, which is ink. U+10FFFF is in no font."""
    return bytes(_face(path, size, index).getmask("\U0010ffff"))


def draw(path: Path, character: str, size: float, index: int = 0):
    """One character, its em `size` pixels: a mode-L image, ink = 255, and the ink's box; None when blank."""
    face = _face(path, size, index)
    if bytes(face.getmask(character)) == _no_glyph(path, size, index):
        return None
    left, top, right, bottom = face.getbbox(character)
    margin = round(size / 8)  # brush fonts stick out of their own boxes
    width, height = right - left, bottom - top
    if max(width, height) > 8 * size:
        raise MakerError(f"{path}: the glyph of {character!r} is {width}x{height} pixels at an em of {size}")
    image = Image.new("L", (width + 2 * margin, height + 2 * margin), 0)
    ImageDraw.Draw(image).text((margin - left, margin - top), character, font=face, fill=255)
    # a font may map a character to an empty glyph: half of those in the Kouzan fonts are
    box = image.point(lambda value: 255 * (value > INK)).getbbox()
    return (image, box) if box else None


def render(path: Path, character: str, size: int = 128, fixed_em: bool = False, index: int = 0):
    """uint8 [size, size], black on white paper, the ink's box in the middle; None when the glyph is blank.

    The ink's long side is FILL of the picture, or with `fixed_em` the em is EM of it, whatever the character.
    """
    canvas = OVERSAMPLE * size
    em = canvas * (EM if fixed_em else FILL)
    glyph = draw(path, character, round(em), index)
    if glyph is None:
        return None
    image, (left, top, right, bottom) = glyph
    long_side = max(right - left, bottom - top)
    if not fixed_em or long_side > canvas:  # draw again, at the size where the ink fits
        fitting = max(1, round(em * FILL * canvas / long_side))
        image, (left, top, right, bottom) = draw(path, character, fitting, index)
    paper = Image.new("L", (canvas, canvas), 0)
    paper.paste(image, (canvas // 2 - (left + right) // 2, canvas // 2 - (top + bottom) // 2))
    ink = np.asarray(paper, dtype=np.float64).reshape(size, OVERSAMPLE, size, OVERSAMPLE).mean((1, 3))
    return np.round(255 - ink).astype(np.uint8)


def distinct(fonts: list[tuple[Font, Path]], characters: str) -> list[tuple[Font, Path]]:
    """Drops, with a line, each font that draws `characters` as an earlier one does: two names, one hand."""
    kept = []
    for font, path in fonts:
        pictures = [render(path, character, 48, False, font.index) for character in characters[:8]]
        twin = next((other.style for other, _, theirs in kept if _difference(pictures, theirs) < SAME), None)
        if twin:
            print(f"skipping {font.style}: draws the same glyphs as {twin}", flush=True)
        else:
            kept.append((font, path, pictures))
    return [(font, path) for font, path, _ in kept]


def _difference(pictures: list, others: list) -> float:
    """The grey that differs, as a share of all ink: median over the characters that both have, 0 to 1."""
    both = [(255.0 - a, 255.0 - b) for a, b in zip(pictures, others, strict=True)
            if a is not None and b is not None]
    return float(np.median([abs(a - b).sum() / np.maximum(a, b).sum() for a, b in both])) if both else 1.0


# ------------------------------------------------------------------------------ which characters, which hands

def common_characters(table: Path) -> list[str]:
    """Unihan's kFrequency: characters of class 1 (commonest in traditional text) to 5, each by code point."""
    rows = [line.split("\t") for line in io.StringIO(read_bz2(table))
            if "\tkFrequency\t" in line and len(line) < 100]
    try:
        ranked = sorted((int(rank), chr(int(code.removeprefix("U+"), 16))) for code, _, rank in rows)
    except (ValueError, OverflowError) as error:
        raise MakerError(f"{table}: not Unihan's table of frequencies ({error})") from None
    return [character for _, character in ranked]


def choose_fonts(names: list[str] | None) -> list[Font]:
    """The five hands, or those named: a style, a hand, or NAME=FILE for a font of the user's own."""
    fonts = []
    for name in names or [font.style for font in FONTS]:
        known = [font for font in FONTS + MORE_FONTS if name in (font.style, font.hand)]
        style, _, file = name.partition("=")
        if not known and not (style and file and Path(style).name == style):
            styles = " ".join(font.style for font in FONTS + MORE_FONTS)
            raise MakerError(f"--hands {name!r}: not one of {styles}, nor NAME=FILE")
        fonts.append(known[0] if known else Font(style, style, file, "", "unknown"))
    return fonts


def locate(fonts: list[Font], folder: Path, download: bool) -> list[tuple[Font, Path]]:
    """Each font with its file; MakerError when one is missing (its download is asked for with --fetch)."""
    if download:
        for package in dict.fromkeys(font.package for font in fonts if font.package):
            fetch(package, [font.file for font in fonts if font.package == package], folder)
    return [(font, find(folder, font.file, font.package) if font.package else Path(font.file))
            for font in fonts]  # one without a package is the user's own file


def write(out: Path, fonts: list[tuple[Font, Path]], characters: list[str], size: int, fixed_em: bool,
          most: int) -> list:
    """Writes out/CHARACTER/STYLE.png and out/captions.csv; at most `most` characters. Returns the rows."""
    rows, done = [], 0
    for character in characters:
        drawn = [(font, render(path, character, size, fixed_em, font.index)) for font, path in fonts]
        blank = [font.style for font, picture in drawn if picture is None]
        if blank:
            print(f"skipping {character}: blank in {' '.join(blank)}", flush=True)
            continue
        (out / character).mkdir(parents=True, exist_ok=True)
        for font, picture in drawn:
            name = f"{character}/{font.style}.png"
            Image.fromarray(picture).save(out / name)
            rows.append([name, f"{character} {font.hand}", character, font.hand, font.style, font.package,
                         font.licence])
        done += 1
        if done == most:
            break
    if not rows:
        raise MakerError("no character has ink in all these hands: nothing written")
    with open(out / "captions.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([["file", "caption", "character", "hand", "style", "package", "licence"], *rows])
    return rows


def arguments(argv=None) -> argparse.Namespace:
    """The flags of data.make_calligraphy; argv None stands for those of the process."""
    parser = argparse.ArgumentParser("python -m data.make_calligraphy", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder to write")
    parser.add_argument("--fonts", type=Path, default=Path("out/fonts"), help="folder with the fonts")
    parser.add_argument("--fetch", action="store_true", help="download what is missing into --fonts")
    parser.add_argument("--characters", default=CHARACTERS, help="what to draw (default: %(default)s)")
    parser.add_argument("--common", type=int, default=0, metavar="N", help="the N commonest in all hands")
    parser.add_argument("--hands", nargs="+", metavar="HAND", help="style, hand or NAME=FILE (default: five)")
    parser.add_argument("--size", type=int, default=128, help="pixels a side (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the known hands, packages and licences")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Writes the pictures and captions.csv, or with --list prints the hands. Returns the exit status.

    Raises MakerError for flags that cannot work, fonts that are missing and glyphs that cannot be drawn.
    """
    args = arguments(argv)
    if args.list:
        print("\n".join(f"{f.style:15} {f.hand:15} {f.package:50} {f.licence}" for f in FONTS + MORE_FONTS))
        return 0
    if args.out is None or not 8 <= args.size <= 1024 or args.common < 0:
        raise MakerError("--out: a folder is needed" if args.out is None else
                         f"--size {args.size}: must be 8 to 1024" if args.common >= 0 else
                         f"--common {args.common}: must not be negative")
    characters = list(dict.fromkeys("".join(args.characters.split())))
    if args.common:
        if args.fetch:
            fetch("Debian unicode-data 15.0.0-1", [FREQUENCIES], args.fonts)
        characters = common_characters(find(args.fonts, FREQUENCIES, "Debian unicode-data"))
    elif not characters or any(not c.isprintable() or c in '/\\.<>:"|?*' for c in characters):
        raise MakerError(f"--characters {args.characters!r}: each must be a character that can name a folder")
    most = args.common or len(characters)
    fonts = distinct(locate(choose_fonts(args.hands), args.fonts, args.fetch), "".join(characters))
    rows = write(args.out, fonts, characters, args.size, most >= LARGE_SET, most)
    print(f"{len(rows)} pictures of {len(rows) // len(fonts)} characters in {len(fonts)} hands: {args.out}")
    return 0


if __name__ == "__main__":
    start(main)
