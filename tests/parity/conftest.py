"""The table that closes `make parity`: the largest errors of the central tests, for docs/parity.json.

    python -m pytest tests/parity --table       # writes the file, if all of its tests were run and passed
"""

from __future__ import annotations

import datetime
import importlib.metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from miniclip.files import write_json
from tests.parity.compare import LARGEST

FILE = Path(__file__).parents[2] / "docs" / "parity.json"
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class Row(NamedTuple):
    """A line of the table: what is compared, with whom, by which test, and what of it."""

    name: str
    peer: str
    test: str
    of: str = "numbers"


ROWS = (
    Row("UNet2DConditionModel, 60 configurations", "diffusers", "test_unet.py::test_random_configuration"),
    Row("the same, all gradients", "diffusers", "test_unet.py::test_random_configuration", "gradients"),
    Row("AutoencoderKL, 12 configurations", "diffusers", "test_vae.py::test_numbers"),
    Row("six samplers, 250 configurations each", "diffusers", "test_samplers.py::test_grid"),
    Row("whole pipelines, latents of each step", "diffusers", "test_pipeline.py::test_text_to_image"),
    Row("CLIPModel, 8 configurations", "transformers", "test_clip_model.py::test_whole_model"),
    Row("the same, all gradients", "transformers", "test_clip_model.py::test_whole_model", "gradients"),
    Row("ChineseCLIPModel, 2 configurations", "transformers", "test_clip_towers.py::test_chinese_clip"),
    Row("CLIP's ResNets", "open_clip", "test_clip_towers.py::test_modified_resnet_as_open_clip"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--table."""
    parser.addoption("--table", action="store_true", help=f"write the largest errors to {FILE.name}")


def measured() -> list[dict]:
    """The rows whose tests were run, in float64 and float32."""
    found = [{"name": row.name, "peer": row.peer, "test": row.test,
              **{name: LARGEST.get((f"tests/parity/{row.test}", row.of, dtype))
                 for name, dtype in DTYPES.items()}} for row in ROWS]
    return [row for row in found if None not in row.values()]


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    """A line for each row; the file, if it is asked for and nothing failed."""
    rows = measured()
    for row in rows:
        terminalreporter.write_line(f"{row['name']:42} {row['peer']:13} {row['float64']:.0e}  "
                                    f"{row['float32']:.0e}")
    if config.getoption("--table") and exitstatus == 0 and len(rows) == len(ROWS):
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        write_json(FILE, {"date": datetime.date.today().isoformat(), "versions": versions, "rows": rows})
        terminalreporter.write_line(f"{FILE}: written; python -m tests.tables takes it into the READMEs")
