"""The tables of the READMEs: python -m tests.tables

`pytest tests/parity --table` leaves docs/parity.json, `make bench` docs/benchmarks.json, and docs/tour.md
has the stops; this puts them between the markers of both READMEs, which tests/test_tables.py holds them to.
No number in those tables is typed by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

from miniclip.files import atomic_write, read_json
from tests.bench.page import TARGETS, chosen, ratio

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-Hant.md")
TORCH = ("diffusers", "transformers", "open_clip")
RUNTIMES = ("OpenVINO", "ONNX Runtime")
HEADERS = {"README.md": {"reading": ("", "stop", "minutes", "file"),
                         "parity": ("", "beside", "float64", "float32"),
                         "speed": ("work", "the fastest PyTorch peer", *RUNTIMES)},
           "README.zh-Hant.md": {"reading": ("", "站", "分鐘", "檔案"),
                                 "parity": ("", "對照", "float64", "float32"),
                                 "speed": ("工作", "最快的 PyTorch 對手", *RUNTIMES)}}
TOURS = {"README.md": "docs/tour.md", "README.zh-Hant.md": "docs/tour.zh-Hant.md"}
STOP = re.compile(r'<a id="([\w-]+)"></a>\s+## (\d+)\. (.+)\s+\*\*(\d+) \w+\*\* · \[([\w/.]+)\]')


def reading(readme: str) -> list[tuple[str, ...]]:
    """A line for each stop of the tour in that language."""
    tour = TOURS[readme]
    stops = STOP.findall((ROOT / tour).read_text(encoding="utf-8"))
    return [(number, f"[{title}]({tour}#{anchor})", minutes, f"`{file}`")
            for anchor, number, title, minutes, file in stops]


def parity() -> list[tuple[str, ...]]:
    """A line for each row of docs/parity.json."""
    rows = read_json(ROOT / "docs" / "parity.json")["rows"]
    return [(row["name"], row["peer"], *(f"{row[dtype]:.0e}" if row[dtype] else "0"
                                         for dtype in ("float64", "float32"))) for row in rows]


def speed() -> list[tuple[str, ...]]:
    """A line for each row of docs/benchmarks.json: peer / ours in seconds of CPU."""
    rows = read_json(ROOT / "docs" / "benchmarks.json")
    return [(row["title"], *(fastest(row, *names) for names in (TORCH, *((n,) for n in RUNTIMES))))
            for row in (rows[name] for name in TARGETS if name in rows) if chosen(row, *TORCH)]


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
    for kind, rows in (("reading", reading(name)), ("parity", parity()), ("speed", speed())):
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
