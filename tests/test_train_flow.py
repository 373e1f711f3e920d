"""--objective flow through the same scripts: it learns, its run folder says what it is, and it goes on with
its own kind only."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from minidiff import FlowMatchEulerDiscreteScheduler
from minidiff.schedule import Sampler
from minidiff.text_to_image import Preset, TextToImage
from tests.test_train_diffusion import fails
from train import sample, train_diffusion
from train.data.folder import CaptionedImages
from train.run import distributed
from train.sample import SampleConfig
from train.strokes import load_writer
from train.train_diffusion import TrainConfig

ROOT = Path(__file__).parent.parent
TINY = TrainConfig(data=str(ROOT / "data" / "calligraphy"), objective="flow", size=16, preset="tiny", steps=4,
                   batch=4, samples=1, sample_steps=2, device="cpu")
FLOW = "FlowMatchEulerDiscreteScheduler"


def presets(patch: pytest.MonkeyPatch, *widths: int) -> None:
    patch.setitem(train_diffusion.PRESETS, "tiny", Preset(widths, (False, True), 1, 32, 1))


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    presets(monkeypatch, 8, 16)


def train(out: Path, **changes) -> Path:
    train_diffusion.main(dataclasses.replace(TINY, out=str(out), **changes))
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of each objective."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        presets(patch, 8, 16)
        return {name: train(folder / name, objective=name) for name in ("flow", "diffusion")}


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def refused(capsys: pytest.CaptureFixture, **changes) -> str:
    return fails(train_diffusion.main, dataclasses.replace(TINY, **changes), capsys)


# --------------------------------------------------------------------------------------------------- learning


def test_one_picture_is_learned(tmp_path: Path) -> None:
    """Drawn to 20 dB after a few seconds of training."""
    folder = tmp_path / "one" / "春"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "data" / "calligraphy" / "春" / "kouzan-kaisho.png", folder)
    with pytest.MonkeyPatch.context() as patch:
        presets(patch, 16, 32)
        run = train(tmp_path / "run", data=str(folder.parent), steps=150, batch=8, jitter=False,
                    caption_drop=0.0, ema=0.9)
    written = TextToImage.load(run).sample(["春"] * 4, steps=10, guidance=1.0)
    truth = CaptionedImages(folder.parent, size=16).images()
    mse = ((written - truth) / 2).square().mean(dim=(1, 2, 3))      # of a range of 1
    assert (-10 * mse.log10()).min() >= 20
    first, *_, last = [row["val"] for row in rows_of(run) if "val" in row]
    assert last < 0.1 * first


def test_timesteps_are_spread_evenly_over_all_levels(runs: dict[str, Path]) -> None:
    cfg = dataclasses.replace(TINY, batch=20, noise_bias=1.0)
    ranks = distributed.Ranks(0, 1, torch.device("cpu"))
    data, model = train_diffusion.open_data(cfg, ranks), TextToImage.load(runs["flow"])
    batch = train_diffusion.draw(model, 0, torch.arange(20), data.images, data, cfg, ranks,
                                 torch.Generator().manual_seed(0))
    assert batch.t.is_floating_point() and (batch.t.sort().values // 50).tolist() == list(range(20))


def test_the_unet_is_given_a_thousand_sigma(monkeypatch, tmp_path: Path, runs: dict[str, Path]) -> None:
    """In sampling as in training, and the mixture at that time."""
    seen: list[float] = []
    predict = TextToImage.predict

    def spied(self, x_t, t, conditioning):
        seen.append(float(t))
        return predict(self, x_t, t, conditioning)

    monkeypatch.setattr(TextToImage, "predict", spied)
    TextToImage.load(runs["flow"]).sample(["春 草書"], steps=4)
    assert seen == [1000, 750, 500, 250]


# ------------------------------------------------------------------------------------------------ run folders


def test_a_run_folder_says_what_it_is(runs: dict[str, Path], tmp_path: Path) -> None:
    written = runs["flow"] / "model" / "scheduler" / "scheduler_config.json"
    assert json.loads(written.read_text(encoding="utf-8"))["_class_name"] == FLOW
    page = (runs["flow"] / "report.html").read_text(encoding="utf-8")
    assert "objective</td><td>flow" in page
    assert "mean squared error of eps - x0" in (runs["flow"] / "loss.svg").read_text(encoding="utf-8")
    assert "mean squared error of v" in (runs["diffusion"] / "loss.svg").read_text(encoding="utf-8")
    assert all(row["bound"] <= row["val_free"] for row in rows_of(runs["flow"]) if "val" in row)
    model = TextToImage.load(runs["flow"])
    assert type(model.scheduler) is FlowMatchEulerDiscreteScheduler
    model.save(tmp_path / "again")
    again = TextToImage.load(tmp_path / "again")
    assert torch.equal(*(m.sample(["春 草書"], steps=3) for m in (model, again)))


def test_samples_of_a_run(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample.main(SampleConfig(run=str(runs["flow"]), prompt="春", count=2, steps=3, device="cpu",
                             out=str(out)))
    assert (out / "0001.png").exists()


def test_a_writer_of_strokes(tmp_path: Path) -> None:
    run = train(tmp_path / "run", data=str(ROOT / "data" / "strokes"), steps=20, batch=14, samples=0)
    losses = [row["loss"] for row in rows_of(run) if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    writer = load_writer(run)
    assert type(writer.scheduler) is FlowMatchEulerDiscreteScheduler
    assert len(writer.characters(["春 楷書"], steps=2)) == 1


# --------------------------------------------------------------------------------------------------- its kind


def test_a_run_goes_on_with_its_own_objective(runs: dict[str, Path], tmp_path: Path, capsys) -> None:
    out = Path(shutil.copytree(runs["flow"], tmp_path / "run"))
    said = refused(capsys, out=str(out), resume=True, objective="diffusion")
    assert "--objective diffusion" in said and "give --objective flow" in said
    train(out, resume=True, steps=5)
    # a run of before there was a choice, whose settings do not name it
    out = Path(shutil.copytree(ROOT / "tests" / "fixtures" / "run_diffusion", tmp_path / "old"))
    assert "give --objective diffusion" in refused(capsys, out=str(out), resume=True)


@pytest.mark.parametrize("was, given", [("flow", "diffusion"), ("diffusion", "flow")])
def test_weights_go_on_with_their_own_objective(runs: dict[str, Path], tmp_path: Path, capsys, was: str,
                                                given: str) -> None:
    init = str(runs[was] / "model")
    said = refused(capsys, out=str(tmp_path / "run"), init=init, objective=given)
    assert f"--objective {given}: {init}" in said and f"give --objective {was}" in said
    assert not (tmp_path / "run").exists()
    run = train(tmp_path / "run", init=init, objective=was, steps=1, samples=0)
    assert (FLOW in (run / "model" / "scheduler" / "scheduler_config.json").read_text()) == (was == "flow")


def test_stable_diffusion_is_not_taught_flow(tmp_path: Path, capsys) -> None:
    (tmp_path / "sd").mkdir()
    said = refused(capsys, out=str(tmp_path / "run"), init=str(tmp_path / "sd"), channels=3, jitter=False)
    assert "--objective flow: not with --init" in said


def test_both_schedules_answer_the_same_calls(runs: dict[str, Path]) -> None:
    for run in runs.values():
        scheduler = TextToImage.load(run).scheduler
        assert isinstance(scheduler, Sampler) and len(scheduler) == 1000
        t = scheduler.timesteps_at(torch.tensor([0.3]))
        x0, eps = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        output = scheduler.training_target(x0, eps, t)
        x_t = scheduler.add_noise(x0, eps, t)
        assert torch.allclose(scheduler.predict_x0(output, x_t, t.item()), x0, atol=1e-5)
