"""The upscaler: what it takes, that it learns, that a run with one draws twice as large, and the gallery."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from miniclip.weights import WeightsError
from minidiff import TextToImage
from minidiff.text_to_image import ImageFormat, Preset, build_text_to_image
from minidiff.upscaler import Upscaler, build_upscaler
from train import gallery, paint, replay, sample, train_diffusion, train_upscaler
from train.data.folder import CaptionedImages
from train.errors import UserError
from train.gallery import GalleryConfig
from train.run.folder import clear
from train.train_diffusion import TrainConfig
from train.train_upscaler import UpscalerConfig, contrasted, draw_crops, worsened

ROOT = Path(__file__).parent.parent
DATA = str(ROOT / "data" / "calligraphy")
TINY = Preset((8, 16), (False, True), 1, 32, 1)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two steps on pictures of 16 x 16."""
    monkeypatch.setitem(train_diffusion.PRESETS, "tiny", TINY)
    train_diffusion.main(TrainConfig(data=DATA, size=16, preset="tiny", steps=2, batch=4, samples=0,
                                     sample_steps=2, out=str(tmp_path / "run"), device="cpu"))
    return tmp_path / "run"


@pytest.mark.parametrize("channels", [1, 3])
def test_it_doubles_images_and_stays_in_range(channels: int) -> None:
    torch.manual_seed(0)
    upscaler = build_upscaler(channels).eval()
    images = torch.rand(2, channels, 22, 14) * 2 - 1
    with torch.no_grad():
        large = upscaler(images)
        torch.testing.assert_close(upscaler(images[:1]), large[:1])
    assert large.shape == (2, channels, 44, 28) and large.abs().max() <= 1


def test_it_is_a_unet_of_upstreams_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    upscaler = build_upscaler(1)
    upscaler.save(tmp_path / "up")
    again, images = Upscaler.load(tmp_path / "up", 1), torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(images), upscaler(images))
    with pytest.raises(WeightsError, match=r"up: in_channels, out_channels = \(4, 16\); the upscaler of "
                                           r"images of 3 channels has \(12, 48\)$"):
        Upscaler.load(tmp_path / "up", 3)
    model = build_text_to_image(TINY, ImageFormat(16, 1, 2), ["春"])
    model.unet.save_pretrained(tmp_path / "text")
    with pytest.raises(WeightsError, match="in_channels, out_channels = "):
        Upscaler.load(tmp_path / "text", 1)


def test_it_learns_edges_and_to_leave_specks_out(run: Path) -> None:
    """After 40 steps the worsened pictures come out nearer to the real ones than smoothly enlarged ones."""
    train_upscaler.main(UpscalerConfig(run=str(run), steps=40, batch=16, crop=16, device="cpu"))
    upscaler = TextToImage.load(run).upscaler
    large = CaptionedImages(DATA, 32, 1).images()
    small = worsened(F.avg_pool2d(large, 2), torch.Generator().manual_seed(5))
    smooth = F.interpolate(small, scale_factor=2.0, mode="bilinear", align_corners=False)
    with torch.no_grad():
        assert F.l1_loss(upscaler(small), large) < 0.8 * F.l1_loss(smooth, large)


def test_a_run_with_an_upscaler_draws_twice_as_large(run: Path) -> None:
    before = TextToImage.load(run).sample(["春 草書"], seed=3, steps=2)
    train_upscaler.main(UpscalerConfig(run=str(run), steps=1, batch=2, crop=8, device="cpu"))
    model = TextToImage.load(run)
    after = model.sample(["春 草書"], seed=3, steps=2)
    assert before.shape == (1, 1, 16, 16) and after.shape == (1, 1, 32, 32) and model.drawn_size == 32
    with torch.no_grad():
        assert torch.equal(after, model.upscaler(before))
    model.save(run / "copy")
    assert torch.equal(TextToImage.load(run / "copy").sample(["春 草書"], seed=3, steps=2), after)
    assert (run / "upscaler.png").is_file()


