"""docs/compatibility.md names every public method and argument of upstream, and says of each what is true."""

from __future__ import annotations

import re

import pytest

import miniclip
import minidiff

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

from tests.parity import compatibility  # noqa: E402


def test_every_name_has_a_row() -> None:
    assert compatibility.missing() == []


def test_the_page_is_the_one_that_the_command_makes() -> None:
    page = compatibility.PAGE.read_text(encoding="utf-8")
    versions = re.search(r"diffusers (\S+) and transformers\n(\S+);", page).groups()
    if versions == (diffusers.__version__, transformers.__version__):       # other versions have other names
        assert compatibility.page() == page


@pytest.mark.parametrize("pair", [pair for pairs in compatibility.families().values() for pair in pairs],
                         ids=lambda pair: pair[1].__name__)
def test_what_is_left_out_is_not_there(pair: tuple[type, type]) -> None:
    """A name of a left_out table is not there after all, and says its reason."""
    ours, theirs = pair
    made = ours.__new__(ours)
    out = [name for name, status, _ in compatibility.rows(ours, theirs)
           if status == compatibility.OUT and "(" not in name]
    for name in out:
        with pytest.raises(AttributeError, match="is left out"):
            getattr(made, name)


def test_what_only_objects_have() -> None:
    tokenizer = miniclip.CLIPTokenizer.train(["a"] * 3, vocab_size=520)
    objects = [tokenizer, minidiff.DDPMScheduler(), miniclip.CLIPImageProcessor()]
    found = {name for name in compatibility.ON_OBJECTS for each in objects if hasattr(each, name)}
    assert found == compatibility.ON_OBJECTS
