"""Reads a folder of pictures with captions: the user's own, or one of the sets committed beside this file.

Read after: nothing. Read before: train/train_diffusion.py.
Layouts: root/captions.csv (columns `file` and `caption`), or one folder a class, whose name is the caption.
Everything read here is untrusted: each file is bounded before it is decoded, and fails with one clear line.
Shapes: N pictures, C channels, H height, W width. Values: uint8 0..255 on disk, float32 -1..1 for a model.
"""

import contextlib
import csv
import io
import json
import math
import os
import stat
import unicodedata
import uuid
import warnings
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow knows dozens more, each a parser to attack
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
NO_CAPTIONS = ("file", "image", "artist", "author", "licence", "license", "source", "url", "split", "id")  # of --help
MAX_PIXELS = 64 * 2**20  # of one picture, from its header
MAX_FILE_BYTES = 512 * 2**20
MAX_CSV_BYTES = 64 * 2**20
MAX_PICTURES = 1_000_000
CACHE_BYTES = 1024 * 2**20  # decoded uint8 pictures that one PictureFolder keeps
STACK_BYTES = 4096 * 2**20  # the most that PictureFolder.pictures() builds


class DataError(ValueError):
    """Something is wrong with the user's data; the message is one line that names the file and the value."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split()))  # a file name may hold a newline: still one line


class Picture(NamedTuple):
    path: Path
    caption: str


# ---- which pictures, and their captions

def list_pictures(root, caption_column: str = "caption") -> list[Picture]:
    """The pictures under `root` with their captions, in the order of captions.csv, or sorted by path.

    Captions are NFC-normalised with single spaces. Raises DataError: no folder, no pictures, a bad table.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root}: no such folder")
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder")
    table = root / "captions.csv"
    pictures = _from_csv(root, table, caption_column) if table.exists() else _from_class_folders(root)
    if not pictures:
        raise DataError(f"{table}: no rows below the header" if table.exists() else
                        f"{root}: no pictures ({' '.join(sorted(SUFFIXES))}) in it or its class folders")
    return pictures


def _tidy(text) -> str:
    return " ".join(unicodedata.normalize("NFC", text or "").split())


def columns_of(root) -> list[str]:
    """The names of the columns of root/captions.csv; none if there is no such table."""
    table = Path(root) / "captions.csv"
    return list(_open(table).fieldnames) if table.exists() else []


def caption_columns(root, besides: str = "") -> list[str]:
    """What train_clip takes for captions: `caption`, else every column but `besides` and those of NO_CAPTIONS.

    A folder without a table has `caption` alone. Raises DataError if no column is left.
    """
    there = columns_of(root) or ["caption"]
    if caption := find_column(there, "caption"):
        return [caption]
    others = {name.lower() for name in (*NO_CAPTIONS, besides)}
    found = [name for name in dict.fromkeys(there) if name and "," not in name and name.lower() not in others]
    if not found:
        raise DataError(f"{root}/captions.csv: no column 'caption' or of any other captions; {_known(there)}")
    return found


def find_column(there: list[str], *names: str) -> str | None:
    """The first of the names that is a column: written just so, else in other letters, small or capital."""
    lowered = {column.lower(): column for column in reversed(there)}
    found = [name for name in names if name in there] + [lowered.get(name.lower()) for name in names]
    return next(filter(None, found), None)


def _known(there: list[str]) -> str:
    return f"its columns are: {', '.join(map(repr, there)) or 'none'}"


def _from_csv(root: Path, table: Path, caption_column: str) -> list[Picture]:
    rows = _open(table)
    pictures = []
    try:
        file = find_column(rows.fieldnames, "file", "image")
        if file is None:
            raise DataError(f"{table}: no column 'file'; {_known(rows.fieldnames)}; call the one that names the "
                            "pictures so")
        column = find_column(rows.fieldnames, caption_column)
        if column is None:
            raise DataError(f"{table}: no column {caption_column!r}; {_known(rows.fieldnames)} (training takes any "
                            "of them with --caption-column)")
        for row in rows:
            where = f"{table}, line {rows.line_num}"
            counts = _counts(row, rows, where)
            path = _locate(root, row[file], where)
            caption = _tidy(row[column])
            if not caption:
                raise DataError(f"{where}: empty {column!r} for file {row[file]!r}{counts}")
            pictures.append(Picture(path, caption))
            if len(pictures) > MAX_PICTURES:
                raise DataError(f"{table}: more than {MAX_PICTURES} rows")
    except csv.Error as error:
        raise DataError(f"{table}, line {rows.line_num}: not a CSV ({error})") from None
    return pictures


