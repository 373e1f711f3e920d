"""Distillation: the teacher's step is DDIM's, guesses end where they should, and the student is a run that
draws in one step what its teacher draws in many."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minidiff import DDIMScheduler, LCMScheduler, TextToImage
from minidiff.text_to_image import Preset
from train import distill, evaluate, sample, train_diffusion
from train.distill import (
    Batch,
    DistillConfig,
    consistency_loss,
    ddim_step,
    draw,
    guess,
    open_teacher,
    student_of,
)
from train.errors import UserError
from train.evaluate import EvaluateConfig
from train.run.state import EMA
from train.sample import SampleConfig
from train.train_diffusion import TrainConfig

ROOT = Path(__file__).parent.parent
DATA = str(ROOT / "data" / "calligraphy")
PROMPTS = ["春 楷書", "坤 草書", ""]


def trained(out: Path, **changes) -> str:
    """A run on pictures of 16 x 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_diffusion.PRESETS, "tiny", Preset((16, 32), (False, True), 1, 32, 1))
        cfg = TrainConfig(data=DATA, size=16, preset="tiny", steps=100, samples=0, sample_steps=2,
                          device="cpu")
        train_diffusion.main(dataclasses.replace(cfg, out=str(out), **changes))
    return str(out)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(tmp_path_factory.mktemp("teacher") / "run")


