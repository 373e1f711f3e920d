"""What a run's numbers say in words, and several runs on one page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from train import compare
from train.common import UserError
from train.report import curves, diagnose


def rows(loss, steps: int = 200, **more) -> list[dict]:
    return [{"step": s, "loss": loss(s), "grad_norm": 1.0, "lr": 1.0, **{k: f(s) for k, f in more.items()}}
            for s in range(steps)]


def falling(step: int) -> float:
    return math.exp(-step / 60)


@pytest.mark.parametrize("metrics,words", [
    (rows(falling), ""),
    (rows(lambda s: max(math.exp(-s / 10), 0.4)), "Plateau: the smoothed loss is 0.4"),
    (rows(lambda s: math.nan if s == 7 else falling(s)), "Not a number: the loss is nan at step 7 and 1 times"),
    (rows(falling, grad_norm=lambda s: math.inf if s > 197 else 1.0), "gradient norm is inf at step 198 and 2 times"),
    (rows(lambda s: 2.07, 60, blind=lambda s: math.log(8)), "Not learning: the loss sits at 2.079"),
    (rows(falling, blind=lambda s: math.log(8)), ""),
    (rows(falling, logit_scale=lambda s: min(math.log(100), 2 + s / 20)), "Dead temperature: logit_scale has been 4.605 since"),
    (rows(falling, logit_scale=lambda s: max(0.0, 2 - s / 20)), "lower limit"),
    (rows(falling, logit_scale=lambda s: 2.66), "does not learn"),
    (rows(falling, logit_scale=lambda s: 2 + s / 200), ""),
    (rows(falling) + [{"step": s, "val": v} for s, v in ((0, 1.0), (50, 0.5), (100, 0.6))], "0.5 at step 50"),
    (rows(falling) + [{"step": s, "val": v} for s, v in ((0, 1.0), (50, 0.5), (100, 0.5))], ""),
    ([], ""),
])
def test_words(metrics: list[dict], words: str) -> None:
    said = diagnose(metrics)
    assert len(said) == (1 if words else 0) and words in "".join(said)


def test_curves_show_what_is_there() -> None:
    metrics = [{"step": 0, "val": 1.0, "val_99": 0.5, "val_free": 2.0, "val_free_99": 3.0}, *rows(falling)]
    page = "".join(curves({"a": (metrics, [{"step": 1, "pictures_per_second": 2.0, "memory_mib": 5}])}))
    for title in ("Training loss", "Validation", "Validation by timestep a", "Gradient norm", "Learning rate", "Throughput",
                  "Memory"):
        assert f"<h2>{title}</h2>" in page
    assert "timestep 99" in page and "Temperature" not in page


def run_folder(folder: Path, metrics: list[dict], **config) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"steps": 200, "out": str(folder), **config}), encoding="utf-8")
    for name in ("metrics.jsonl", "speed.jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in metrics if name == "metrics.jsonl")
        (folder / name).write_text(text + '{"step": 9, "lo', encoding="utf-8")          # torn: the run goes on
    return str(folder)


def test_runs_side_by_side(tmp_path: Path, capsys) -> None:
    a = run_folder(tmp_path / "甲", rows(falling), lr=0.1)
    b = run_folder(tmp_path / "x" / "b", rows(lambda s: 1.0), lr=0.2)
    c = run_folder(tmp_path / "y" / "b", rows(falling), lr=0.2)
    compare.main([a, b], str(tmp_path / "new" / "page.html"))
    page = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    assert "甲</text>" in page and "b</text>" in page and "<td>lr</td><td>0.1</td><td>0.2</td>" in page
    assert "<td>steps</td>" not in page and "b: Plateau" in page and "b: Plateau" in capsys.readouterr().out
    compare.main([b, c], str(tmp_path / "page.html"))
    assert f"{c}</text>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        compare.main([str(tmp_path)], str(tmp_path / "page.html"))
    folder = run_folder(tmp_path / "a", rows(falling))
    (tmp_path / "a" / "metrics.jsonl").write_text("[3]\n")
    with pytest.raises(UserError, match="not the rows"):
        compare.main([folder], str(tmp_path / "page.html"))
