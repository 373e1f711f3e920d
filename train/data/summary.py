"""What a folder of pictures holds, before training: sizes, colours, captions, what is left out.

Read after folder.py; next train_diffusion.py.
Cheap at any size: the names of all files are counted; of the pictures at most LOOK, evenly spaced, are
opened, PIXELS decoded to see their colours and BYTES read to find copies. Nothing is drawn at random, and no
broken file raises.
"""

import hashlib
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops

from miniclip.picture import ImageError, picture_file

from .image import SUFFIXES, on_white

LOOK = 2_000                # pictures opened
PIXELS = 24 * 2**20         # decoded to see whether they are in colour
BYTES = 128 * 2**20         # read to find copies
NAMES = 500_000             # files counted
UNREAD = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".ico", ".pdf", ".eps", ".dng",
          ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".raw"} - SUFFIXES    # none that is read safely


class Look(NamedTuple):
    """What was seen of one file; `bytes` is its length."""

    file: str
    bytes: int
    width: int = 0          # 0: cannot be read
    height: int = 0
    colour: bool | None = None                  # None: not decoded
    cost: int = 0                               # pixels decoded for that
    problem: str = ""


def summary(root, files: list[str], captions: dict[str, list[str]], size: int, channels: int) -> list[str]:
    """Lines to print. `files`: the pictures to train on; `captions`: of each column, as many."""
    different = list(dict.fromkeys(files))
    count = min(LOOK, len(different))
    looks = look([different[i * len(different) // count] for i in range(count)])
    rows = f" in {len(files):,} rows" if len(files) > len(different) else ""
    among = (f"; sizes, colours, copies and broken files are those of {count:,} of them, evenly spaced"
             if count < len(different) else "")
    lines = [*sizes(looks, size), *colours(looks, channels), *copies(looks, root), *broken(looks),
             *left_out(Path(root), different),
             *(caption_counts(column, texts) for column, texts in captions.items())]
    return [f"data: {pictures(len(different))}{rows}{among}",
            *("  " + " ".join(line.split()) for line in lines)]


def look(files: list[str]) -> list[Look]:
    """At each of them, and at their colours as long as PIXELS last."""
    left, looks = PIXELS, {}
    # golden section: the first are spread out
    for i in sorted(range(len(files)), key=lambda i: i * 0.618034 % 1):
        looks[i] = look_at(files[i], left)
        left -= looks[i].cost
    return [looks[i] for i in range(len(files))]


def look_at(file: str, pixels: int) -> Look:
    """Decodes it if that costs no more than so many pixels; else only its header is read."""
    length = os.path.getsize(file) if os.path.isfile(file) else 0
    try:
        with picture_file(file) as image:
            width, height = image.size
            cost = width * height // (4 if image.format == "JPEG" else 1)
            if cost > pixels:
                return Look(file, length, width, height)
            return Look(file, length, width, height, in_colour(image), cost)
    except ImageError as error:
        return Look(file, length, problem=str(error).removeprefix(f"{file}: "))


def in_colour(image: Image.Image) -> bool:
    """Whether red, green and blue differ clearly in more than one pixel of a thousand: grey scans may be
    RGB."""
    if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
        return False
    image.draft("RGB", (256, 256))              # a large JPEG is decoded smaller
    red, green, blue = on_white(image, 3).split()
    apart = ImageChops.lighter(ImageChops.difference(red, green), ImageChops.difference(green, blue))
    return sum(apart.histogram()[32:]) > apart.width * apart.height / 1000


# -------------------------------------------------------------------------------------------------- the lines


def sizes(looks: list[Look], size: int) -> Iterator[str]:
    """The range of sizes in pixels; warns of images to be enlarged more than twice or longer than 2 : 1."""
    seen = [(p.width, p.height) for p in looks if p.width]
    if not seen:
        return
    least, most = min(seen, key=lambda s: s[0] * s[1]), max(seen, key=lambda s: s[0] * s[1])
    spread = f"{least[0]} x {least[1]}" + (f" to {most[0]} x {most[1]}" if most != least else "")
    sides = ", all of each, with white at the sides" if any(w != h for w, h in seen) else ""
    yield f"sizes: {spread}; read as {size} x {size}{sides}"
    if small := sum(2 * max(s) < size for s in seen):
        yield (f"warning: {pictures(small)} to be enlarged more than twice, and so blurred; "
               "try a smaller --size")
    if long := sum(max(s) > 2 * min(s) for s in seen):
        yield (f"warning: {pictures(long)} with one side more than twice as long as the other: what the "
               "model sees is mostly white; cut to what matters")


def colours(looks: list[Look], channels: int) -> Iterator[str]:
    """How many are in colour and how many grey; warns where colours would be lost."""
    seen = [p.colour for p in looks if p.colour is not None]
    if not seen:
        return
    among = f" ({len(seen):,} decoded)" if len(seen) < sum(not p.problem for p in looks) else ""
    yield f"colours: {sum(seen):,} in colour, {len(seen) - sum(seen):,} grey{among}"
    if channels == 1 and any(seen):
        yield f"warning: {pictures(sum(seen))} in colour, to be trained as grey; --channels 3 keeps colours"


def copies(looks: list[Look], root) -> Iterator[str]:
    """Warns of files that equal another; names the first three, relative to root."""
    twins = list(same_bytes(looks))
    if twins:
        pairs = [" = ".join(Path(file).relative_to(root).as_posix() for file in pair) for pair in twins[:3]]
        names = ", ".join([*pairs, *["..."] * (len(twins) > 3)])
        yield f"warning: {pictures(len(twins))} the same as another, byte for byte: {names}"


def same_bytes(looks: list[Look]) -> Iterator[tuple[str, str]]:
    """(a file, the first that is equal to it). Only files of one length are read, as long as BYTES last."""
    lengths, left = defaultdict(list), BYTES
    for p in looks:
        lengths[p.bytes].append(p.file)
    for length, files in sorted(lengths.items()):
        first: dict[bytes, str] = {}
        for file in files if len(files) > 1 and length else ():
            if (left := left - length) < 0:
                return
            try:
                key = hashlib.sha1(Path(file).read_bytes(), usedforsecurity=False).digest()
            except OSError:
                continue
            if first.setdefault(key, file) != file:
                yield file, first[key]


def broken(looks: list[Look]) -> Iterator[str]:
    """Warns of files that cannot be read; names the first, with its problem."""
    if bad := [p for p in looks if p.problem]:
        yield f"warning: {pictures(len(bad))} cannot be read, the first: {bad[0].file} ({bad[0].problem})"


def left_out(root: Path, files: list[str]) -> Iterator[str]:
    """What lies in the folder and is no picture, or not in the table, by the endings of the names."""
    used, found, seen = {_key(file) for file in files}, Counter(), 0
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and _key(os.path.join(folder, name)) not in used:
                found[os.path.splitext(name)[1].lower() or "without ending"] += 1
        if (seen := seen + len(names)) > NAMES:
            break
    if (root / "captions.csv").is_file():
        found[".csv"] -= 1
    counts = [f"{n:,} {ending}{' not in captions.csv' if ending in SUFFIXES else ''}"
              for ending, n in found.most_common() if n > 0]
    if counts:
        among = f" (of the first {seen:,} files)" if seen > NAMES else ""
        yield f"left out: {', '.join(counts[:8])}{', ...' * (len(counts) > 8)}{among}"
    if unread := [f"{n:,} {ending}" for ending, n in found.most_common() if ending in UNREAD]:
        yield f"warning: {', '.join(unread)} cannot be read; save as JPEG or PNG"


def _key(file: str) -> str:
    """One spelling of a path: macOS writes é with two code points, Windows knows no capitals."""
    return unicodedata.normalize("NFC", os.path.normcase(os.path.normpath(file) if ".." in file else file))


def caption_counts(column: str, texts: list[str]) -> str:
    """How many captions, and which are the most and the least frequent."""
    (most, n), *_, (least, m) = [*(counts := Counter(texts).most_common()), *counts[-1:]]
    often = f"most often {short(most)} ({n:,}), least often {short(least)} ({m:,})"
    each = "each once" if n == 1 else f"each {n:,} times"
    return f"captions ({column}): {len(counts):,} different, {each if n == m else often}"


def pictures(n: int) -> str:
    """1 picture, 1,585 pictures."""
    return f"{n:,} picture{'s' * (n != 1)}"


def short(text: str) -> str:
    """In quotes, cut to 40 characters."""
    return repr(text if len(text) <= 40 else text[:39] + "…")
