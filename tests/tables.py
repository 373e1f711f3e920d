"""The tables of the READMEs, made of docs/parity.json and docs/benchmarks.json: python -m tests.tables

`make parity` writes the one file, `make bench` the other; this puts their figures between the markers of both
READMEs, which tests/test_tables.py holds them to. No number in those tables is typed by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

from miniclip.files import atomic_write, read_json
from tests.bench.page import chosen, ratio

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-Hant.md")
TORCH = ("diffusers", "transformers", "open_clip")
RUNTIMES = ("OpenVINO", "ONNX Runtime")
HEADERS = {"README.md": {"parity": ("", "beside", "float64", "float32"),
                         "speed": ("work", "the fastest PyTorch peer", *RUNTIMES)},
           "README.zh-Hant.md": {"parity": ("", "對照", "float64", "float32"),
                                 "speed": ("工作", "最快的 PyTorch 對手", *RUNTIMES)}}


def parity() -> list[tuple[str, ...]]:
    """A line for each row of docs/parity.json."""
    rows = read_json(ROOT / "docs" / "parity.json")["rows"]
    return [(row["name"], row["peer"], *(f"{row[dtype]:.0e}" if row[dtype] else "0"
                                         for dtype in ("float64", "float32"))) for row in rows]


def speed() -> list[tuple[str, ...]]:
    """A line for each row of docs/benchmarks.json: peer / ours in seconds of CPU."""
    rows = read_json(ROOT / "docs" / "benchmarks.json")
    return [(row["title"], *(fastest(row, *names) for names in (TORCH, *((n,) for n in RUNTIMES))))
            for row in rows.values() if chosen(row, *TORCH)]


def fastest(row: dict, *names: str) -> str:
    """The ratio of the fastest of some peers; nothing where none was asked."""
    ratios = [ratio(row, peer) for peer in chosen(row, *names)]
    return f"{min(ratios):.2f}" if ratios else ""


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """In Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def filled(text: str, name: str) -> str:
    """A README with its tables as they have to be. Raises ValueError where a marker is missing."""
    for kind, rows in (("parity", parity()), ("speed", speed())):
        marked = re.compile(rf"(<!-- {kind} -->\n).*?(<!-- end of {kind} -->)", re.S)
        if not marked.search(text):
            raise ValueError(f"{name}: no markers <!-- {kind} --> and <!-- end of {kind} -->")
        lines = table(HEADERS[name][kind], rows)
        text = marked.sub(rf"\g<1>\n{lines}\n\g<2>", text)
    return text


def main() -> None:
    """Rewrites the READMEs."""
    for name in READMES:
        text = filled((ROOT / name).read_text(encoding="utf-8"), name)
        with atomic_write(ROOT / name) as file:
            file.write(text.encode())


if __name__ == "__main__":
    main()