@pytest.fixture(scope="module")
def cfg(run: str, tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """Settings of a distillation that was done."""
    cfg = DistillConfig(run=run, out=str(tmp_path_factory.mktemp("student") / "run"), steps=60, device="cpu")
    distill.main(cfg)
    return cfg


def noisy(teacher: TextToImage, place: int) -> Batch:
    x = torch.randn(3, *teacher.latent_shape, generator=torch.Generator().manual_seed(place))
    t = torch.full((3,), 83 * place - 1)
    return Batch(x, PROMPTS, t, t - 83)


@pytest.mark.parametrize("place", [12, 5, 1])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.no_grad()
def test_the_teachers_step_is_ddims(run: str, place: int, guidance: float) -> None:
    teacher = open_teacher(DistillConfig(run=run, out="nowhere"))
    batch = noisy(teacher, place)
    sampler = DDIMScheduler.from_config(teacher.scheduler.config)
    sampler.set_timesteps(12)
    free, guided = (teacher.predict(batch.x_t, batch.t, teacher.conditioning(texts))
                    for texts in ([""] * 3, PROMPTS))
    output = free + guidance * (guided - free)
    wanted = sampler.step(output, batch.t[0], batch.x_t, use_clipped_model_output=True)
    torch.testing.assert_close(ddim_step(teacher, batch, guidance), wanted.prev_sample, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_path_ends_at_itself(run: str) -> None:
    """Where no noise is left, the guess is the picture, row by row; else what the schedule says it is."""
    teacher = open_teacher(DistillConfig(run=run, out="nowhere"))
    x, t = torch.randn(3, *teacher.latent_shape), torch.tensor([-1, 499, -1])
    output = teacher.predict(x, t.clamp(min=0), teacher.conditioning(PROMPTS))
    found = guess(teacher, x, t, PROMPTS)
    assert torch.equal(found[[0, 2]], x[[0, 2]])
    torch.testing.assert_close(found[1], teacher.scheduler.predict_x0(output, x, 499)[1], rtol=0, atol=1e-5)


def test_what_is_consistent_has_no_loss(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher, and so a student, that knows the one picture there is: every point of a path leads to it."""
    teacher = open_teacher(DistillConfig(run=run, out="nowhere"))
    student = student_of(teacher, 50)
    picture = torch.rand(1, *teacher.latent_shape) * 2 - 1

    def predict(self: TextToImage, x: Tensor, t: Tensor, conditioning: dict) -> Tensor:
        alpha, sigma = distill.levels(teacher.scheduler, t, x)
        return teacher.scheduler.training_target(picture.expand_as(x), (x - alpha * picture) / sigma, t)

    cfg = DistillConfig(batch=8)
    batch = draw(teacher.decode(picture), ["春 楷書"], teacher, cfg, torch.Generator().manual_seed(0))
    ema = EMA(student.parameters(), 0.5)
    assert consistency_loss(student, ema, teacher, batch, 1.5).item() > 1e-3
    monkeypatch.setattr(TextToImage, "predict", predict)
    assert consistency_loss(student, ema, teacher, batch, 1.5).item() < 1e-6


def test_points_are_those_that_lcm_draws_from(run: str) -> None:
    """The timesteps of a batch, spread over all of them, and LCM's: the same."""
    teacher = open_teacher(DistillConfig(run=run, out="nowhere"))
    cfg = DistillConfig(batch=50, points=50)
    batch = draw(torch.zeros(20, 1, 16, 16), ["春"] * 20, teacher, cfg, torch.Generator())
    scheduler = student_of(teacher, 50).scheduler
    scheduler.set_timesteps(50)
    assert sorted(batch.t.tolist(), reverse=True) == scheduler.timesteps.tolist()
    assert (batch.t - batch.s == 20).all() and batch.s.min() == -1


@torch.no_grad()
def test_one_step_is_nearer_to_the_teachers_many(run: str, cfg: DistillConfig) -> None:
    teacher, student = TextToImage.load(run), TextToImage.load(cfg.out)
    wanted = teacher.sample(teacher.captions, steps=30)
    before = (teacher.sample(teacher.captions, steps=1) - wanted).square().mean()
    after = (student.sample(student.captions, steps=1) - wanted).square().mean()
    assert after < 0.85 * before
    assert (Path(cfg.out) / distill.PICTURE).exists()


def test_a_student_draws_by_lcm(cfg: DistillConfig) -> None:
    model = TextToImage.load(cfg.out)
    assert type(model.scheduler) is LCMScheduler and model.scheduler.config.original_inference_steps == 12
    drawn = model.sample(PROMPTS, seed=3, steps=4)
    assert torch.equal(drawn, model.sample(PROMPTS, seed=3, steps=4, guidance=7))       # it has its own
    torch.testing.assert_close(model.sample(PROMPTS, seed=3, steps=4, batch=1), drawn, rtol=0, atol=1e-4)
    assert not torch.equal(drawn, model.sample(PROMPTS, seed=4, steps=4))
    assert torch.equal(model.sample(PROMPTS, steps=80), model.sample(PROMPTS, steps=12))


def test_a_student_is_a_run(cfg: DistillConfig, tmp_path: Path) -> None:
    """For the scripts that ask one."""
    sample.main(SampleConfig(run=cfg.out, prompt="春", count=2, steps=2, out=str(tmp_path), device="cpu"))
    assert (tmp_path / "0001.png").exists()
    evaluate.main(EvaluateConfig(run=cfg.out, steps=1, device="cpu"))
    assert (Path(cfg.out) / "evaluation.json").exists()


@pytest.mark.parametrize("changes, message", [
    ({"out": "the teacher's"}, "holds a model already"),
    ({"out": "the teacher's", "overwrite": True}, "not the teacher"),
    ({"out": "the student's"}, "holds a model already"),
    ({"run": "the student's"}, "only a run of --objective diffusion"),
    ({"points": 0}, "--points 0"), ({"batch": 0}, "--batch 0"),
])
def test_refused(run: str, cfg: DistillConfig, tmp_path: Path, changes: dict, message: str) -> None:
    places = {"the teacher's": run, "the student's": cfg.out}
    changes = {name: places.get(value, value) for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        distill.main(dataclasses.replace(cfg, **{"out": str(tmp_path / "new"), **changes}))


def test_a_run_of_flow_is_no_teacher(tmp_path: Path) -> None:
    run = trained(tmp_path / "flow", objective="flow", steps=1)
    with pytest.raises(UserError, match="FlowMatch.*; only a run of --objective diffusion"):
        distill.main(DistillConfig(run=run, out=str(tmp_path / "new"), device="cpu"))


def test_overwriting_leaves_nothing_of_the_run_before(cfg: DistillConfig, tmp_path: Path) -> None:
    """No upscaler of another model, no checkpoint; what is not a run's stays."""
    out = tmp_path / "old"
    for name in ("model/upscaler/config.json", "checkpoint.pt", "mine.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}", encoding="utf-8")
    again = dataclasses.replace(cfg, out=str(out), steps=1)
    with pytest.raises(UserError, match="holds a model already"):
        distill.main(again)
    distill.main(dataclasses.replace(again, overwrite=True))
    assert (out / "mine.txt").exists() and not (out / "checkpoint.pt").exists()
    assert TextToImage.load(out).upscaler is None


def test_a_teacher_that_lies_in_the_folder_is_not_written_over(run: str, cfg: DistillConfig) -> None:
    with pytest.raises(UserError, match="not the teacher"):
        distill.main(dataclasses.replace(cfg, out=str(Path(run).parent), overwrite=True))


def test_a_student_does_not_go_on_learning(cfg: DistillConfig, tmp_path: Path) -> None:
    """--objective has no name for what it was taught by."""
    with pytest.raises(UserError, match="learned by consistency; give the run it was taught by"):
        trained(tmp_path / "on", init=f"{cfg.out}/model", preset="small")
