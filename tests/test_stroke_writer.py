"""The stroke writer: tokens and back, the same training loop, its files, what it refuses, and its figures."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from miniclip.weights import WeightsError
from tests.test_train_diffusion import fails
from train import evaluate_strokes, strokes, train_diffusion, write
from train.data.strokes import Character, Stroke, read_character, write_character
from train.errors import DataError
from train.evaluate_strokes import aligned, assignment, in_order, score, warp
from train.strokes import StrokeWriter, affine_tokens, character_of, lines_of, load_writer, tokens_of
from train.train_diffusion import TrainConfig
from train.write import WriteConfig

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data" / "strokes"
TINY = TrainConfig(data=str(DATA), steps=3, batch=4, samples=1, sample_steps=2, device="cpu")


@pytest.fixture(scope="module")
def real() -> list[Character]:
    return strokes.read_strokes(DATA)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for three steps: it writes scribbles, but writes."""
    out = tmp_path_factory.mktemp("strokes") / "run"
    train_diffusion.main(dataclasses.replace(TINY, out=str(out)))
    return out


# ----------------------------------------------------------------------------------------------------- tokens


def test_cosines_are_orthonormal() -> None:
    rows = strokes.cosines().double()
    assert (rows @ rows.T - torch.eye(len(rows)).double()).abs().max() < 2e-6


def test_tokens_give_the_strokes_back(real: list[Character]) -> None:
    tokens, scaling = tokens_of(real)
    assert tokens.shape == (len(real), strokes.FEATURES, scaling.most, 1)
    for character, lines in zip(real, lines_of(tokens, scaling), strict=True):
        back = character_of(lines, character.char, character.hand)
        assert len(back.strokes) == len(character.strokes)
        for here, there in zip(back.strokes, character.strokes, strict=True):
            original = strokes.resample(there.points, strokes.POINTS)
            assert np.abs(here.points - original).mean() < 0.005    # ten coefficients round sharp corners


def test_tokens_are_scaled(real: list[Character]) -> None:
    tokens, _ = tokens_of(real)
    there = tokens.squeeze(-1).transpose(1, 2)[tokens[:, -1, :, 0] > 0][:, :-1]
    assert there.mean(0).abs().max() < 1e-5 and there.std(0).max() < 1 + 1e-5
    absent = tokens.squeeze(-1).transpose(1, 2)[tokens[:, -1, :, 0] < 0][:, :-1]
    assert len(absent) and not absent.any()


def test_an_affine_change_of_tokens_is_one_of_points(real: list[Character]) -> None:
    tokens, scaling = tokens_of(real)
    u = torch.rand(len(real), 6, generator=torch.Generator().manual_seed(0))
    before, after = (lines_of(t, scaling) for t in (tokens, affine_tokens(tokens, u, scaling)))
    for old, new in zip(before, after, strict=True):
        there = old[:, 0, 3] > 0
        assert torch.equal(there, new[:, 0, 3] > 0)
        points = torch.cat([old[there][..., :2], torch.ones_like(old[there][..., :1])], -1).flatten(0, 1)
        moved = new[there][..., :2].flatten(0, 1)
        change = torch.linalg.lstsq(points, moved).solution
        assert (points @ change - moved).abs().max() < 1e-4
        assert 0.001 < (change[:2] - torch.eye(2)).abs().max() < 0.2
        assert (old[..., 2] - new[..., 2]).abs().max() < 1e-6       # the brush keeps its width


# ---------------------------------------------------------------------------------------- the loop, and files


def test_a_run_saves_and_loads(run: Path, tmp_path: Path) -> None:
    model = load_writer(run)
    assert isinstance(model, StrokeWriter)
    model.save(tmp_path)
    again = StrokeWriter.load(tmp_path)
    first, second = (m.characters(["春 楷書", "滿 重楷"], seed=1, steps=2) for m in (model, again))
    assert [len(c.strokes) for c in first] == [len(c.strokes) for c in second]
    for a, b in zip(first, second, strict=True):
        assert all(np.array_equal(x.points, y.points) and np.array_equal(x.widths, y.widths)
                   for x, y in zip(a.strokes, b.strokes, strict=True))


def test_the_loss_falls(tmp_path: Path) -> None:
    train_diffusion.main(dataclasses.replace(TINY, out=str(tmp_path / "run"), steps=40, batch=14))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, rows) if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("changes, message", [
    ({"most": 0}, "most must be 1 to 64"), ({"most": 65}, "most must be 1 to 64"),
    ({"captions": [3]}, "captions a list of texts"), ({"mean": [0.0]}, "31 numbers each"),
    ({"mean": [float("nan")] * 31}, "31 numbers each"), ({"deviation": [0.0] * 31}, "the latter above 0")])
def test_a_broken_strokes_json_is_one_line(run: Path, tmp_path: Path, changes: dict, message: str) -> None:
    StrokeWriter.load(run).save(tmp_path)
    file = tmp_path / "strokes.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(WeightsError, match=message) as error:
        StrokeWriter.load(tmp_path)
    assert str(file) in str(error.value)


def test_a_folder_without_strokes_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no HAND/CHARACTER.json"):
        strokes.read_strokes(tmp_path)


# ---------------------------------------------------------------------------------------------------- writing


def test_write_leaves_every_file_and_the_same_seed_the_same_bytes(run: Path, tmp_path: Path) -> None:
    def files(name: str, seed: int) -> dict[str, bytes]:
        write.main(WriteConfig(run=str(run), text="春坤", hand="楷書", seed=seed, size=48, steps=2,
                               out=str(tmp_path / name)))
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

    first, again, other = files("a", 7), files("b", 7), files("c", 8)
    assert sorted(first) == sorted(["春坤.gif", "春坤.png", *(f"{char}{end}" for char in "春坤" for end in
                                                           (".svg", ".json", "_stages.png"))])
    assert first == again
    assert first["春.json"] != other["春.json"] and first["春坤.gif"] != other["春坤.gif"]
    assert read_character(tmp_path / "a" / "春.json").hand == "楷書"


