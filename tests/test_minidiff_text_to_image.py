"""TextToImage: a run sampled from Python and by python -m minidiff, and what its prompts say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from minidiff import DDIMScheduler, TextToImage
from minidiff.__main__ import main
from minidiff.schedule import randn
from minidiff.text_to_image import ImageFormat, Preset, build_text_to_image, image_generator, model_of
from train import sample
from train.run.cli import start

CAPTIONS = ["春 楷書", "春 草書", "坤 楷書"]
TINY = Preset((8, 16), (False, True), 1, 32, 1)


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run folder with a model of random weights in it."""
    torch.manual_seed(0)
    model = build_text_to_image(TINY, ImageFormat(16, request.param, 2), CAPTIONS)
    model.save(tmp_path / "run" / "model")
    return tmp_path / "run"


def test_three_lines_of_python(run: Path, tmp_path: Path) -> None:
    """Those of the README: from a run folder or its model, a Pillow image for each prompt."""
    model = TextToImage.load(run)
    images = model.draw(["春 草書", "坤 楷書"], seed=7, steps=2)
    grey = model.format.channels == 1
    assert [(image.size, image.mode) for image in images] == [((16, 16), "L" if grey else "RGB")] * 2
    pixels = (model.sample(["春 草書", "坤 楷書"], seed=7, steps=2) + 1) * 127.5            # [2, C, 16, 16]
    assert list(images[1].tobytes()) == pixels[1].round().byte().permute(1, 2, 0).flatten().tolist()
    again = TextToImage.load(run / "model").draw(["春 草書"], seed=7, steps=2)
    assert again[0].tobytes() == images[0].tobytes()            # it does not depend on what else is drawn


def test_the_command_line_draws_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    flags = ["--model", str(run), "--prompt", "春草書", "--count", "3", "--steps", "2", "--out", str(out)]
    assert main(flags) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0000.png", "0001.png", "0002.png"]
    wanted = TextToImage.load(run).draw(["春 草書"] * 3, seed=0, steps=2, guidance=1.5)
    with Image.open(out / "0002.png") as image:
        assert image.tobytes() == wanted[2].tobytes()
    capsys.readouterr()
    assert main(["--model", str(run), "--prompt", "春", "--image", "x.png", "--out", str(out)]) == 2
    said = f"minidiff: --image: not with {run}, which is a run of train_diffusion\n"
    assert capsys.readouterr().err == said


def test_guided_sampling_is_ddim_on_two_predictions(run: Path) -> None:
    """Written out: free + guidance * (guided - free), each step DDIM's with the clipped x0."""
    model, prompts = TextToImage.load(run), ["春 草書", "坤 楷書"]
    sampler = DDIMScheduler.from_config(model.scheduler.config)
    sampler.set_timesteps(3)
    x = randn((2, *model.latent_shape), [image_generator(5, i) for i in range(2)], "cpu", torch.float32)
    with torch.no_grad():
        free, guided = (model.conditioning(texts) for texts in ([""] * 2, prompts))
        for t in sampler.timesteps:
            a, b = model.predict(x, t, free), model.predict(x, t, guided)
            x = sampler.step(a + 2.5 * (b - a), t, x, use_clipped_model_output=True).prev_sample
    found = model.sample(prompts, seed=5, steps=3, guidance=2.5)
    assert (found - model.decode(x).clamp(-1, 1)).abs().max() < 1e-5


def test_where_a_model_is(run: Path, tmp_path: Path) -> None:
    assert model_of(run) == model_of(run / "model") == run / "model"
    assert model_of(tmp_path) is None and model_of(tmp_path / "nowhere") is None


@pytest.mark.parametrize("text", [
    "[]", "{", "", "7", "[" * 99_999, '{"size": ' + "9" * 5000 + "}", "\xff\xfe",
    *(json.dumps({"size": 16, "channels": 1, "fold": 2, "captions": ["春"]} | change) for change in (
        {"size": "16"}, {"size": 0}, {"size": -16}, {"size": 1e30}, {"size": 10**30}, {"size": True},
        {"size": [16]}, {"size": None}, {"channels": 2}, {"channels": 64}, {"fold": 3}, {"fold": {"x": 1}},
        {"captions": "春"}, {"captions": [1]}, {"captions": None}, {"captions": {"x": 1}},
        {"size": ["x" * 100_000] * 9})),
], ids=range(24))
def test_a_writer_that_none_has_saved_is_one_line(run: Path, tmp_path: Path, text: str, capsys) -> None:
    """In python -m minidiff and in train.sample."""
    (run / "model" / "writer.json").write_bytes(text.encode("latin-1", "replace") if "春" not in text
                                                else text.encode())
    out = ["--out", str(tmp_path / "out")]
    assert main(["--model", str(run), "--prompt", "春", *out]) == 2
    said = [capsys.readouterr().err]
    with pytest.raises(SystemExit) as end:
        start(lambda: sample.main(sample.SampleConfig(run=str(run), out=out[1], device="cpu")))
    said.append(capsys.readouterr().err)
    assert end.value.code == 2
    assert all("writer.json" in line and "\n" not in line.strip() and len(line) < 600 for line in said)
