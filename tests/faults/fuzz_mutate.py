"""Valid inputs made invalid: bytes, JSON, safetensors, zip archives, pickles, tables, texts and pictures.

Read after fuzz_guard.py. Everything is drawn from one random.Random, so that a number names an input.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import math
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

MOST_MORE = 2**19                       # bytes that a file may grow by: 5 s have to do for any input
Content = bytes | str | None            # of a file; "folder" or "pipe" in its place; None: it is missing
Base = dict[str, dict[str, bytes]]      # for each input, a file or a folder, the content of its files by path
NUMBERS = (-1, 0, 1, 2, 3, 7, 127, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63,
           2**64, 10**30, -(2**63), 0.5, 1e-308, 1e308, -1e308, float("nan"), float("inf"))
VALUES = (None, True, False, [], {}, "", "x", "nan", "\0", "é春🌿", "../../x", "/etc/hostname", "a" * 10_000,
          "a\nb", [None], [[]], [1, 2, 3], [[1, 2], "x"], {"a": {}}, [0] * 1000, *NUMBERS)
RUNS = ("a", "春", "\u0300", "\u0300\u0316", "🌿", "0", " ", "\n", "\r", "\0", "!", "<|endoftext|>", "[MASK]",
        "\u202e", "\u200d", "\ufeff", "ﬃ", "İ", "Σ", "\ud7a3", "&amp;", "a ", "é", "</w>", ",", '"', "##",
        "\U000e0001", "\x1f\x85")
MAGIC = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"DDS |\0\0\0", b"8BPS\0\1",
         b"P6 9 9 255\n", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"BM", b"II*\0", b"MM\0*",
         b"RIFF\xff\xff\0\0WEBPVP8L", b"\0\0\0 ftypavif", b"\0\0\1\0", b"\x89HDF\r\n\x1a\n", b"qoif", b"icns",
         b"PK\3\4", b"\x1f\x8b\x08\0", b"\x80\x02}", b"#define x_width 9\n")


class Case(NamedTuple):
    """An input: which valid one it was, and the files that are other than there."""

    entry: str
    changes: dict[str, Content]


def mutated(base: Base, seed: int, name: str, number: int) -> Case:
    """The input of that number."""
    rng = random.Random(f"{seed} {name} {number}")
    entry = rng.choice(sorted(base))
    files, changes = base[entry], {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(sorted(files))
        now, donor = changes.get(path, files[path]), rng.choice(list(base[rng.choice(sorted(base))].values()))
        if rng.random() < 0.02:
            changes[path] = rng.choice((None, "folder", "pipe", b"", donor))
        elif isinstance(now, bytes):
            changes[path] = change(path, now, donor, rng)[:len(files[path]) + MOST_MORE]
    return Case(entry, changes)


def change(path: str, raw: bytes, donor: bytes, rng: random.Random) -> bytes:
    """One change of a file, after its kind; where that fails, since it is broken already, of its bytes."""
    if rng.random() < 0.25:
        return change_bytes(raw, donor, rng)
    try:
        return changer(path, raw)(raw, donor, rng)
    except Exception:  # noqa: BLE001  an earlier change made it no file of this kind
        return change_bytes(raw, donor, rng)


def changer(path: str, raw: bytes) -> Callable[[bytes, bytes, random.Random], bytes]:
    """By a file's first bytes or its name."""
    ending = path.rpartition(".")[2].lower()
    if raw[:2] == b"PK":
        return change_archive
    if raw[:2] == b"\x1f\x8b":
        return change_gzip
    by_name = {"json": change_json, "jsonl": change_lines, "safetensors": change_safetensors,
               "csv": change_table, "txt": change_text}
    return by_name.get(ending, change_picture)


# ------------------------------------------------------------------------------------------ bytes and texts