def test_a_text_is_written_from_left_to_right(run: Path, tmp_path: Path) -> None:
    write.main(WriteConfig(run=str(run), text="春坤", size=48, steps=2, out=str(tmp_path)))
    with Image.open(tmp_path / "春坤.gif") as gif:
        assert gif.size == (96, 48)
        frames = []
        for k in range(gif.n_frames):
            gif.seek(k)
            frames.append(np.array(gif.convert("L"), dtype=int))
    left = [frame[:, :48] for frame in frames]
    right_begins = next(k for k, frame in enumerate(frames) if (frame[:, 48:] != frames[0][:, 48:]).any())
    assert all((frame == left[-1]).all() for frame in left[right_begins:])
    assert all((after <= before).all() for before, after in zip(frames, frames[1:]))    # ink only comes


@pytest.mark.parametrize("changes, message", [
    ({"text": "龍"}, "never saw 龍; it knows"), ({"hand": "草書"}, "joins its strokes"),
    ({"hand": "行書", "text": "滿"}, "knows 滿 in"), ({"text": ""}, "must be 1 to 8 characters"),
    ({"text": "春" * 9}, "must be 1 to 8 characters"), ({"run": "nowhere"}, "no run on strokes"),
    ({"size": 8}, "--size"), ({"seed": -1}, "--seed")])
def test_what_cannot_be_written_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture,
                                            changes: dict, message: str) -> None:
    cfg = WriteConfig(**({"run": str(run), "out": str(tmp_path / "out")} | changes))
    assert message in fails(write.main, cfg, capsys)
    assert not (tmp_path / "out").exists()


def test_a_writer_that_writes_nothing_says_so(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StrokeWriter.load(run)
    monkeypatch.setattr(StrokeWriter, "characters", lambda *_, **__: [Character("春", "楷書", [])])
    with pytest.raises(strokes.UserError, match="wrote no stroke of 春"):
        strokes.written(model, "春", "楷書", 0)


# ---------------------------------------------------------------------------------------------------- figures


def test_the_assignment_is_the_best_of_all_permutations() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 5, 6):
        for _ in range(10):
            cost = rng.random((n, n))
            best = min(itertools.permutations(range(n)), key=lambda p: sum(cost[i, p[i]] for i in range(n)))
            assert assignment(cost) == list(best)


def test_order_is_right_only_in_order_and_direction(real: list[Character]) -> None:
    character = next(c for c in real if c.char == "春" and c.hand == "楷書")
    assert in_order(character, character)
    first, second, *rest = character.strokes
    assert not in_order(character._replace(strokes=[second, first, *rest]), character)
    assert not in_order(character._replace(strokes=character.strokes[::-1]), character)


def test_a_stroke_against_its_direction_costs_more() -> None:
    down = np.stack([np.full(24, 0.5), np.linspace(0.2, 0.8, 24)], 1).astype(np.float32)[None]
    there, against = (evaluate_strokes.costs(way, down)[0, 0] for way in (down, down[:, ::-1]))
    assert there == 0 and against > evaluate_strokes.BACKWARDS


def test_warping_forgives_pace_and_alignment_an_affine_change() -> None:
    t = np.linspace(0, 1, 24)
    even, hurried = np.stack([t, t * 0], 1), np.stack([t**2, t * 0], 1)
    assert warp(even, even) == 0 and warp(even, even + [0, 0.1]) == pytest.approx(0.1)
    assert warp(even, hurried) < 0.02 < np.linalg.norm(even - hurried, axis=1).mean()
    bend = np.stack([t, np.sin(3 * t)], 1)[None]
    turned = bend @ np.array([[0.9, 0.1], [-0.2, 1.1]]) + 0.05
    assert np.abs(aligned(turned, bend) - bend).max() < 1e-9


def test_score_of_the_models_themselves_and_of_a_stroke_too_many(real: list[Character]) -> None:
    known = {f"{c.char} {c.hand}": c for c in real}
    scores = score(real, list(known), known)
    assert scores.count_right == scores.order_right == 1 and scores.to_model < 1e-6
    extra = [c._replace(strokes=[*c.strokes, Stroke(c.strokes[0].points, c.strokes[0].widths)]) for c in real]
    assert score([*extra[:7], *real[7:]], list(known), known).count_right == 0.5


def test_evaluate_strokes_prints_a_table(run: Path, capsys: pytest.CaptureFixture) -> None:
    evaluate_strokes.main(evaluate_strokes.EvaluateConfig(run=str(run), data=str(DATA), count=4, steps=2))
    out = capsys.readouterr().out
    assert "4 characters of 14 captions" in out and "stroke count right" in out


def test_evaluate_strokes_sets_unseen_pairs_apart(run: Path, tmp_path: Path, real: list[Character],
                                                  capsys: pytest.CaptureFixture) -> None:
    assert "滿 行書" not in [f"{c.char} {c.hand}" for c in real]
    (tmp_path / "行書").mkdir()
    for name in ("滿", "春"):
        character = next(c for c in real if c.char == name)._replace(hand="行書")
        write_character(character, tmp_path / "行書" / f"{name}.json")
    evaluate_strokes.main(evaluate_strokes.EvaluateConfig(run=str(run), data=str(tmp_path), count=2, steps=2))
    out = capsys.readouterr().out
    assert "2 characters of 1 captions of the run" in out and "2 characters of 1 captions it never saw" in out
