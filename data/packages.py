"""Packages that makers of picture sets unpack: npm's tarballs and Unihan's table, bounded as they are read.

Read before make_calligraphy.py. They come from a registry or a stranger's disk, so every one is hostile until
read: no member is written under its own path, and none can swell.
"""

from __future__ import annotations

import bz2
import gzip
import re
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from miniclip.files import WeightsError, open_file, parse_json, reason

MAX_MEMBER = 100 * 2**20        # bytes of one file in a package
MAX_TAKEN = 1024 * 2**20        # of all files that are taken out of it
MAX_UNPACKED = 4096 * 2**20     # of a package; emoji-datasource-google has about 200 MiB
MAX_MEMBERS = 200_000
MAX_TABLE = 64 * 2**20          # of a table packed by bzip2
PLAIN_NAME = re.compile(r"[\w@+-][\w@+.-]{0,100}")          # of a file that may be written under its own name


class MakerError(ValueError):
    """Something that a maker of picture sets needs is missing or broken; one line."""


class Packed(gzip.GzipFile):
    """A tarball's bytes; what would read or skip more of them than a package has ends in an EOFError."""

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes, as many as one member may have."""
        if size is None or not 0 <= size <= MAX_MEMBER:
            raise EOFError(f"asks for {size} bytes at once")
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Goes to a place in it."""
        if offset > MAX_UNPACKED:
            raise EOFError(f"claims to hold more than {MAX_UNPACKED} bytes")
        return super().seek(offset, whence)


def members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The plain files of a package whose path inside it `wanted` accepts, by that path. Raises MakerError."""
    found, taken = {}, 0
    try:
        # "r:", not packed a second time
        with (open_file(path) as file, Packed(fileobj=file) as packed,
              tarfile.open(fileobj=packed, mode="r:") as package):
            for count, member in enumerate(package):
                inner = str(PurePosixPath(*PurePosixPath(member.name).parts[1:]))   # without "package/"
                if member.isfile() and member.size <= MAX_MEMBER and wanted(inner):
                    found[inner] = package.extractfile(member).read()
                    taken += member.size
                if count > MAX_MEMBERS or taken > MAX_TAKEN:
                    raise EOFError("holds more than any package of ours")
                package.members.clear()                     # which it would keep
    except Exception as error:  # noqa: BLE001  a broken archive makes tarfile and zlib raise nearly anything
        raise MakerError(f"{path}: not a package that can be read ({reason(error)})") from None
    return found


def json_of(files: dict[str, bytes], inner: str, path: Path) -> Any:
    """One file of `members`, an object or a list, parsed. Raises MakerError, which names the package."""
    if inner not in files:
        raise MakerError(f"{path}: holds no {inner}")
    try:                                                    # parse_json takes objects alone
        return parse_json(b'{"all":%s}' % files[inner], f"{path}: {inner}")["all"]
    except WeightsError as error:
        raise MakerError(str(error)) from None


def read_bz2(path: Path) -> str:
    """The text of a table packed by bzip2. Raises MakerError."""
    try:
        with open_file(path) as file, bz2.BZ2File(file) as packed:
            raw = packed.read(MAX_TABLE + 1)
        if len(raw) > MAX_TABLE:
            raise EOFError(f"holds more than {MAX_TABLE} bytes")
        return raw.decode("utf-8")
    except (ValueError, EOFError, OSError) as error:
        raise MakerError(f"{path}: not a table that can be read ({reason(error)})") from None
