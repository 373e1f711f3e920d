"""Which images with which captions: a captions.csv beside them, or one folder for each class,
whose name is the caption.

Read after image.py. Every table is hostile until parsed: bounded first,
and wrong in one clear line with its number.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import unicodedata
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from miniclip.files import WeightsError, atomic_write, parse_json, read_bytes, shown
from miniclip.tokenizer import normal

from ..errors import DataError
from .image import SUFFIXES

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
# columns that train_clip takes for no captions unless they are named
NO_CAPTIONS = ("file", "image", "artist", "author", "licence", "license", "source", "url", "split", "id")
MAX_CSV_BYTES = 64 * 2**20
MAX_CELLS = 8_000_000
MAX_COLUMNS = 1_000
MAX_PICTURES = 1_000_000
MAX_INDEX_BYTES = 256 * 2**20


class Captioned(NamedTuple):
    """An image file and its caption."""

    path: Path
    caption: str


def list_captioned(root, caption_column: str = "caption") -> list[Captioned]:
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
    return " ".join(normal("NFC", text or "").split())


def columns_of(root) -> list[str]:
    """The names of the columns of root/captions.csv; none if there is no such table."""
    table = Path(root) / "captions.csv"
    return list(open_table(table).fieldnames) if table.exists() else []


def caption_columns(root, besides: str = "") -> list[str]:
    """What train_clip takes for captions: `caption`,
    else every column but `besides` and those of NO_CAPTIONS.

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
    return f"its columns are: {', '.join(map(repr, there)) or 'none':.200}"


def _from_csv(root: Path, table: Path, caption_column: str) -> list[Captioned]:
    rows = open_table(table)
    pictures = []
    try:
        file = find_column(rows.fieldnames, "file", "image")
        if file is None:
            raise DataError(f"{table}: no column 'file'; {_known(rows.fieldnames)}; call the one that names "
                            "the pictures so")
        column = find_column(rows.fieldnames, caption_column)
        if column is None:
            raise DataError(f"{table}: no column {shown(caption_column)}; {_known(rows.fieldnames)} "
                            "(training takes any of them with --caption-column)")
        for row in rows:
            where = f"{table}, line {rows.line_num}"
            counts = _counts(row, rows, where)
            path = _locate(root, row[file], where)
            caption = _tidy(row[column])
            if not caption:
                raise DataError(f"{where}: empty {shown(column)} for file {shown(row[file])}{counts}")
            pictures.append(Captioned(path, caption))
            if len(pictures) > MAX_PICTURES:
                raise DataError(f"{table}: more than {MAX_PICTURES} rows")
    except csv.Error as error:
        raise DataError(f"{table}, line {rows.line_num}: not a CSV ({error})") from None
    return pictures


def open_table(table: Path) -> csv.DictReader:
    """The rows of a table, split at commas, or at the semicolons or tabs with which its header has a column
    `file`. Raises DataError."""
    text = _read_text(table)
    try:
        # at last, commas again: the header for the error to show
        for delimiter in [*DELIMITERS, ","]:
            rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
            names = rows.fieldnames or []
            if len(names) > MAX_COLUMNS:
                raise DataError(f"{table}, line 1: {len(names)} columns, the limit is {MAX_COLUMNS}")
            rows.fieldnames = [_tidy(name) for name in names]
            if find_column(rows.fieldnames, "file", "image"):
                break
    except csv.Error as error:
        raise DataError(f"{table}, line 1: not a CSV ({error})") from None
    return rows


def _counts(row: dict, rows: csv.DictReader, where: str) -> str:
    """How many fields a row has, if too few. More than the header has, unless they are blank, are refused:
    a caption that holds the delimiter would lose its end."""
    extra, columns = row.get(None, []), len(rows.fieldnames)
    missing = sum(value is None for value in row.values())
    counts = f"fields in this row: {columns + len(extra) - missing}, columns in the header: {columns}"
    if any(map(str.strip, extra)):
        raise DataError(f"{where}: {counts}; put a caption that holds "
                        f"{DELIMITERS[rows.reader.dialect.delimiter]} "
                        'in double quotes, like "this, here", with no space before them')
    return f" ({counts})" if missing else ""


def _read_text(path: Path) -> str:
    try:
        text = read_bytes(path, MAX_CSV_BYTES).decode("utf-8-sig")  # Excel puts a byte-order mark in front
    except WeightsError as error:
        raise DataError(error) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.object[error.start]:#04x} at offset "
                        f"{error.start}); save it as UTF-8") from None
    if max(map(text.count, DELIMITERS)) > MAX_CELLS:        # before rows are made of them
        raise DataError(f"{path}: more than {MAX_CELLS} cells are refused; leave out columns")
    return text


def _locate(root: Path, name: str | None, where: str) -> Path:
    """The file a row names, which must exist and lie inside `root`."""
    name = (name or "").strip().replace("\\", "/")  # tables written on Windows
    if not name:
        raise DataError(f"{where}: empty file name")
    if "\0" in name or name.startswith("/") or PureWindowsPath(name).drive:
        raise DataError(f"{where}: file {shown(name)} must be a path relative to {root}")
    try:
        for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
            path = root / form  # zip files from macOS spell é or が with two code points: try both
            if path.is_file():
                break
        else:
            raise DataError(f"{where}: no such file {shown(name)} in {root}")
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(f"{where}: file {shown(name)} lies outside {root}")
    except (OSError, RuntimeError) as error:  # a name too long for the disk, a loop of links
        raise DataError(f"{where}: file {shown(name)} cannot be read ({type(error).__name__})") from None
    return path


def _from_class_folders(root: Path) -> list[Captioned]:
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
            pictures.append(Captioned(Path(folder, name), _tidy(" ".join(names))))
        if len(pictures) > MAX_PICTURES:
            raise DataError(f"{root}: more than {MAX_PICTURES} pictures")
    return sorted(pictures, key=lambda p: unicodedata.normalize("NFC", p.path.relative_to(root).as_posix()))


def list_indexed(root: Path, caption_column: str, index: Path) -> list[Captioned]:
    """`list_captioned`, which looks at every file, only if the table is not the one that `index` was made
    of."""
    table = root / "captions.csv"
    if not table.is_file():
        return list_captioned(root, caption_column)
    info = table.stat()
    made_of = [str(root.resolve()), caption_column, info.st_size, info.st_mtime_ns]
    # not there yet, or damaged: made again
    with contextlib.suppress(WeightsError, LookupError, TypeError, ValueError):
        kept = parse_json(read_bytes(index, MAX_INDEX_BYTES), str(index))
        if kept.get("made_of") == made_of:
            return [_kept(root, name, caption) for name, caption in kept["pictures"]]
    pictures = list_captioned(root, caption_column)
    rows = [[p.path.relative_to(root).as_posix(), p.caption] for p in pictures]
    # it only saves time: a full or read-only disk may do without
    with contextlib.suppress(WeightsError), atomic_write(index) as file:
        text = json.dumps({"made_of": made_of, "pictures": rows}, ensure_ascii=False)
        file.write(text.encode("utf-8"))
    return pictures


def _kept(root: Path, name: str, caption: str) -> Captioned:
    """One row of an index. Raises ValueError for what `list_captioned` would not have put there."""
    inside = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
    if not (inside and "\0" not in name and isinstance(caption, str) and caption):
        raise ValueError(name)
    return Captioned(root / name, caption)
