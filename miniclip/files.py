"""Files from outside: JSON, zip archives and pickles, read without trust; files written whole or not at all.

Read first of all; it knows nothing of models. Whatever is wrong with a file is one WeightsError, and what a
file can cost in time and memory is known from its size before it is read.
Sources: RFC 8259 (JSON); APPNOTE.TXT of PKWARE (zip); what torch.save writes (pickles).
"""

from __future__ import annotations

import io
import json
import os
import secrets
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, BinaryIO

import torch

MAX_JSON_BYTES = 32 * 2**20  # config and index files
MAX_JSON_ELEMENTS = 2_000_000  # bounds the number of Python objects that a hostile JSON text can make
MAX_JSON_DEPTH = 64  # brackets in brackets; the files of models have at most 8
MAX_DIGITS = 40  # of a whole number: 2**64 has 20, and transformers writes 10**30 for "no limit"
ZIP_SLACK = 2**20  # archives are stored, not compressed, but for some pages of code in TorchScript's
READ_UNASKED = 2**16  # bytes that are read without asking how many there are
LOCAL_ONLY = "models are read from local folders only, nothing is ever downloaded"


class WeightsError(ValueError):
    """A file that cannot be honoured. One line that names the file, the tensor or field, and the value."""


class MissingWeights(WeightsError, FileNotFoundError):
    """No such folder, or no weights in it: an OSError too, as upstream's."""


def shown(value: object, most: int = 200) -> str:
    """A value as a message quotes it: its repr, of at most `most` characters."""
    try:
        text = repr(value[:most] if isinstance(value, (str, bytes)) else value)
    except (ValueError, RecursionError):  # a number of 5,000 digits, lists 1,000 deep
        return f"a {type(value).__name__}"
    whole = len(text) <= most and not (isinstance(value, (str, bytes)) and len(value) > most)
    return text if whole else text[: most - 3] + "..."


