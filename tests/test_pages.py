"""Pages in two languages say the same things: their headings, commands, code and links; and what the pages on
the tutorials name of ours is there. test_docs.py holds links and commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_quirks import missing

ROOT = Path(__file__).parent.parent
PAIRS = [("README.md", "README.zh-Hant.md"),
         ("docs/from-the-articles.md", "docs/from-the-articles.zh-Hant.md")]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Indented lines, without what is said beside them."""
    return [line.split("  # ")[0].rstrip() for line in re.findall(r"^    (\S.*)$", text, flags=re.M)]


@pytest.mark.parametrize("english,chinese", PAIRS)
def test_two_languages_have_the_same_parts(english: str, chinese: str) -> None:
    one, other = read(english), read(chinese)
    levels = [re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
              for text in (one, other)]
    assert levels[0] == levels[1]
    assert commands(one) == commands(other)
    blocks = [[re.sub(r"\s*#.*", "", block) for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)]
              for text in (one, other)]
    assert blocks[0] == blocks[1]
    spans = [sorted(set(re.findall(r"`([^`\n]+\.py)`", text))) for text in (one, other)]
    assert spans[0] == spans[1]
    links = [{link.replace(".zh-Hant", "") for link in re.findall(r"\]\(([^)#\s]+)", text)}
             for text in (one, other)]
    assert links[0] == links[1]
    for text, link in ((one, chinese), (other, english)):        # and each leads to the other, at its top
        assert f"]({Path(link).name})" in "".join(text.split("\n")[:5])


@pytest.mark.parametrize("page", PAIRS[1])
def test_each_step_has_a_command_and_lines_that_exist(page: str) -> None:
    steps = re.split(r"^### ", read(page), flags=re.M)[1:]
    assert len(steps) == 10
    for step in steps:
        places = re.findall(r"^- `([\w/]+\.py)` `([\w.]+)`$", step, flags=re.M)
        assert commands(step) and places and not missing(places), step[:40]
