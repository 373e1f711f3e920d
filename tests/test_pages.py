"""Pages in two languages say the same things: their headings, commands, code and links; and what the pages on
the tutorials name of ours is there."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.test_quirks import missing
from train.run.cli import parser_of

ROOT = Path(__file__).parent.parent
PAIRS = [("README.md", "README.zh-Hant.md"),
         ("docs/from-the-articles.md", "docs/from-the-articles.zh-Hant.md")]
PAGES = [*(page for pair in PAIRS for page in pair), "docs/quirks.md", "docs/lineage.md"]
CONFIGS = {"train_diffusion": "TrainConfig", "train_clip": "TrainConfig", "sample": "SampleConfig",
           "search": "SearchConfig", "paint": "PaintConfig", "write": "WriteConfig",
           "evaluate": "EvaluateConfig", "evaluate_strokes": "EvaluateConfig"}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Indented lines, without what is said beside them."""
    return [line.split("  # ")[0].rstrip() for line in re.findall(r"^    (\S.*)$", text, flags=re.M)]


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", head).lower()) for head in heads)
    return {head.replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        link = "".join(target)
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), link


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


def test_the_articles_commands_have_these_flags() -> None:
    seen = 0
    for command in commands(read(PAIRS[1][0])):
        match = re.match(r"python -m train\.(\w+) (.*)", command)
        if match:
            config = getattr(import_module(f"train.{match[1]}"), CONFIGS[match[1]])
            flags = {option for action in parser_of(config, "")._actions for option in action.option_strings}
            assert set(re.findall(r"--[\w-]+", match[2])) <= flags, command
            seen += 1
    assert seen >= 9
