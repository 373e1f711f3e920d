"""The reading tour's excerpts, printed output and line counts.

    python -m tests.tour            writes them anew into docs/tour.md and docs/tour.zh-Hant.md
    python -m tests.tour 4          runs the lines of stop 4; with --answer those of its answer too

In the pages a marker stands before each block that is made:

    <!-- code: minidiff/unet.py UNet2DConditionModel.forward "skips = [h]" "skips += made" -->
    <!-- output -->             what the Python block before it prints
    <!-- lines -->              a table: how many lines of each file one noise prediction runs

A code marker names a file and a function or class in it, and perhaps a text in the first line that is wanted
and one in the last; without them it is all of it. tests/test_docs.py holds the pages to all this.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import io
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "docs" / "tour.md", ROOT / "docs" / "tour.zh-Hant.md")
CODE = re.compile(r"<!-- code: (.*?) -->\n```python\n(.*?)```\n", re.DOTALL)
SNIPPET = re.compile(r"(?<!-->\n)```python\n(.*?)```\n(\n<!-- output -->\n```text\n(.*?)```\n)?", re.DOTALL)
LINES = re.compile(r"(?<=<!-- lines -->\n)(?:\|.*\n)+")
STOP = re.compile(r"^## (\d+)\. ([^\n]*)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
PREDICTION = ("minidiff/unet.py", "minidiff/config.py", "minidiff/embeddings.py", "minidiff/resnet.py",
              "minidiff/attention.py")


# --------------------------------------------------------------------------------------------------- excerpts


def excerpt(marker: str) -> str:
    """The lines of source that a code marker names, below a comment that says where they stand."""
    file, name, first, last = [*shlex.split(marker), "", ""][:4]
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    node = find(file, name)
    chosen = lines[node.lineno - 1:node.end_lineno]
    if first:
        chosen = chosen[place(chosen, first, marker):]
    if last:
        chosen = chosen[:place(chosen, last, marker) + 1]
    return f"# {file}, {name}\n" + textwrap.dedent("\n".join(chosen)).strip("\n") + "\n"


def find(file: str, name: str) -> ast.FunctionDef | ast.ClassDef:
    """The definition of a function or class such as UNet2DConditionModel.forward."""
    node: Any = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        inside = [child for child in node.body if getattr(child, "name", None) == part]
        if not inside:
            raise LookupError(f"{file}: there is no {name}")
        node = inside[-1]
    return node


def place(lines: list[str], text: str, marker: str) -> int:
    """The first of the lines that holds a text."""
    for i, line in enumerate(lines):
        if text in line:
            return i
    raise LookupError(f"{marker}: no line holds {text!r}")


# -------------------------------------------------------------------------------------------------- the pages


class Stop(NamedTuple):
    """One stop of a page."""

    number: int
    title: str
    body: str

    @property
    def minutes(self) -> int:
        """As the line below its title says."""
        return int(re.search(r"\*\*(\d+) ", self.body)[1])

    @property
    def snippets(self) -> list[tuple[str, str | None, bool]]:
        """(Python, what the page says that it prints, whether it belongs to the answer), in order."""
        answer = self.body.find("<details>")
        return [(m[1], m[3], m.start() > answer >= 0) for m in SNIPPET.finditer(self.body)]


def stops(page: Path) -> list[Stop]:
    """The stops of a page, in order."""
    return [Stop(int(m[1]), m[2], m[3]) for m in STOP.finditer(page.read_text(encoding="utf-8"))]


def outputs(stop: Stop, answer: bool = True) -> Iterator[str]:
    """What each snippet prints; they run one after the other, in one namespace."""
    names: dict[str, Any] = {"__name__": "tour"}
    for code, _, hidden in stop.snippets:
        if answer or not hidden:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, f"stop {stop.number}", "exec"), names)
            yield printed.getvalue()


def refreshed(text: str, printed: dict[int, list[str]]) -> str:
    """A page with all its made blocks made anew."""
    text = CODE.sub(lambda m: f"<!-- code: {m[1]} -->\n```python\n{excerpt(m[1])}```\n", text)

    def stop(match: re.Match) -> str:
        now = iter(printed[int(match[1])])

        def snippet(m: re.Match) -> str:
            made = next(now)
            block = f"\n<!-- output -->\n```text\n{made}```\n" if m[2] else ""
            return f"```python\n{m[1]}```\n{block}"

        return match[0].replace(match[3], SNIPPET.sub(snippet, match[3]))

    return LINES.sub(lambda m: table(m[0]), STOP.sub(stop, text))


# ------------------------------------------------------------------------------------ lines of one prediction


def executed_lines() -> dict[str, int]:
    """How many lines of each file of ours one forward pass runs, of a small UNet in the layout of SD 1.5.

    A statement counts with all its lines, an `if` or a `for` with those of its head; no docstring, comment or
    `def` line counts, and no line counts twice.
    """
    from minidiff import UNet2DConditionModel

    unet = UNet2DConditionModel(block_out_channels=(8, 16, 16, 16), norm_num_groups=8, cross_attention_dim=8,
                                attention_head_dim=2).eval()
    x_t, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 8)
    seen: dict[str, set[int]] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if "site-packages" in file or not file.startswith(str(ROOT) + os.sep):
            return None
        if event == "line":
            seen.setdefault(Path(file).relative_to(ROOT).as_posix(), set()).add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with torch.no_grad():
            unet(x_t, 500, text)
    finally:
        sys.settrace(before)
    own = Path(__file__).relative_to(ROOT).as_posix()
    return {file: len(set().union(*(statement_at(file, line) for line in lines)))
            for file, lines in seen.items() if file != own}


def statement_at(file: str, line: int) -> range:
    """The lines of the innermost statement around a line; of one that holds others, those before them."""
    return min((lines for lines in statements(file) if line in lines), key=len, default=range(0))


@functools.cache
def statements(file: str) -> list[range]:
    """The lines of each statement of a file, of one that holds others those of its head."""
    found = []
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inner = getattr(node, "body", None)
            found.append(range(node.lineno, inner[0].lineno if inner else node.end_lineno + 1))
    return found


def table(rows: str) -> str:
    """The rows of a Markdown table with the counts of today in the last column: of the file that a row
    links to, or, in the last row, of all five."""
    count = executed_lines()
    made = []
    for row in rows.splitlines():
        file = re.match(r"\| \[(\S+\.py)\]", row)
        if file:
            row = re.sub(r"\d+ \|$", f"{count[file[1]]} |", row)
        made.append(row)
    made[-1] = re.sub(r"\*\*\d+\*\* \|$", f"**{sum(count[file] for file in PREDICTION)}** |", made[-1])
    return "\n".join(made) + "\n"


# ------------------------------------------------------------------------------------------------ the command


def main() -> None:
    """Runs a stop, or writes the pages."""
    parser = argparse.ArgumentParser("python -m tests.tour", description="The reading tour, docs/tour.md.")
    parser.add_argument("stop", type=int, nargs="?",
                        help="run the lines of this stop; without it all made blocks are written anew")
    parser.add_argument("--answer", action="store_true", help="the lines of the stop's answer too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(ROOT)                                          # where the snippets find data/
    if args.stop is not None:
        chosen = [stop for stop in stops(PAGES[0]) if stop.number == args.stop]
        if not chosen:
            parser.error(f"there is no stop {args.stop} in {PAGES[0].relative_to(ROOT)}")
        for printed in outputs(chosen[0], args.answer):
            print(printed, end="")
        return
    printed = {stop.number: list(outputs(stop)) for stop in stops(PAGES[0])}
    for page in filter(Path.exists, PAGES):
        text = page.read_text(encoding="utf-8")
        page.write_text(refreshed(text, printed), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {'unchanged' if refreshed(text, printed) == text else 'written'}")


if __name__ == "__main__":
    main()
