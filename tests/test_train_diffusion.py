"""The training and sampling scripts end to end, tiny: run folders, seeds, resume, prompts,
and every clear error."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from miniclip import CLIPTextModel
from minidiff import DDPMScheduler, UNet2DConditionModel
from minidiff.text_to_image import PRESETS, ImageFormat, Preset, TextToImage, build_text_to_image, take_apart
from train import evaluate, glyphs, sample, train_diffusion
from train.data.augment import jitter
from train.data.folder import CaptionedImages
from train.evaluate import EvaluateConfig, aligned_distance, nearest_aligned
from train.optim import build_optimizers, orthogonalize, set_learning_rate
from train.run import cli, distributed, loop
from train.run.cli import parse_flags
from train.sample import SampleConfig
from train.train_diffusion import TrainConfig
from train.validation import optimal_denoiser

ROOT = Path(__file__).parent.parent
TINY = TrainConfig(data=str(ROOT / "data" / "calligraphy"), size=16, fold=2, preset="tiny", steps=4, batch=4,
                   samples=1, sample_steps=2, device="cpu")


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_diffusion.PRESETS, "tiny", Preset((8, 16), (False, True), 1, 32, 1))


def train(out: Path, **changes) -> Path:
    train_diffusion.main(dataclasses.replace(TINY, out=str(out), **changes))
    return out


def fails(script: Callable, cfg, capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr of a script that ends with status 2, without a traceback."""
    with pytest.raises(SystemExit) as ended:
        cli.start(lambda: script(cfg))
    message = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and message.startswith("error: ") and "\n" not in message
    return message


def refused(capsys: pytest.CaptureFixture, **changes) -> str:
    return fails(train_diffusion.main, dataclasses.replace(TINY, **changes), capsys)


# ------------------------------------------------------------------------------------------------------ a run