def reason(error: BaseException) -> str:
    """What an error says, as a message quotes it: the first line, of at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------------- opening


def name_of(path: str | os.PathLike) -> str:
    """A path as text."""
    return os.fsdecode(path)


def need_folder(folder: str | os.PathLike) -> None:
    """Raises WeightsError for what is no local folder, such as a name on a model hub."""
    if not os.path.isdir(folder):
        problem = ("a file, not a folder" if os.path.exists(folder)
                   else f"no such folder or file; {LOCAL_ONLY}")
        raise MissingWeights(f"{name_of(folder)}: {problem}")


class BoundedFile(io.BufferedReader):
    """A file opened for reading whose read(n) takes no more memory than there are bytes left.

    Python's own takes n bytes before it looks: a few bytes of a chunk or a pickle can ask for gigabytes.
    """

    def read(self, n: int | None = -1) -> bytes:
        """As of any file."""
        if n is not None and n > READ_UNASKED:
            n = min(n, max(os.fstat(self.fileno()).st_size - self.tell(), 0))
        return super().read(n)


def open_file(path: str | os.PathLike) -> BoundedFile:
    """Opens a regular file for reading: a folder, a pipe or a device is refused before it can block."""
    path = name_of(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise WeightsError(f"{path}: not a regular file")
        return BoundedFile(io.FileIO(path))
    except OSError as error:
        kind = MissingWeights if isinstance(error, FileNotFoundError) else WeightsError
        raise kind(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL byte in the name; WeightsError passes through
        raise error if isinstance(error, WeightsError) else WeightsError(f"{path!r}: {error}") from None


def read_bytes(path: str | os.PathLike, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises WeightsError."""
    with open_file(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise WeightsError(f"{name_of(path)}: a file of more than {most} bytes is refused here")
    return raw


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Gives a binary file that replaces `path` when the block ends well; otherwise `path` stays as it was.

    The bytes go to a temporary name in the same folder and reach the disk (fsync) before the rename.
    """
    path = name_of(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:40]}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.lexists(temporary):
                os.unlink(temporary)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written: {error.strerror or error}") from error


# ------------------------------------------------------------------------------------------------------- JSON


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON object from a file of at most 32 MiB.
    Raises WeightsError; a byte order mark is forgiven."""
    path = name_of(path)
    need_folder(os.path.dirname(path) or ".")
    return parse_json(read_bytes(path, MAX_JSON_BYTES).removeprefix(b"\xef\xbb\xbf"), path)


def write_json(path: str | os.PathLike, values: dict[str, Any]) -> None:
    """Writes a JSON object, keys in the order given, UTF-8, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def script_json(data: Any) -> str:
    """JSON that may stand in a <script> of a page: no text in it can end that. NaN raises ValueError."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def is_texts(value: Any) -> bool:
    """Whether a value read from JSON is a list of strings."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def parse_json(raw: bytes, source: str) -> dict[str, Any]:
    """Strict JSON in linear time and bounded memory: one object in UTF-8, no key twice, at most 64 levels,
    2,000,000 elements, 40 digits a number. `source` names it in the WeightsError."""
    if max(raw.count(b","), raw.count(b"[") + raw.count(b"{")) > MAX_JSON_ELEMENTS:
        raise WeightsError(f"{source}: JSON with more than {MAX_JSON_ELEMENTS} elements is refused")
    if _depth(raw) > MAX_JSON_DEPTH:
        raise WeightsError(f"{source}: JSON nested too deeply, over {MAX_JSON_DEPTH} levels")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise WeightsError(f"{source}: the key {shown(twice)} appears twice")
        return values

    def bounded(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise WeightsError(f"{source}: the number {digits[:MAX_DIGITS]}... is too large")
        return int(digits)

    try:
        values = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_int=bounded)
    except UnicodeDecodeError as error:
        raise WeightsError(f"{source}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise WeightsError(f"{source}: not JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{source}: expected a JSON object, got {type(values).__name__}")
    return values


STEP = {byte: 1 if byte in b"[{" else -1 for byte in b"[]{}"}
NO_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'[]{}"')


def _depth(raw: bytes) -> int:
    """How deep brackets nest outside of strings; exact for JSON, some number for anything else.

    Everything but brackets and quotes goes first, then strings without brackets, at the speed of a copy.
    """
    raw = raw.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, NO_STRUCTURE).replace(b'""', b"")
    outside = b"".join(raw.split(b'"')[::2])
    return max(accumulate(map(STEP.__getitem__, outside.replace(b"[]", b""))), default=0) + (b"[]" in outside)


# --------------------------------------------------------------------------------------------------- archives


def is_zip(path: str | os.PathLike) -> bool:
    """Whether a file ends as a zip archive does. Raises WeightsError for one that cannot be opened."""
    with open_file(path) as file:
        try:
            return zipfile.is_zipfile(file)
        except Exception:  # of Python 3.10 to 3.14 each raises something else for a broken end
            return False


@contextmanager
def open_zip(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """Gives an archive to read in the block; whatever goes wrong there is a WeightsError of one line.

    Its members may claim no more bytes than the file has, and a little: none can swell.
    """
    path = name_of(path)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > size + ZIP_SLACK:
                    raise WeightsError(f"{path}: the archive claims to hold more than its own {size} bytes")
                yield archive
        except WeightsError:
            raise
        except Exception as error:  # zipfile raises nearly anything on a damaged archive
            raise WeightsError(f"{path}: not a readable archive: {reason(error)}") from None


def read_pickle(path: str | os.PathLike) -> Any:
    """Whatever torch.save wrote: tensors and plain Python values.

    Only torch's weights_only reader is used: code inside a pickle is never run. Raises WeightsError.
    """
    path, options = name_of(path), {"map_location": "cpu", "weights_only": True}
    try:
        with open_file(path) as file:
            start = file.peek(2)[:2]
            if start[:1] == b"\x80":  # a pickle, from before torch wrote archives
                return torch.load(file, **options)
        if start != b"PK":  # torch would unpack a tar, its oldest format, to the disk
            raise WeightsError(f"{path}: neither a zip archive nor a pickle")
        with open_zip(path):  # its size alone
            pass
        return torch.load(path, mmap=os.name != "nt", **options)
    except WeightsError:
        raise
    except Exception as error:  # the reader raises many kinds; none of them may pass as anything else
        problem = ("not a plain pickle of tensors and numbers; code in pickles is never run, "
                   "so convert it to safetensors")
        raise WeightsError(f"{path}: {problem} ({reason(error)})") from None