def test_one_seed_gives_one_upscaler(run: Path) -> None:
    weights = []
    for seed in (1, 1, 2):
        train_upscaler.main(UpscalerConfig(run=str(run), steps=2, batch=2, crop=8, seed=seed, device="cpu"))
        weights.append(TextToImage.load(run).upscaler.unet.conv_out.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_what_goes_on_from_a_run_leaves_its_upscaler_behind(run: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    train_upscaler.main(UpscalerConfig(run=str(run), steps=1, batch=2, crop=8, device="cpu"))
    train_diffusion.main(TrainConfig(data=DATA, size=16, preset="tiny", steps=1, batch=4, samples=0,
                                     sample_steps=2, init=str(run / "model"), out=str(tmp_path / "on"),
                                     device="cpu"))
    assert TextToImage.load(tmp_path / "on").upscaler is None


def test_sizes_that_do_not_fit_are_refused(run: Path) -> None:
    for crop in (9, 18):
        with pytest.raises(UserError, match=f"--crop {crop}: even, and at most the 16 pixels"):
            train_upscaler.main(UpscalerConfig(run=str(run), crop=crop, device="cpu"))
    assert TextToImage.load(run).upscaler is None


def test_crops_are_parts_of_moved_images() -> None:
    large = torch.ones(3, 1, 32, 32)
    large[:, :, 8:24, 8:24] = -1
    crops = draw_crops(large, UpscalerConfig(batch=50, crop=8), torch.Generator().manual_seed(0))
    assert crops.shape == (50, 1, 16, 16) and crops.min() < -0.9 and crops.max() > 0.9
    assert contrasted(torch.tensor([-0.9, 0.0, 0.5]), 1.2).tolist() == pytest.approx([-1, 0, 0.6])


def test_worsened_images_have_noise_specks_and_holes() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.ones(400, 1, 16, 16)
    half[..., 8:] = -1
    worse = worsened(half, generator)
    assert worse.abs().max() <= 1
    on_paper, in_ink = (worse[..., :6] < 0).float().mean().item(), (worse[..., 10:] > 0).float().mean().item()
    assert 0.003 < on_paper < 0.1 and 0.003 < in_ink < 0.1
    assert not torch.equal(worse, worsened(half, generator))


def test_the_gallery_shows_what_the_scripts_leave(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real sampler and, for speed, a small landscape and a picture of the set to be replayed."""
    monkeypatch.setattr(gallery, "SAMPLES", 2)
    asked: list = []

    def small(script, **changes) -> None:
        main = script.main
        monkeypatch.setattr(script, "main", lambda cfg: (asked.append(cfg),
                                                         main(dataclasses.replace(cfg, **changes)))[1])

    small(sample, steps=2)
    small(replay, of=str(ROOT / "data" / "calligraphy" / "坤" / "kouzan-kaisho.png"))
    small(paint, width=200, height=300, run=DATA)
    for _ in range(2):                                  # the second page is not of the first one's pictures
        gallery.main(GalleryConfig(run=str(run), prompt="坤", char="坤", seed=3))
        (run / "gallery" / "samples" / "my.txt").write_text("a note of my own", encoding="utf-8")
    gallery.main(GalleryConfig(run=str(run), prompt="坤", char="坤", seed=3))
    (run / "gallery" / "samples" / "my.txt").unlink()   # which is there still
    page = (run / "gallery.html").read_text(encoding="utf-8")
    assert page.count("data:image/gif;base64,") == 2 and page.count("data:image/png;base64,") == 3
    assert "http" not in page and "train.paint --run" in page and "--seed 3" in page
    assert sorted(path.name for path in (run / "gallery" / "samples").iterdir()) == ["0000.png", "0001.png",
                                                                                   "grid.png"]
    assert [type(cfg).__name__ for cfg in asked[:4]] == ["SampleConfig", "SampleConfig", "ReplayConfig",
                                                         "PaintConfig"]
    clear(run)
    assert not list(run.rglob("*.*"))                   # --overwrite takes the gallery along