def test_a_run_folder_describes_itself(tmp_path: Path) -> None:
    out = train(tmp_path / "run")
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["steps"] == 4
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "val" in row] == [0, 2, 4]
    assert all(row["bound"] <= row["val_free"] for row in rows if "val" in row)
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["000000.png", "000002.png", "000004.png"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and "<svg" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")     # self-contained
    UNet2DConditionModel.from_pretrained(out / "model" / "unet")
    CLIPTextModel.from_pretrained(out / "model" / "text_encoder")
    assert DDPMScheduler.from_pretrained(out / "model" / "scheduler").config.prediction_type == "v_prediction"


def test_one_seed_gives_identical_files_and_another_does_not(tmp_path: Path) -> None:
    first, second, third = (train(tmp_path / name, seed=seed)
                            for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    names = [p.relative_to(first) for p in first.rglob("*") if p.suffix in (".png", ".safetensors")]
    assert len(names) == 5
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in names)
    assert not any((first / n).read_bytes() == (third / n).read_bytes() for n in names)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path: Path, optimizer: str,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", optimizer=optimizer)
    saved, flags = [], []

    class StopAfterTwo(loop.StopFlag):
        def __init__(self) -> None:
            super().__init__()
            flags.append(self)

    def count(*args, **kwargs):
        saved.append(1)
        if len(saved) == 3:
            flags[-1].set = True
        return forward(*args, **kwargs)

    forward = TextToImage.forward
    monkeypatch.setattr(loop, "StopFlag", StopAfterTwo)
    monkeypatch.setattr(TextToImage, "forward", count)
    halves = train(tmp_path / "halves", optimizer=optimizer)
    assert torch.load(halves / "checkpoint.pt", weights_only=True)["step"] == 3
    train(tmp_path / "halves", optimizer=optimizer, resume=True)
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    assert (whole / weights).read_bytes() == (halves / weights).read_bytes()
    assert (whole / "samples/000004.png").read_bytes() == (halves / "samples/000004.png").read_bytes()


def test_samples_follow_seed_prompt_and_guidance(tmp_path: Path) -> None:
    writer = TextToImage.load(train(tmp_path / "run", steps=8) / "model")

    def write(prompt: str = "春 草書", **options) -> torch.Tensor:
        return writer.sample([prompt] * 3, steps=2, **options)

    base = write()
    assert base.shape == (3, 1, 16, 16) and base.abs().max() <= 1
    assert torch.equal(base, write()) and torch.allclose(base[:2], write(batch=2)[:2], atol=1e-5)
    assert not torch.equal(base, write(seed=1))
    assert not torch.equal(base, write("坤 楷書"))
    assert not torch.equal(base, write(guidance=3.0))
    free = write(guidance=0.0)
    assert torch.allclose(free, write("坤 楷書", guidance=0.0), atol=1e-5)     # guidance 0 means 0
    assert torch.allclose(write(guidance=1.0), base * 0 + write(guidance=1.0 + 1e-7), atol=1e-4)


def test_sample_script_writes_grey_pictures_and_warns_of_unknown_words(tmp_path: Path, capsys) -> None:
    run = train(tmp_path / "run")
    out = tmp_path / "滿"
    sample.main(SampleConfig(run=str(run), prompt="龍 草書", count=3, steps=2, out=str(out), device="cpu"))
    assert [p.name for p in sorted(out.iterdir())] == ["0000.png", "0001.png", "0002.png", "grid.png"]
    with Image.open(out / "0001.png") as picture:
        assert picture.mode == "L" and picture.size == (16, 16)
    warning = capsys.readouterr().err
    assert "龍" in warning and "春" in warning and "草書" not in warning.split(";")[0]


def test_one_picture_overfits_to_30_dB(tmp_path: Path) -> None:
    """The whole path, text included, can draw one real picture almost perfectly."""
    folder = tmp_path / "one" / "春"
    folder.mkdir(parents=True)
    source = ROOT / "data" / "calligraphy" / "春" / "kouzan-kaisho.png"
    (folder / "picture.png").write_bytes(source.read_bytes())
    cfg = dataclasses.replace(TINY, data=str(folder.parent), out=str(tmp_path / "run"), size=32, steps=450,
                              batch=8, jitter=False, caption_drop=0.0, samples=0, ema=0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_diffusion.PRESETS, "tiny", Preset((16, 32), (False, True), 1, 32, 1))
        train_diffusion.main(cfg)
    written = TextToImage.load(tmp_path / "run" / "model").sample(["春"] * 4, steps=20, guidance=1.0)
    truth = CaptionedImages(folder.parent, size=32).images()
    mse = ((written - truth) / 2).square().mean(dim=(1, 2, 3))      # of a range of 1
    assert (-10 * mse.log10()).min() >= 30


# ----------------------------------------------------------------------------------------------- clear errors


@pytest.mark.parametrize("changes,words", [
    ({"size": 18}, "--size 18"), ({"size": 4096}, "--size 4096"), ({"fold": 0}, "--fold 0"),
    ({"batch": 0}, "--batch 0"), ({"steps": 0}, "--steps 0"), ({"caption_drop": 1.5}, "--caption-drop 1.5"),
    ({"device": "quantum"}, "quantum"), ({"device": "cuda:99"}, "cuda:99"),
    ({"data": "no/such/folder"}, "no/such"), ({"sample_steps": 2000}, "--sample-steps 2000"),
])
def test_bad_flags(capsys, tmp_path: Path, changes: dict, words: str) -> None:
    assert words in refused(capsys, **{"out": str(tmp_path / "run"), **changes})


def test_bad_folders(capsys, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, data=str(tmp_path / "empty"), out=str(tmp_path / "run"))
    broken = tmp_path / "broken" / "春"
    broken.mkdir(parents=True)
    (broken / "one.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    assert "one.png" in refused(capsys, data=str(broken.parent), out=str(tmp_path / "run"))
    table = tmp_path / "table"
    table.mkdir()
    (table / "captions.csv").write_text("file,caption\nmissing.png,春\n", encoding="utf-8")
    assert "missing.png" in refused(capsys, data=str(table), out=str(tmp_path / "run"))
    (table / "captions.csv").write_bytes("file,caption\na.png,春\n".encode("big5"))
    assert "UTF-8" in refused(capsys, data=str(table), out=str(tmp_path / "run"))


def test_an_output_that_cannot_be_a_folder(capsys, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert "file" in refused(capsys, out=str(tmp_path / "file" / "run"))


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(capsys, tmp_path: Path,
                                                                  monkeypatch) -> None:
    losses = []

    def poisoned(*args):
        losses.append(1)
        return diffusion_loss(*args) * (math.nan if len(losses) == 4 else 1.0)

    diffusion_loss = TextToImage.forward
    monkeypatch.setattr(TextToImage, "forward", poisoned)
    assert "step 3" in refused(capsys, out=str(tmp_path / "run"))
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and all(torch.isfinite(v).all() for v in state["model"].values())


def test_bad_run_folders(capsys, tmp_path: Path) -> None:
    cfg = SampleConfig(run=str(tmp_path / "nothing"), out=str(tmp_path / "out"), device="cpu")
    assert "nothing" in fails(sample.main, cfg, capsys)
    assert "--count 0" in fails(sample.main, dataclasses.replace(cfg, count=0), capsys)
    run = train(tmp_path / "run")
    capsys.readouterr()
    cfg = dataclasses.replace(cfg, run=str(run))
    weights = run / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert weights.name in fails(sample.main, cfg, capsys)
    (run / "model" / "writer.json").write_text('{"size": -1}', encoding="utf-8")
    assert "writer.json" in fails(sample.main, cfg, capsys)


def test_resume_refuses_another_training(capsys, tmp_path: Path) -> None:
    assert "no " in refused(capsys, out=str(tmp_path / "run"), resume=True)
    train(tmp_path / "run")
    capsys.readouterr()
    assert "batch = 4, not 8" in refused(capsys, out=str(tmp_path / "run"), resume=True, batch=8)


def test_a_checkpoint_cannot_run_code(capsys, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").write_text, ("boom",))

    out = tmp_path / "run"
    out.mkdir()
    torch.save({"model": Bomb()}, out / "checkpoint.pt")
    assert "checkpoint.pt" in refused(capsys, out=str(out), resume=True)
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------------------------------------------ parts


def test_flags_come_from_the_dataclass() -> None:
    cfg = parse_flags(TrainConfig, "test", ["--no-jitter", "--steps", "7", "--out", "x"])
    assert (cfg.jitter, cfg.steps, cfg.out, cfg.batch) == (False, 7, "x", TrainConfig.batch)


def test_writer_folds_pictures_without_loss() -> None:
    writer = build_text_to_image(Preset((8, 16), (False, True), 1, 32, 1), ImageFormat(16, 1, 4), ["春 草書"],
                                 DDPMScheduler())
    pictures = torch.randn(2, 1, 16, 16)
    assert writer.encode(pictures).shape == (2, 16, 4,
                                             4) and torch.equal(writer.decode(writer.encode(pictures)),
                                                                pictures)


@pytest.mark.parametrize("name", ["small", "base", "large"])
def test_presets_build_models_that_run(name: str) -> None:
    preset = PRESETS[name]
    picture = ImageFormat(2 ** len(preset.block_out_channels), 3, 2)
    writer = build_text_to_image(preset, picture, ["春 草書"], DDPMScheduler()).eval()
    with torch.no_grad():
        x = writer.encode(torch.randn(1, 3, picture.size, picture.size))
        assert writer.unet(x, 5, writer.conditioning(["春 草書"])["text"]).sample.shape == x.shape


def test_optimal_denoiser() -> None:
    """Two pictures, one dimension: the posterior mean by hand."""
    bank, alpha_bar = torch.tensor([[1.0], [-1.0]]), 0.5
    x_t = torch.tensor([[0.3], [0.0]])
    by_hand = torch.tanh(x_t * alpha_bar**0.5 / (1 - alpha_bar))
    found = optimal_denoiser(x_t, bank, alpha_bar**0.5, (1 - alpha_bar)**0.5)
    assert torch.allclose(found, by_hand, atol=1e-6)


def test_muon_updates_are_nearly_orthogonal() -> None:
    for shape in ((3, 8, 20), (2, 20, 8)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape,
                                                                generator=torch.Generator().manual_seed(0))))
        assert 0.5 < values.min() and values.max() < 1.3


def test_optimizers_share_out_every_parameter_once() -> None:
    writer = build_text_to_image(Preset((8, 16), (False, True), 1, 32, 1), ImageFormat(16, 1, 2), ["春 草書"],
                                 DDPMScheduler())
    muon, adamw = build_optimizers(writer, "muon", 1e-3, 0.02)
    ids = [id(p) for o in (muon, adamw) for g in o.param_groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == len(list(writer.parameters()))
    assert all(p.ndim >= 2 for g in muon.param_groups for p in g["params"])
    factors = [set_learning_rate([muon], s, 100, 10) for s in (0, 9, 50, 100)]
    assert factors[0] < factors[1] and factors[2] == pytest.approx(0.505)
    assert factors[3] == pytest.approx(0.01)


def test_aligned_distance_sees_through_a_shift() -> None:
    pictures = CaptionedImages(ROOT / "data" / "calligraphy", size=32).images()
    copies = jitter(pictures, torch.Generator().manual_seed(3))
    assert aligned_distance(pictures[:4], copies[:4]).max() < 0.15
    between = nearest_aligned(pictures, pictures, others=True).median()
    assert nearest_aligned(copies, pictures).median() < 0.25 * between


# ------------------------------------------------------------- what train.sample makes of prompts and folders


def test_new_pictures_are_numbered_on(tmp_path: Path, capsys) -> None:
    """Those of an earlier call stay; the grid shows the new ones, and the last line says which they are."""
    run, out = train(tmp_path / "run"), tmp_path / "out"
    cfg = SampleConfig(run=str(run), prompt="春", count=3, steps=1, out=str(out), device="cpu")
    sample.main(cfg)
    first = [(out / f"000{i}.png").read_bytes() for i in range(3)]
    assert "3 pictures in" in (said := capsys.readouterr().out) and "0000.png to 0002.png" in said
    (out / "mine.png").write_bytes(b"not ours")
    sample.main(dataclasses.replace(cfg, prompt="坤", count=2, seed=1))
    assert "2 pictures in" in (said := capsys.readouterr().out) and "0003.png to 0004.png" in said
    names = ["0000.png", "0001.png", "0002.png", "0003.png", "0004.png", "grid.png", "mine.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert first == [(out / f"000{i}.png").read_bytes() for i in range(3)]
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (2 * 17 + 1, 17 + 1)            # two pictures of 16 x 16, a frame around each


def test_words_written_together_and_words_never_together(tmp_path: Path, capsys) -> None:
    cfg = SampleConfig(run=str(train(tmp_path / "run")), count=2, steps=1, device="cpu")

    def told(prompt: str, out: str = "b") -> str:
        sample.main(dataclasses.replace(cfg, prompt=prompt, out=str(tmp_path / out)))
        return capsys.readouterr().err

    assert told("春 草書", "a") == ""
    assert told("春草書") == "note: 春草書 is read as 春 草書\n"
    assert (tmp_path / "a" / "0001.png").read_bytes() == (tmp_path / "b" / "0001.png").read_bytes()
    assert "never saw 龍草書" in told("龍草書")
    hands = "楷書 行書 草書 行楷 重楷"
    for prompt in ("春 坤", "春坤"):
        said = told(prompt).splitlines()
        assert said[-1] == ("warning: no training caption holds 春、坤 together, so expect one of them in a "
                            f"picture; 春 goes with {hands}; 坤 goes with {hands}")
        assert len(said) == 2 - (" " in prompt)
    assert "holds 草書、行書 together" in told("春 草書 行書")       # 春 goes with both


def test_a_word_is_taken_apart_in_one_way_only() -> None:
    assert take_apart("春草書", {"春", "草書", "行書"}) == ["春", "草書"]
    assert take_apart("ab", {"a", "b", "ab"}) == ["ab"]
    assert take_apart("abc", {"a", "bc", "ab", "c"}) == ["abc"]     # a bc, or ab c?
    assert take_apart("abd", {"a", "b"}) == ["abd"]
    assert take_apart("a" * 60 + "b", {"a", "aa"}) == ["a" * 60 + "b"]      # and quickly


def test_evaluation_says_how_far_it_is_and_what_its_figures_are(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(glyphs, "load_judge", lambda folder: glyphs.GlyphClassifier(list("春滿乾坤")))
    monkeypatch.setattr(glyphs, "classify_images", lambda _, images: (["春"] * len(images), None))
    out = train(tmp_path / "run")
    capsys.readouterr()
    evaluate.main(EvaluateConfig(run=str(out), judge="a judge", count=2, steps=1, device="cpu"))
    said, page = capsys.readouterr().out, (out / "evaluation.html").read_text(encoding="utf-8")
    # 4 characters, alone and with hands, twice each, and 20 captions at 5 strengths; 20 samples; 80 steps for
    # each of 3 sets of pairs; 20 captions with 3 seeds, other prompts and 2 strengths of guidance
    for work in ("picture 116/116  legible", "picture 20/20  memory", "step 240/240  memory, aligning",
                 "picture 120/120  control"):
        name = work.split("  ")[1]
        assert work in said and said.index(f"{name}: ") < said.index(work)          # announced before
    assert all(words in said and words in page for words in evaluate.CONTROL)
    assert "control: another seed, same prompt: difference 0." in said
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert found["legible 春 alone"] == 1 and found["legible 滿 alone"] == 0
    assert found["legible at guidance 3"] == 0.25 and found["another seed, same prompt"] > 0.1


def test_less_jitter_moves_images_less_in_the_same_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers for every amount, so that a run differs in nothing else."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(train_diffusion, "affine", lambda images, u, flip: (seen.append(u), images)[1])
    cfg = dataclasses.replace(TINY, jitter_amount=1.0)
    ranks = distributed.Ranks(0, 1, torch.device("cpu"))
    data = train_diffusion.open_data(cfg, ranks)
    model = train_diffusion.initial_model(cfg, data.captions)
    for amount in (1.0, 0.25, 0.0):
        changed = dataclasses.replace(cfg, jitter_amount=amount)
        train_diffusion.draw(model, 0, torch.arange(4), data.images[:4], data, changed, ranks,
                             torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen[1] - 0.5, 0.25 * (seen[0] - 0.5))
    assert (seen[2] == 0.5).all() and (seen[0] - 0.5).abs().max() > 0.4


@pytest.mark.parametrize("changes, first", [
    ({"noise_bias": 1.0}, 1.0), ({"noise_bias": 4.0}, 4.0), ({}, train_diffusion.NOISE_BIAS),
    ({"init": "sd"}, 1.0), ({"data": str(ROOT / "data" / "strokes")}, 1.0),
])
def test_much_noise_is_seen_more_often_at_first(changes: dict, first: float) -> None:
    """As u^(1/bias) has it: below a timestep of T f lie f^bias of a batch, to one; at the end evenly."""
    cfg = dataclasses.replace(TINY, batch=50, **changes)
    ranks = distributed.Ranks(0, 1, torch.device("cpu"))
    data = train_diffusion.open_data(cfg, ranks)
    model = train_diffusion.initial_model(dataclasses.replace(cfg, init=""), data.captions, data.strokes)
    rows = torch.arange(50) % len(data.images)
    for step, bias in ((0, first), (cfg.steps // 2, (first + 1) / 2), (cfg.steps, 1.0)):
        batch = train_diffusion.draw(model, step, rows, data.images[rows], data, cfg, ranks,
                                     torch.Generator().manual_seed(0))
        for fraction in (0.25, 0.5, 0.75):
            below = (batch.t < 1000 * fraction).sum().item()
            assert abs(below - 50 * fraction**bias) <= 1.01
