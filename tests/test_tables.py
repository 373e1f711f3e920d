"""The READMEs say what docs/parity.json and docs/benchmarks.json say."""

import pytest

from tests.tables import READMES, ROOT, filled


@pytest.mark.parametrize("name", READMES)
def test_tables_are_those_of_the_commands(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert filled(text, name) == text, "run python -m tests.tables"


def test_a_typed_figure_is_found() -> None:
    text = (ROOT / READMES[0]).read_text(encoding="utf-8")
    cells = [line for line in text.splitlines() if line.startswith("| UNet2DConditionModel")]
    assert cells and filled(text.replace(cells[0], cells[0].replace("e-", "e-9")), READMES[0]) == text
