"""Docs that cannot drift: the tour's code, output, counts and commands; links and anchors of every page."""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tour

ROOT = tour.ROOT
TOUR, TOUR_ZH = tour.PAGES
PAGES = sorted([*ROOT.glob("README*.md"), ROOT / "SECURITY.md", *ROOT.glob("docs/**/*.md")])
WITH_COMMANDS = sorted([*ROOT.glob("README*.md"), TOUR, TOUR_ZH])
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
OWN = {"minidiff", "miniclip", "train", "data", "tests"}
FENCE = re.compile(r"^(```+)[^\n]*\n.*?^\1 *$", re.DOTALL | re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --------------------------------------------------------------------------------------------------- the tour


@pytest.fixture(scope="module")
def printed() -> dict[int, list[str]]:
    """What each snippet of the English page prints, by its stop."""
    return {stop.number: list(tour.outputs(stop)) for stop in tour.stops(TOUR)}


@pytest.mark.parametrize("page", tour.PAGES, ids=name_of)
def test_code_in_the_tour_is_that_of_the_source(page: Path) -> None:
    """Else: python -m tests.tour."""
    found = tour.CODE.findall(text_of(page))
    assert len(found) >= 18 and text_of(page).count("<!-- code:") == len(found)
    for marker, code in found:
        assert code == tour.excerpt(marker)
        assert 3 <= len(code.splitlines()) - 1 <= 15, f"{marker}: too short to tell, or too long to read"


def alike(printed: str, page: str) -> bool:
    """The same text, the numbers in it to a fiftieth or 0.02: another processor adds up in another order."""
    number = re.compile(r"-?\d+(?:\.\d+)?")
    near = [abs(float(a) - float(b)) <= max(0.02, 0.02 * abs(float(b))) if "." in b else a == b
            for a, b in zip(number.findall(printed), number.findall(page))]
    words = [number.sub("#", text).split() for text in (printed, page)]
    return words[0] == words[1] and all(near)


@pytest.mark.parametrize("page", tour.PAGES, ids=name_of)
def test_the_tour_prints_what_it_says(page: Path, printed: dict[int, list[str]]) -> None:
    for stop in tour.stops(page):
        for made, (code, shown, _) in zip(printed[stop.number], stop.snippets, strict=True):
            assert alike(made, shown or ""), f"stop {stop.number} prints\n{made}\nnot\n{shown}"
            assert shown or not made, f"stop {stop.number}: no output is shown of\n{code}"


@pytest.mark.parametrize("page", tour.PAGES, ids=name_of)
def test_the_lines_of_one_prediction_are_counted(page: Path) -> None:
    (rows,) = tour.LINES.findall(text_of(page))
    assert rows == tour.table(rows)
    assert tuple(re.findall(r"^\| \[(\S+)\]", rows, re.MULTILINE)) == tour.PREDICTION
    assert len(tour.PREDICTION) <= 5
    others = {"miniclip/output.py", "miniclip/habits.py"}            # that the page names below its table
    assert set(tour.executed_lines()) == {*tour.PREDICTION, *others}


def test_both_tours_have_the_same_stops() -> None:
    ours, theirs = tour.stops(TOUR), tour.stops(TOUR_ZH)
    assert [stop.number for stop in ours] == list(range(1, len(ours) + 1)) and 14 <= len(ours) <= 18
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert (one.number, one.minutes) == (other.number, other.minutes)
        assert [code for code, *_ in one.snippets] == [code for code, *_ in other.snippets]
        assert one.body.count("<details>") == other.body.count("<details>") == 1, one.title
    for part in (r"<!-- code: .*? -->", r'<a id="[^"]*">', r"\]\((?!tour)([^)]*)\)", r"tests\.tour \d+"):
        assert re.findall(part, text_of(TOUR)) == re.findall(part, text_of(TOUR_ZH)), part
    assert list(commands(TOUR)) == list(commands(TOUR_ZH))
    assert tables(TOUR) == tables(TOUR_ZH)


def tables(page: Path) -> list[tuple[int, list[str]]]:
    """Of each table, how many rows it has, and what in it stands in backquotes."""
    found = re.findall(r"(?:^\|.*\n)+", text_of(page), re.MULTILINE)
    return [(table.count("\n"), re.findall("`[^`]*`", table)) for table in found]


@pytest.mark.parametrize("page", tour.PAGES, ids=name_of)
def test_the_minutes_of_the_tour_add_up(page: Path) -> None:
    said = re.search(r"\*\*(\d+) (?:minutes|分鐘)\*\*", text_of(page))[1]
    assert int(said) == sum(stop.minutes for stop in tour.stops(page))


@pytest.mark.parametrize("page", tour.PAGES, ids=name_of)
def test_each_stop_runs_its_own_lines(page: Path) -> None:
    for stop in tour.stops(page):
        assert f"`python -m tests.tour {stop.number}`" in stop.body
        assert tour.CODE.search(stop.body) and any(not hidden for *_, hidden in stop.snippets), stop.title


# ------------------------------------------------------------------------------------------------------ links


def prose(text: str) -> str:
    """A page without its code."""
    text = FENCE.sub("", text)
    text = re.sub(r"^( {4}|\t).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """What a link may name after #: explicit ids, and headings as GitHub slugs them."""
    text = FENCE.sub("", text_of(page))
    found, times = set(re.findall(r'\bid="([^"]+)"', text)), Counter()
    for title in re.findall(r"^#{1,6} +(.*?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").replace("*", "").lower()
        kept = [c for c in plain if c in "-_ " or unicodedata.category(c)[0] in "LNM"]
        slug = "".join(kept).replace(" ", "-")
        found.add(f"{slug}-{times[slug]}" if times[slug] else slug)
        times[slug] += 1
    return found


def links(page: Path) -> Iterator[str]:
    text = prose(text_of(page))
    yield from re.findall(r"\]\(<?([^)>\s]+)>?\)", text)
    yield from re.findall(r'\b(?:src|href)="([^"]+)"', text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_anchors_resolve(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):               # https: and the like
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT.resolve()), f"{name_of(page)}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name_of(page)}: {link}"


# --------------------------------------------------------------------------------------------------- commands


def code_of(page: Path) -> Iterator[str]:
    """The lines of a page's code blocks, fenced with no language or indented, and its inline code."""
    text = text_of(page)
    for fence in FENCE.finditer(text):
        head, *lines = fence[0].splitlines()[:-1]
        yield from lines if head.strip("`") in ("", "sh", "bash", "console") else []
    text = FENCE.sub("", text).replace("\\\n", " ")
    yield from re.findall(r"^(?: {4}|\t)(.*)$", text, re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^( {4}|\t).*$", "", text, flags=re.MULTILINE))


def commands(page: Path) -> Iterator[tuple[str, ...]]:
    """Words of the commands that a page quotes, from the module's name or from `make` on."""
    for line in code_of(page):
        python = re.search(r"(?:^|[\s/])python3? -m ([\w.]+)(.*)", line)
        if python:
            yield "-m", python[1], *words(python[2])
        elif line.startswith("make "):
            yield "make", *words(line.removeprefix("make "))


def words(line: str) -> list[str]:
    return [word for word in shlex.split(re.sub(r"<[^>]*>", "PLACE", line), comments=True) if word != "..."]


QUOTED = sorted({command for page in WITH_COMMANDS if page.exists() for command in commands(page)})


class Parsed(BaseException):
    """A command's arguments were accepted; nothing has run yet."""


@pytest.mark.parametrize("command", QUOTED, ids=" ".join)
def test_quoted_commands_exist_and_take_their_flags(command: tuple[str, ...], monkeypatch, tmp_path) -> None:
    if command[0] == "make":
        targets = [word for word in command[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE) for name in targets), command
        return
    module = command[1]
    assert importlib.util.find_spec(module), f"there is no module {module}"
    if module.split(".")[0] not in OWN or len(command) == 2:
        return
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, args=None, namespace=None) -> None:
        parse(self, args, namespace)
        raise Parsed

    source = Path(importlib.util.find_spec(runnable(module)).origin).read_text(encoding="utf-8")
    assert "parse_" in source, f"{module} takes no flags"       # else it would run here
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Parsed):                                 # SystemExit: a flag or a value is refused
        run(command)


def runnable(module: str) -> str:
    """What python -m runs."""
    package = importlib.util.find_spec(module).submodule_search_locations
    return f"{module}.__main__" if package else module


def run(command: tuple[str, ...], *more: str) -> None:
    """python -m, in this process, with a fresh copy of the script."""
    before = sys.argv
    sys.argv = [command[1], *command[2:], *more]
    try:
        runpy.run_module(runnable(command[1]), run_name="__main__", alter_sys=False)
    except SystemExit as end:
        assert not end.code, f"{' '.join(command)} ends with {end.code}"
    finally:
        sys.argv = before


# What makes each of them short; the rest run as they are quoted
TINY = ("--preset", "tiny", "--size", "16", "--steps", "2", "--batch", "4", "--samples", "0",
        "--device", "cpu")
SHORT = {
    "train.train_diffusion": TINY,
    "train.sample": ("--count", "1", "--steps", "2", "--device", "cpu"),
    "train.evaluate": ("--count", "1", "--steps", "1", "--device", "cpu"),
    "train.distill": ("--steps", "1", "--batch", "4", "--points", "4", "--device", "cpu"),
    "train.train_clip": ("--size", "32", "--steps", "2", "--batch", "4", "--checks", "0", "--device", "cpu"),
    "train.search": ("--device", "cpu"),
    "minidiff": ("--steps", "2"),
}
DEMO = ("-m", "train.train_diffusion", "--data", "data/calligraphy", "--out", "out/calligraphy")


def test_the_commands_of_the_tour_run(monkeypatch, tmp_path: Path, capsys) -> None:
    """Each as it is quoted, with fewer steps and smaller images; `make` runs in .ci/run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    run(DEMO, *TINY)                                            # what `make demo` leaves
    quoted = [c for c in dict.fromkeys(commands(TOUR)) if c[0] == "-m" and "FOLDER" not in c]
    assert len(quoted) >= 12
    for command in quoted:
        if command[1] != "tests.tour":                          # those: test_the_tour_prints_what_it_says
            run(command, *SHORT.get(command[1], ()))
    assert (tmp_path / "out" / "walked" / "0000.png").exists()
    assert "ginger root" in capsys.readouterr().out