def _open(table: Path) -> csv.DictReader:
    """The rows of a table, split at commas, or at the semicolons or tabs with which its header has a column `file`."""
    text = _read_text(table)
    try:
        for delimiter in [*DELIMITERS, ","]:            # at last, commas again: the header for the error to show
            rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
            rows.fieldnames = [_tidy(name) for name in rows.fieldnames or []]
            if find_column(rows.fieldnames, "file", "image"):
                break
    except csv.Error as error:
        raise DataError(f"{table}, line 1: not a CSV ({error})") from None
    return rows


def _counts(row: dict, rows: csv.DictReader, where: str) -> str:
    """How many fields a row has, if too few. More than the header has, unless they are blank, are refused: a caption
    that holds the delimiter would lose its end."""
    extra, columns = row.get(None, []), len(rows.fieldnames)
    missing = sum(value is None for value in row.values())
    counts = f"fields in this row: {columns + len(extra) - missing}, columns in the header: {columns}"
    if any(map(_tidy, extra)):
        raise DataError(f"{where}: {counts}; put a caption that holds {DELIMITERS[rows.reader.dialect.delimiter]} "
                        'in double quotes, like "this, here", with no space before them')
    return f" ({counts})" if missing else ""


def _read_text(path: Path) -> str:
    data = _read_bytes(path, MAX_CSV_BYTES)
    try:
        return data.decode("utf-8-sig")  # Excel puts a byte-order mark in front
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.object[error.start]:#04x} at offset {error.start}); "
                        "save it as UTF-8") from None


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):  # a pipe or a device would block or never end
            raise DataError(f"{path}: is not a plain file")
        if info.st_size > limit:
            raise DataError(f"{path}: {info.st_size} bytes, more than the limit of {limit}")
        with open(path, "rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _locate(root: Path, name: str | None, where: str) -> Path:
    """The file a row names, which must exist and lie inside `root`."""
    name = (name or "").strip().replace("\\", "/")  # tables written on Windows
    if not name:
        raise DataError(f"{where}: empty file name")
    if "\0" in name or name.startswith("/") or PureWindowsPath(name).drive:
        raise DataError(f"{where}: file {name!r} must be a path relative to {root}")
    try:
        for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
            path = root / form  # zip files from macOS spell é or が with two code points: try both
            if path.is_file():
                break
        else:
            raise DataError(f"{where}: no such file {name!r} in {root}")
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(f"{where}: file {name!r} lies outside {root}")
    except (OSError, RuntimeError) as error:  # a name too long for the disk, a loop of links
        raise DataError(f"{where}: file {name!r} cannot be read ({type(error).__name__})") from None
    return path


def _from_class_folders(root: Path) -> list[Picture]:
    pictures = []
    for folder, folders, files in os.walk(root):  # does not follow links to folders: no loops
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = Path(folder).relative_to(root).parts
        for name in files:  # ".": macOS leaves ._x.png beside x.png
            if name.startswith(".") or Path(name).suffix.lower() not in SUFFIXES:
                continue
            if not names:
                raise DataError(f"{root / name}: has no caption; put pictures into one folder a class (its "
                                "name is the caption), or add captions.csv with columns 'file' and 'caption'")
            pictures.append(Picture(Path(folder, name), _tidy(" ".join(names))))
        if len(pictures) > MAX_PICTURES:
            raise DataError(f"{root}: more than {MAX_PICTURES} pictures")
    return sorted(pictures, key=lambda p: unicodedata.normalize("NFC", p.path.relative_to(root).as_posix()))


def _indexed(root: Path, caption_column: str, index: Path) -> list[Picture]:
    """list_pictures, which looks at every file, only if the table is not the one that `index` was made of."""
    table = root / "captions.csv"
    if not table.is_file():
        return list_pictures(root, caption_column)
    info = table.stat()
    made_of = [str(root.resolve()), caption_column, info.st_size, info.st_mtime_ns]
    try:
        kept = json.loads(index.read_text(encoding="utf-8"))
        if kept["made_of"] == made_of:
            return [Picture(root / name, caption) for name, caption in kept["pictures"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass                                            # not there yet, or damaged: made again
    pictures = list_pictures(root, caption_column)
    rows = [[p.path.relative_to(root).as_posix(), p.caption] for p in pictures]
    partial = index.with_name(f".{index.name}.{uuid.uuid4().hex[:12]}.tmp")      # other processes write theirs
    try:
        partial.write_text(json.dumps({"made_of": made_of, "pictures": rows}, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, index)
    except OSError:                                     # it only saves time: a full or read-only disk may do without
        with contextlib.suppress(OSError):
            partial.unlink()
    return pictures


# ---- one picture

def read_picture(path, size, channels: int, fit: str = "pad") -> torch.Tensor:
    """Reads one picture as uint8 [channels, H, W]. `size`: H = W, or (H, W); `channels`: 1 grey or 3 RGB.

    Turned as its EXIF says, transparency on white, aspect kept: fit="pad" shows all of it, with white at the
    sides; fit="crop" fills the frame and cuts what is left over. Raises DataError that names the file.
    """
    height, width = _check(size, channels, fit)
    path = Path(path)
    data = _read_bytes(path, MAX_FILE_BYTES)
    if not data:
        raise DataError(f"{path}: the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _on_white(_decode(path, data), channels)
        image = (_pad if fit == "pad" else _crop)(image, height, width)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{path}: too many pixels, more than the limit of {MAX_PIXELS}") from None
    except Image.UnidentifiedImageError:
        raise DataError(f"{path}: not a picture in one of the formats {' '.join(FORMATS)}") from None
    except Exception as error:  # noqa: BLE001  a broken file makes Pillow raise nearly anything
        raise DataError(f"{path}: broken picture ({type(error).__name__}: {str(error)[:120]})") from None
    return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1).contiguous()


def _check(size, channels: int, fit: str) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if not (1 <= height <= 8192 and 1 <= width <= 8192):
        raise DataError(f"size {size}: height and width must be 1 to 8192")
    if channels not in (1, 3):
        raise DataError(f"channels {channels}: must be 1 (grey) or 3 (RGB)")
    if fit not in ("pad", "crop"):
        raise DataError(f"fit {fit!r}: must be 'pad' or 'crop'")
    return height, width


def _decode(path: Path, data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{path}: {image.width}x{image.height} pixels, more than the limit of {MAX_PIXELS}")
    image.load()
    return ImageOps.exif_transpose(image)


def _on_white(image: Image.Image, channels: int) -> Image.Image:
    """Mode L or RGB, 8 bits, whatever came in: 1, P, LA, RGBA, CMYK, I;16, ..."""
    if image.mode.startswith("I"):  # 16-bit grey: convert("L") would clip everything above 255 to white
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        deep = image.mode != "I" or values.max() > 255  # mode I may hold either depth
        image = Image.fromarray((values >> 8 if deep else values).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode in ("PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _pad(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = min(width / image.width, height / image.height)
    w = min(width, max(1, round(image.width * scale)))
    h = min(height, max(1, round(image.height * scale)))
    paper = Image.new(image.mode, (width, height), "white")
    paper.paste(image.resize((w, h), Image.Resampling.BICUBIC), ((width - w) // 2, (height - h) // 2))
    return paper


def _crop(image: Image.Image, height: int, width: int) -> Image.Image:
    scale = min(image.width / width, image.height / height)  # source pixels a target pixel
    w, h = width * scale, height * scale
    left, top = (image.width - w) / 2, (image.height - h) / 2
    # cut and resize in one step: resizing a long thin picture first could need gigabytes
    box = (max(0.0, left), max(0.0, top), min(image.width, left + w), min(image.height, top + h))
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


# ---- all of them, for training

class PictureFolder(torch.utils.data.Dataset):
    """A dataset of (picture float32 [C, H, W] in -1..1 with white = 1, caption).

    `jitter`: None, or a function [1, C, H, W] -> [1, C, H, W]: functools.partial(jitter, generator=g).
    Pictures are decoded once and kept as uint8 until CACHE_BYTES are full.
    `index`: a file to keep the list of a large table in; it is read instead while captions.csv stays as it is.
    `entries`: the list itself; then `root` is not looked at.
    """

    def __init__(self, root, size=64, channels=1, caption_column="caption", fit="pad", jitter=None, index=None,
                 entries: list[Picture] | None = None):
        self.height, self.width = _check(size, channels, fit)
        self.channels, self.fit, self.jitter = channels, fit, jitter
        if entries is None:
            entries = _indexed(Path(root), caption_column, Path(index)) if index else list_pictures(root, caption_column)
        self.entries = entries
        self.captions = [entry.caption for entry in self.entries]
        self._cache: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        picture = self._bytes(range(len(self))[index]).float() / 127.5 - 1                   # [C, H, W]
        if self.jitter is not None:
            picture = self.jitter(picture[None])[0]
        return picture, self.captions[index]

    def _bytes(self, index: int) -> torch.Tensor:
        if index in self._cache:
            return self._cache[index]
        picture = self._decoded(index)
        if (len(self._cache) + 1) * picture.numel() <= CACHE_BYTES:
            self._cache[index] = picture
        return picture

    def _decoded(self, index: int) -> torch.Tensor:
        return read_picture(self.entries[index].path, (self.height, self.width), self.channels, self.fit)

    def pictures(self) -> torch.Tensor:
        """All pictures without jitter, float32 [N, C, H, W] in -1..1."""
        size = 4 * len(self) * self.channels * self.height * self.width
        if size > STACK_BYTES:
            raise DataError(f"{len(self)} pictures need {size} bytes at once, the limit is {STACK_BYTES}: "
                            "train with --stream")
        return torch.stack([self._bytes(index) for index in range(len(self))]).float() / 127.5 - 1


class Stream(torch.utils.data.Dataset):
    """Item s is what step s trains on: (uint8 [rows, C, H, W], their indices [rows], files that are broken).

    Which pictures that are follows from (seed, s) alone: a run goes on in the middle of an epoch, with any number of
    workers, which draw no random numbers. Each epoch is a new shuffle of all. A broken file gives way to the next
    in the list. `rows`: the part of a batch to read. For a DataLoader with batch_size=None.
    """

    def __init__(self, folder: PictureFolder, batch: int, seed: int, steps: int, rows: slice = slice(None)):
        self.folder, self.batch, self.seed, self.steps, self.rows = folder, batch, seed, steps, rows
        self.shuffled: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        places = range(step * self.batch, (step + 1) * self.batch)[self.rows]
        broken: list[str] = []
        found = [self._read(self.index(place), broken) for place in places]
        return torch.stack([picture for picture, _ in found]), torch.tensor([i for _, i in found]), broken

    def index(self, place: int) -> int:
        """The picture at a place of the endless list of shuffled epochs."""
        epoch, place = divmod(place, len(self.folder))
        if self.shuffled[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self.shuffled = epoch, torch.randperm(len(self.folder), generator=generator)
        return int(self.shuffled[1][place])

    def _read(self, index: int, broken: list[str]) -> tuple[torch.Tensor, int]:
        alone = torch.utils.data.get_worker_info() is None         # of many workers none may fill the memory
        read = self.folder._bytes if alone else self.folder._decoded
        for i in range(index, index + min(1000, len(self.folder))):
            i %= len(self.folder)
            try:
                return read(i), i
            except DataError as error:
                broken.append(str(error))
        raise DataError(f"{self.folder.entries[index].path} and the {len(broken) - 1} files after it are all broken")


def jitter(pictures: torch.Tensor, generator: torch.Generator, degrees: float = 3.0, translate: float = 0.03,
           scale: float = 0.05, shear: float = 3.0, flip: bool = False) -> torch.Tensor:
    """A small random affine change, another for each picture [N, C, H, W]; white (1.0) comes in from outside.

    Each amount is drawn evenly from -limit..limit: `degrees` of rotation, `translate` as a share of the side,
    `scale` as the log of the factor, `shear` in degrees. Mirrors half of them only if `flip`: a mirrored
    glyph is no glyph. `generator` is a CPU one, so that one seed gives one result on every device.
    """
    return affine(pictures, torch.rand(len(pictures), 6, generator=generator), degrees, translate, scale, shear, flip)


def affine(pictures: torch.Tensor, u: torch.Tensor, degrees: float = 3.0, translate: float = 0.03,
           scale: float = 0.05, shear: float = 3.0, flip: bool = False) -> torch.Tensor:
    """`jitter` by numbers already drawn, u [N, 6] in 0..1: who holds a part of a batch takes its part of them."""
    n, _, height, width = pictures.shape
    u = u * 2 - 1                                                                            # [N, 6] in -1..1
    angle, slant = (u[:, 0] * math.radians(degrees)), torch.tan(u[:, 1] * math.radians(shear))
    zoom = torch.exp(-u[:, 2] * scale)  # the map goes from output to input: a larger glyph samples closer
    mirror = torch.where(u[:, 5] < 0, -1.0, 1.0) if flip else torch.ones(n)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([                       # rotation @ shear, in units where a pixel is square
        torch.stack([cos * mirror, (cos * slant - sin) * (height / width), u[:, 3] * 2 * translate], dim=1),
        torch.stack([sin * mirror * (width / height), sin * slant + cos, u[:, 4] * 2 * translate], dim=1),
    ], dim=1).to(pictures.device, pictures.dtype)                                            # [N, 2, 3]
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)                   # [N, H, W, 2]
    # white is 1 and grid_sample fills with 0: shift white to 0 and back
    return F.grid_sample(pictures - 1, grid, padding_mode="zeros", align_corners=False) + 1
