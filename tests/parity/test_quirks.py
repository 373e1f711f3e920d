"""docs/quirks.md: what it names of diffusers, transformers and open_clip is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "quirks.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`((?:diffusers|transformers|open_clip)\.[\w.]+)`", PAGE)))


def found(name: str) -> object:
    """What a dotted name stands for: a module, then attributes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            thing = getattr(thing, part)
        return thing
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_upstream_has_it(name: str) -> None:
    assert callable(found(name))
