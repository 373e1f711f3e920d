"""What a run's numbers say in words, and several runs on one page."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest

from miniclip.weights import WeightsError
from train import compare, report
from train.errors import UserError
from train.report import curve, curves, diagnose, log_ticks, ticks


def rows(loss, steps: int = 200, **more) -> list[dict]:
    return [{"step": s, "loss": loss(s), "grad_norm": 1.0, "lr": 1.0, **{k: f(s) for k, f in more.items()}}
            for s in range(steps)]


def falling(step: int) -> float:
    return math.exp(-step / 60)


@pytest.mark.parametrize("metrics,words", [
    (rows(falling), ""),
    (rows(lambda s: max(math.exp(-s / 10), 0.4)), "Plateau: the smoothed loss is 0.4"),
    (rows(lambda s: math.nan if s == 7 else falling(s)),
     "Not a number: the loss is nan at step 7 and 1 times"),
    (rows(falling, grad_norm=lambda s: math.inf if s > 197 else 1.0),
     "gradient norm is inf at step 198 and 2 times"),
    (rows(lambda s: 2.07, 60, blind=lambda s: math.log(8)), "Not learning: the loss sits at 2.079"),
    (rows(falling, blind=lambda s: math.log(8)), ""),
    (rows(falling, logit_scale=lambda s: min(math.log(100), 2 + s / 20)),
     "Dead temperature: logit_scale has been 4.605 since"),
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
    for title in ("Training loss", "Validation", "Validation by timestep a", "Gradient norm", "Learning rate",
                  "Throughput",
                  "Memory"):
        assert f"<h2>{title}</h2>" in page
    assert "timestep 99" in page and "Temperature" not in page


def run_folder(folder: Path, metrics: list[dict], **config) -> str:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"steps": 200, "out": str(folder), **config}),
                                        encoding="utf-8")
    for name in ("metrics.jsonl", "speed.jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in metrics if name == "metrics.jsonl")
        # torn: the run goes on
        (folder / name).write_text(text + '{"step": 9, "lo', encoding="utf-8")
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
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(WeightsError, match="config.json: cannot be read"):
        compare.main([folder], str(tmp_path / "page.html"))


@pytest.mark.parametrize("line, words", [
    (b"[3]", "expected a JSON object"), (b"3", "expected a JSON object"), (b"", "not JSON"),
    (b'{"step": 1, "lo', "not JSON"), (b"\xff\xfe", "not UTF-8"), (b"\0" * 50, "not JSON"),
    (b'{"loss": 1}', "no step"), (b'{"step": "1"}', "'step' = '1' is not a number"),
    (b'{"step": true}', "'step' = True is not a number"), (b'{"step": -1}', "step = -1"),
    (b'{"step": 1.5}', "step = 1.5"), (b'{"step": 10000000000}', "step = 10000000000"),
    (b'{"step": 1, "loss": "low"}', "'loss' = 'low' is not a number"),
    (b'{"step": 1, "loss": [1, 2]}', r"'loss' = \[1, 2\] is not a number"),
    (b'{"step": 1, "loss": null}', "'loss' = None is not a number"),
    (b'{"step": 1, "loss": {"a": 1}}', "is not a number"), (b'{"step": 1, "loss": 1e300}', "1e[+]300 is not"),
    (b'{"step": 1, "loss": ' + b"9" * 5000 + b"}", "too large"),
    (b'{"step": 1, "loss": "' + b"x" * 100_000 + b'"}', "is not a number"),
    (b'{"step": 1, "' + b"x" * 100_000 + b'": "x"}', "is not a number"),
    (b"[" * 100_000, "nested too deeply"),
])
@pytest.mark.parametrize("name", ["metrics.jsonl", "speed.jsonl"])
def test_a_damaged_row_is_one_line_with_its_number(tmp_path: Path, name: str, line: bytes,
                                                   words: str) -> None:
    folder = run_folder(tmp_path / "a", rows(falling, 3))
    (tmp_path / "a" / name).write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(WeightsError, match=rf"{name}, line 2: .*{words}") as caught:
        compare.main([folder], str(tmp_path / "page.html"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    assert not (tmp_path / "page.html").exists()


def test_what_a_run_may_write_is_drawn(tmp_path: Path) -> None:
    """Losses that are no numbers, or as large as float32 has them, in any place."""
    extremes = (math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 0, -0.0, 10**38)
    names = ("loss", "val", "val_99", "grad_norm", "lr", "logit_scale", "blind", "image_to_text_R@1")
    rng = random.Random(1)
    for i in range(60):
        metrics = [{"step": step * 10**rng.randint(0, 7), **{name: rng.choice(extremes) for name in names}}
                   for step in range(rng.randint(0, 40))]
        compare.main([run_folder(tmp_path / str(i), metrics)], str(tmp_path / "page.html"))


@pytest.mark.parametrize("text, words", [
    ('{"lr": [1]}', r"'lr' = \[1\]: no setting"), ('{"lr": {"a": 1}}', "no setting"),
    ('{"lr": 1e300}', "no setting"), ('{"data": "' + "x" * 20_000 + '"}', "no setting"),
    (r'{"data": "a\nb"}', "no setting"),
    ('{"lr": NaN}', "no setting"), ("[]", "JSON object"), ('{"lr": ' + "9" * 5000 + "}", "too large"),
])
def test_settings_that_no_run_has(tmp_path: Path, text: str, words: str) -> None:
    folder = run_folder(tmp_path / "a", rows(falling, 3))
    (tmp_path / "a" / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=f"config.json: .*{words}") as caught:
        compare.main([folder], str(tmp_path / "page.html"))
    assert len(str(caught.value)) < 600


# ------------------------------------------------------------------------------------------------------- axes


def drawn(lines: dict, log: bool = True) -> tuple[str, list[str], list[str]]:
    """A plot with the texts beside its y axis, from below, and those under its x axis."""
    svg = curve(lines, "step", "MiB", log)
    return svg, *(re.findall(f'text-anchor="{side}">([^<]*)</text>', svg) for side in ("end", "middle"))


AXES = [    # lowest and highest value, logarithmic or not, what is to be written there
    (1380, 1421, False, "1,380 1,390 1,400 1,410 1,420 1,430"),
    (2.0601, 2.0644, False, "2.060 2.061 2.062 2.063 2.064 2.065"),
    (1400, 1400, False, "0 500 1,000 1,500"), (0, 0, False, "0.0 0.2 0.4 0.6 0.8 1.0"),
    (-0.2, 0.1, False, "-0.2 -0.1 0.0 0.1"), (0, 2e7, False, "0 5.0e6 1.0e7 1.5e7 2.0e7"),
    (1e-9, 3e-9, False, "1.0e-9 1.5e-9 2.0e-9 2.5e-9 3.0e-9"),
    (0.28, 0.33, True, "0.28 0.29 0.30 0.31 0.32 0.33"), (0.06, 0.4, True, "0.05 0.1 0.2 0.5"),
    (0.0193, 1.01, True, "0.01 0.02 0.05 0.1 0.2 0.5 1 2"), (0.5, 0.5, True, "0.1 0.2 0.3 0.4 0.5"),
    (3e-5, 2500, True, "0.0001 0.01 1 100"), (800, 12000, True, "500 1,000 2,000 5,000 10,000 20,000"),
]  # fmt: skip


@pytest.mark.parametrize("low, high, log, texts", AXES)
def test_axes_have_round_numbers(low: float, high: float, log: bool, texts: str) -> None:
    svg, found, _ = drawn({"a": [(0, low), (30, high)]}, log)
    assert found == texts.split(" ") and ("MiB, log scale" in svg) == log


@pytest.mark.parametrize("log", [False, True])
def test_axes_tell_apart_what_they_enclose(log: bool) -> None:
    """Whatever the numbers: no text twice, each says where it stands, no line leaves the axes."""
    rng = random.Random(0)
    for _ in range(300):
        low = 10 ** rng.uniform(-8, 8)
        high = low * 10 ** (10 ** rng.uniform(-5, 1))
        marks = (log_ticks if log else ticks)(low, high)
        assert 2 <= len({text for _, text in marks}) == len(marks) <= 8
        assert all(float(text.replace(",", "")) == pytest.approx(value, rel=1e-6) for value, text in marks)
        svg, _, under = drawn({"a": [(3, low), (rng.randint(4, 10**6), high), (3, low)]}, log)
        heights = [float(y) for y in re.findall(r',([-\d.]+)[ "]', re.search('points="[^"]*"', svg)[0])]
        assert all(report.ABOVE - 0.1 <= y <= report.HEIGHT - report.BELOW + 0.1 for y in heights)
        assert len(set(under)) == len(under)
        assert all(text.replace(",", "").isdigit() for text in under[:-1])          # the last is "step"


def test_letters_can_be_read_on_a_phone() -> None:
    """390 pixels wide, of which the page's margins take 32."""
    svg = curve({"甲": [(0, 1.0), (1, 2.0)]}, "step", "loss")
    width, size = (float(re.search(p, svg)[1]) for p in (r'viewBox="0 0 (\d+) ', r'font-size="(\d+)"'))
    assert size * (390 - 32) / width >= 11 and svg.count("font-size") == 1
    assert "svg { display: block; width: 100%" in report.STYLE
