"""What make bench does with its measurements: pairs, ratios, refusals, and a page made of rows alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.bench import measure, page
from tests.bench.measure import Compared, Disagree, Timed

ANSWER = [torch.ones(2, 3), torch.arange(3.0)]


def runs(*seconds: float, memory: float | None = None) -> list[Timed]:
    return [Timed(s, 2 * s, (), memory) for s in seconds]


def sample(threads: int = 1) -> dict:
    """A row of unet1 with made-up seconds: ours 2, diffusers 3, tuned 2.5, OpenVINO 1.9."""
    peers = {"diffusers": 3.0, "diffusers, tuned": 2.5, "diffusers, compiled": 1.0, "OpenVINO": 1.9}
    compared = {name: Compared(runs(2, 2), runs(s, s), [1e11], 2e-6) for name, s in peers.items()}
    machine = {"cpu": "A CPU", "threads": threads, "versions": {"torch": "2.4"}}
    return {"title": "a UNet", **measure.row(compared, 1.6e11), "date": "2030-01-02", "machine": machine}


def test_a_ratio_is_the_median_of_the_pairs_and_not_of_the_seconds() -> None:
    compared = Compared(runs(1, 2, 10), runs(6, 2, 20), [1e9, 3e9, 2e9], 0.0)
    found = measure.row({"other": compared}, 4e9)
    other, = found["peers"]
    assert found["ours"] == {"cpu": 2, "wall": 4} and (other["cpu"], other["wall"]) == (6, 12)
    assert other["cpu_ratio"] == other["wall_ratio"] == 2               # of 6, 1 and 2
    assert found["rate"] == 2e9 and found["share"] == pytest.approx(4 / 2 / 2)


def test_the_most_memory_counts() -> None:
    assert measure.medians(runs(1, memory=3.0) + runs(2, 3, memory=1.0))["memory"] == 3


def test_pairs_run_turn_and_turn_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "matrix_rate", lambda: 1.0)
    order: list[str] = []
    ours, theirs = ((lambda name=name: order.append(name) or ANSWER) for name in "ab")
    found = measure.alternate(ours, theirs, 3, 1e-5)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"                  # a warm-up and three pairs
    assert len(found.ours) == len(found.theirs) == len(found.rates) == 3 and found.difference == 0


@pytest.mark.parametrize("wrong", [[ANSWER[0] * 1.01, ANSWER[1]], [ANSWER[0] * float("nan"), ANSWER[1]],
                                   ANSWER[:1], [ANSWER[0].T, ANSWER[1]]])
def test_answers_that_disagree_are_refused(wrong: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "matrix_rate", lambda: 1.0)
    with pytest.raises(Disagree):
        measure.alternate(lambda: wrong, lambda: ANSWER, 1, 1e-3)


def test_a_later_answer_that_disagrees_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "matrix_rate", lambda: 1.0)
    answers = iter([ANSWER, ANSWER, [a + 1 for a in ANSWER]])
    with pytest.raises(Disagree, match="differ by"):
        measure.alternate(lambda: next(answers), lambda: ANSWER, 2, 1e-5)


def test_targets_are_held_against_the_fastest_peer_but_not_the_compiled_one() -> None:
    lines = page.targets({"unet1": sample()})[2:]
    assert lines == ["| unet1 | 1.35 x diffusers | 1.25 | **not reached** |",
                     "| unet1 | 1 x OpenVINO | 0.95 | **not reached** |",
                     "| unet1 | 75 % of the matrix rate | 80% | reached |"]


def test_a_row_that_is_behind_stays_in_its_table() -> None:
    lines = page.table("unet1", sample())
    assert "| OpenVINO | 1.9 | 3.8 | 0.95 | 2e-06 |  |" in lines
    assert "| diffusers, compiled | 1 | 2 | 0.50 | 2e-06 |  |" in lines
    assert lines[-1] == "Pairs: 2. 160 GFLOP a run: 80% of the matrix rate, 100 GFLOP/s."


def test_with_more_threads_wall_time_counts() -> None:
    row = sample(threads=2)
    row["peers"][0]["wall_ratio"] = 7.0
    assert page.ratio(row, row["peers"][0]) == 7 and page.ratio(sample(), sample()["peers"][0]) == 1.5


def test_a_partial_run_replaces_only_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    page.store(file, "unet1", sample())
    page.store(file, "unet2", {**sample(), "title": "two"})
    changed = copy.deepcopy(sample())
    changed["ours"]["cpu"] = 1.2345
    page.store(file, "unet1", changed)
    text = file.read_text(encoding="utf-8")
    assert page.read(file.with_suffix(".json")) == {"unet1": changed, "unet2": {**sample(), "title": "two"}}
    assert "| ours | 1.23 |" in text and "## unet2: two" in text and text.count("## unet1") == 1
    assert "unet1 (2030-01-02), unet2 (2030-01-02) | A CPU, 1 thread | torch 2.4" in text


def test_the_committed_page_holds_no_number_typed_by_hand() -> None:
    file = Path(__file__).parent.parent / "docs" / "benchmarks.md"
    assert file.read_text(encoding="utf-8") == page.render(page.read(file.with_suffix(".json")))