def change_bytes(raw: bytes, donor: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, inserts, doubles, splices, or writes an interesting number."""
    at, length = rng.randrange(len(raw) + 1), rng.choice((1, 2, 4, 8, 64, 1000))
    kind = rng.randrange(7)
    if kind == 0:
        flipped = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 8)) if raw else 0):
            flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 1:
        return raw[:at]
    if kind == 2:
        return raw[:at] + rng.choice((rng.randbytes(length), bytes(length), b"\xff" * length)) + raw[at:]
    if kind == 3:
        return raw[:at] + raw[at:at + length] * rng.choice((2, 3, 50)) + raw[at + length:]
    if kind == 4:
        return raw[:at] + donor[rng.randrange(len(donor) + 1):]
    if kind == 5:
        return raw[:at] + raw[at + length:]
    packed = struct.pack(rng.choice("<>") + rng.choice("bhiq") , 0)
    number = rng.choice([n for n in NUMBERS if isinstance(n, int)]) % 256 ** len(packed)
    return raw[:at] + number.to_bytes(len(packed), rng.choice(("little", "big"))) + raw[at + len(packed):]


def run(rng: random.Random) -> str:
    """Some signs, many times; seldom very many."""
    most = rng.choice((1, 3, 30, 300, 3_000, 30_000 if rng.random() < 0.2 else 2))
    return "".join(rng.choices(RUNS, k=rng.choice((1, 2, 5)))) * most


def change_text(raw: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A run of signs is put in, or lines are doubled, dropped or changed places."""
    text = raw.decode("utf-8")
    at, lines = rng.randrange(len(text) + 1), text.split("\n")
    kind, line = rng.randrange(4), rng.randrange(len(lines))
    if kind == 0:
        return (text[:at] + run(rng) + text[at + rng.choice((0, 1, 9)):]).encode("utf-8", "surrogatepass")
    if kind == 1:
        lines[line:line + 1] = [lines[line]] * rng.choice((0, 2, 100))
    elif kind == 2:
        lines[line] = run(rng).replace("\n", "") if rng.random() < 0.5 else ""
    else:
        rng.shuffle(lines)
    return "\n".join(lines).encode("utf-8")


def change_table(raw: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A cell is another, quotes open or close, a row is longer or shorter."""
    lines = raw.decode("utf-8").split("\n")
    line = rng.randrange(len(lines))
    cells = lines[line].split(",")
    cell, kind = rng.randrange(len(cells)), rng.randrange(5)
    if kind == 0:
        cells[cell] = rng.choice(("", '"', '""', '"x', "../x.png", "/etc/hostname", "C:\\x", "\0", run(rng)))
    elif kind == 1:
        cells.insert(cell, rng.choice(("", "x", '"a,b"', "," * rng.choice((1, 2000)))))
    elif kind == 2:
        del cells[cell]
    elif kind == 3:
        return change_text(raw, donor, rng)
    else:
        return raw.replace(b",", rng.choice((b";", b"\t", b"|", b",,", b'","')))
    lines[line] = ",".join(cells)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def change_gzip(raw: bytes, donor: bytes, rng: random.Random) -> bytes:
    """The text that is packed, packed again; or some megabytes of nothing, which pack to little."""
    if rng.random() < 0.1:
        return gzip.compress(bytes(2**20), mtime=0) * rng.choice((1, 100))
    with gzip.open(io.BytesIO(raw)) as file:            # not all of what an earlier change made large
        return gzip.compress(change_text(file.read(2**20), donor, rng), mtime=0)


# ------------------------------------------------------------------------------------------- JSON and pickles


def nodes(tree: Any, rng: random.Random) -> tuple[Any, Any] | None:
    """A container in a tree of dicts and lists, and a key of it, drawn from the top; None if it is a leaf."""
    found = None
    while isinstance(tree, (dict, list)) and tree:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        found, tree = (tree, key), tree[key]
        if rng.random() < 0.35:
            break
    return found


def change_tree(tree: Any, other: Any, rng: random.Random, values: tuple = VALUES) -> Any:
    """A node is replaced, dropped, doubled, renamed or wrapped. The tree is changed in place."""
    found = nodes(tree, rng)
    if found is None or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(values))
    place, key = found
    kind = rng.randrange(10)
    if kind < 4:
        place[key] = copy.deepcopy(rng.choice(values))
    elif kind == 4:
        place[key] = near(place[key], rng)
    elif kind == 5:
        del place[key]
    elif kind == 6 and isinstance(place, dict):
        name = rng.choice(("x", -1, 10**6))
        if isinstance(key, str):
            name = rng.choice((key + "@@twice", "", "x", key + "x", "_" + key, run(rng)[:50]))
        place[name] = place[key] if rng.random() < 0.5 else place.pop(key)
    elif kind == 7:
        place[key] = rng.choice(([place[key]], {"x": place[key]}, [place[key]] * 2, [[place[key]]]))
    elif kind == 8:
        source = nodes(rng.choice((tree, other)), rng)
        place[key] = copy.deepcopy(source[0][source[1]]) if source else None
    else:
        place[key] = rng.choice(("@@deep", "@@digits", "@@long", "@@wide"))
    return tree


def near(value: Any, rng: random.Random) -> Any:
    """A value of the same kind, not far away."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 2, str(value)))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "x", value * 2, value.upper(), run(rng) + value, value + "\n"))
    if isinstance(value, list):
        return rng.choice((value[:-1], value * 2, value[::-1], value + [None], value[:1] * 500))
    if isinstance(value, torch.Tensor):
        return rng.choice((value.flatten(), value[None], value[..., :0], value.double(), value.int(),
                           value.to(torch.complex64), value.sum().expand(30_000, 30_000), value * math.nan))
    return [value]


def as_json(tree: Any, rng: random.Random) -> bytes:
    """The tree as JSON, with what json.dumps cannot write put in afterwards."""
    depth, text = rng.choice((50, 70, 500, 5_000, 100_000)), json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    deep = rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    for name, value in (('"@@deep"', deep), ('"@@digits"', "9" * rng.choice((39, 41, 5002))), ("@@twice", ""),
                        ('"@@long"', '"' + "春" * 30_000 + '"'), ('"@@wide"', "[" + "0," * 20_000 + "0]")):
        text = text.replace(name, value)
    return text.encode("utf-8", "surrogatepass")


def change_json(raw: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A node of a JSON text."""
    try:
        other = json.loads(donor)
    except ValueError:
        other = VALUES
    return as_json(change_tree(json.loads(raw), other, rng), rng)


def change_lines(raw: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A node of one line of JSON lines, or the lines themselves."""
    if rng.random() < 0.3:
        return change_text(raw, donor, rng)
    lines = raw.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = change_json(lines[at] or b"{}", donor, rng)
    return b"\n".join(lines)


def change_pickle(raw: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A node of what torch.save wrote, saved again."""
    tensors = (torch.zeros(0), torch.zeros(()), torch.zeros(2, 3), torch.zeros(3, dtype=torch.complex64),
               torch.zeros(3).to_sparse(), torch.zeros(1).expand(30_000, 30_000), torch.ones(5).bool(),
               torch.full((3,), math.nan), torch.zeros(5_056, dtype=torch.uint8))
    tree = torch.load(io.BytesIO(raw), weights_only=True)
    tree = dict(tree) if isinstance(tree, dict) else tree
    file = io.BytesIO()
    torch.save(change_tree(tree, tree, rng, VALUES + tensors * 2), file)
    return file.getvalue()


# -------------------------------------------------------------------------------- archives and safetensors


def change_archive(raw: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A member of a zip archive, and the archive built again; or what torch.save put into it."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    plain = any(n.endswith("/data.pkl") for n in members) and not any("constants" in n for n in members)
    if plain and rng.random() < 0.6:
        return change_pickle(raw, donor, rng)
    name = rng.choice(list(members))
    pickles = [n for n in members if n.endswith(".pkl")]
    if pickles and rng.random() < 0.6:
        name = rng.choice(pickles)
    kind = rng.randrange(7)
    packing = zipfile.ZIP_DEFLATED if kind == 6 or rng.random() < 0.2 else zipfile.ZIP_STORED
    if kind < 4:
        members[name] = change_bytes(members[name], donor, rng)
    elif kind == 4:
        content = members.pop(name)
        if rng.random() < 0.5:
            members[rng.choice((name + "x", "../x", "/x", "x" * 300, name.rpartition("/")[2]))] = content
    elif kind == 5:
        members[name] = members[rng.choice(list(members))]
    else:
        members[name] += bytes(2**23)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content, packing)
    return file.getvalue()


def change_safetensors(raw: bytes, donor: bytes, rng: random.Random) -> bytes:
    """The header's length, a node of its JSON, or a tensor, with everything else in order."""
    end = 8 + int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8:end]), raw[end:]
    kind = rng.randrange(10)
    if kind == 0:
        length = rng.choice((0, 1, end, end - 9, len(raw), 2**31, 2**63, 2**64 - 1, 100_000_001))
        return length.to_bytes(8, "little") + raw[8:]
    if kind < 5:
        header = change_tree(header, header, rng)
        text = as_json(header, rng)
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data
    return with_other_tensor(header, data, rng)


DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4,
          "F64": 8, "I64": 8, "C64": 8}


def with_other_tensor(header: dict[str, Any], data: bytes, rng: random.Random) -> bytes:
    """A well-formed file in which one tensor has another name, shape or type, is missing or doubled."""
    metadata = {name: info for name, info in header.items() if name == "__metadata__"}
    tensors = {name: (info["dtype"], info["shape"], data[slice(*info["data_offsets"])])
               for name, info in header.items() if name not in metadata}
    name = rng.choice(list(tensors))
    dtype, shape, content = tensors[name]
    kind = rng.randrange(6)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors.pop(name) if rng.random() < 0.7 else None
        digits = [i for i, letter in enumerate(name) if letter.isdigit()]
        at = rng.choice(digits) if digits else 0
        other = name[:at] + rng.choice(("7", "99", "999999999999", "x", "", "-1")) + name[at + 1:]
        other = rng.choice((other, name[:-1], name + ".weight", "", name.rpartition(".")[0]))
        tensors[other] = dtype, shape, content
    elif kind == 2:
        dtype = rng.choice(list(DTYPES))
        count = len(content) // DTYPES[dtype]
        tensors[name] = dtype, [count], content[:count * DTYPES[dtype]]
    elif kind == 3:
        tensors[name] = dtype, rng.choice((shape[::-1], [1, *shape], [*shape, 1], shape + [1] * 40)), content
    elif kind == 4:
        tensors[name] = dtype, rng.choice(([0], [0, *shape], [])), b"" if shape else content
        if tensors[name][1] == []:
            tensors[name] = dtype, [], bytes(DTYPES.get(dtype, 4))
    else:
        tensors = {n: t for n, t in tensors.items() if rng.random() < 0.5} or tensors
    return safetensors(tensors, metadata)


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, Any]) -> bytes:
    """The file of (dtype, shape, bytes) by name."""
    header, data = dict(metadata), b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


