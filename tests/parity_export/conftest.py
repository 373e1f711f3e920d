"""What the tests of exports share: the exported folders, made once, and a table of the largest errors."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch

import miniclip.export
import minidiff.export
from miniclip.graphs import OF_TORCH
from tests.parity_export.models import DIFFUSION, MAKERS

ERRORS: dict[tuple[str, ...], float] = defaultdict(float)   # (model, format, graph, runtime) -> the largest


SHORT = {"run", "clip"}                                     # the kinds of model that --short leaves


def pytest_addoption(parser: pytest.Parser) -> None:
    """--short: one kind of each pipeline, onnx and int8."""
    parser.addoption("--short", action="store_true", help="one kind of each pipeline, onnx and int8")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what --short does."""
    if config.getoption("--short"):
        named = [(item, getattr(item, "callspec", None)) for item in items]
        items[:] = [item for item, spec in named if spec and spec.params.get("name") in SHORT
                    and spec.params.get("format") not in OF_TORCH]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """folders(model, format) -> the model's folder and its export."""
    root, done = tmp_path_factory.mktemp("exports"), {}

    def exported(name: str, format: str) -> tuple[Path, Path]:
        if (name, format) not in done:
            model, out = root / name, root / f"{name}-{format}"
            if not model.exists():
                torch.manual_seed(0)
                MAKERS[name](model)
            command = minidiff.export.main if name in DIFFUSION else miniclip.export.main
            assert command(["--model", str(model), "--format", format, "--out", str(out)]) == 0
            done[name, format] = model, out
        return done[name, format]

    return exported


@pytest.fixture
def note():
    """note(*where, error): keeps the largest error of each place for the table."""
    def keep(*where: str, error: float) -> float:
        ERRORS[where] = max(ERRORS[where], error)
        return error

    return keep


def pytest_terminal_summary(terminalreporter) -> None:
    """The table: one line a graph."""
    terminalreporter.write_line("largest relative errors")
    for where, error in sorted(ERRORS.items()):
        terminalreporter.write_line("  ".join(f"{part:13}" for part in where) + f"  {error:.1e}")