# -------------------------------------------------------------------------------------------------- pictures

SIDES = (0, 1, 2, 9, 255, 256, 8_192, 8_193, 16_384, 30_000, 60_000, 65_535, 2**16, 2**24, 2**31 - 1, 2**31,
         2**32 - 1)


def change_picture(raw: bytes, donor: bytes, rng: random.Random) -> bytes:
    """The sides in the header, the header's first bytes, or the kind that the first bytes name."""
    if rng.random() < 0.15:
        return rng.choice(MAGIC) + raw[rng.choice((0, 4, 8, 16)):]
    if rng.random() < 0.4:
        head = change_bytes(raw[:80], donor[:80], rng)
        return head + raw[80:]
    if raw[:4] == b"\x89PNG":
        return with_png_header(raw, rng)
    places = {b"GI": ("<H", 6), b"BM": ("<i", 18), b"RI": ("<H", 26), b"\xff\xd8": (">H", sof(raw) + 5)}
    form, at = places.get(raw[:2], ("<I", rng.randrange(8, max(9, len(raw) - 8))))
    size = struct.calcsize(form)
    at += size * rng.randrange(2)
    number = rng.choice(SIDES) % 256**size
    return raw[:at] + number.to_bytes(size, "big" if form[0] == ">" else "little") + raw[at + size:]


def sof(raw: bytes) -> int:
    """Where a JPEG's frame header begins, 0 if nowhere."""
    return max(0, *(raw.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2")))


def with_png_header(raw: bytes, rng: random.Random) -> bytes:
    """Other sides, depth or colours, with the checksum that fits."""
    fields = list(struct.unpack(">IIBBBBB", raw[16:29]))
    for _ in range(rng.choice((1, 2))):
        at = rng.choice((0, 0, 1, 1, 2, 3, 4, 5, 6))
        fields[at] = rng.choice(SIDES) if at < 2 else rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 32, 255))
    header = b"IHDR" + struct.pack(">IIBBBBB", *fields)
    return raw[:12] + header + zlib.crc32(header).to_bytes(4, "big") + raw[33:]
