"""Starting from what others trained: LoRA and its file, frozen parts, model folders, single files,
cached latents."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from miniclip.weights import WeightsError, load_file, save_file
from minidiff import DDPMScheduler, UNet2DConditionModel
from minidiff.lora import FILE, LoRALinear, merge_lora
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.text_to_image import Preset, TextToImage
from tests.test_minidiff_pipeline import TOKENIZER, make, single_file
from train import latent, train_diffusion, validation
from train.errors import UserError
from train.lora import PROJECTIONS, add_lora, merged, save_lora
from train.merge_lora import MergeConfig
from train.merge_lora import main as merge
from train.run.checkpoint import load_checkpoint
from train.train_diffusion import TrainConfig, initial_model

ROOT = Path(__file__).parent.parent
TINY = TrainConfig(data=str(ROOT / "data" / "calligraphy"), size=16, preset="tiny", steps=3, batch=4,
                   samples=0, sample_steps=1, optimizer="adamw", device="cpu")
LATENT = dataclasses.replace(TINY, channels=3, jitter=False)


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_diffusion.PRESETS, "tiny", Preset((8, 16), (False, True), 1, 32, 1))


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    make().save_pretrained(folder)
    return folder


def unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return make().unet


def predict(model: UNet2DConditionModel) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(torch.randn(1, 4, 8, 8, generator=g), 300, torch.randn(1, 5, 32, generator=g)).sample


def teach(model: UNet2DConditionModel, seed: int = 1) -> None:
    """As if LoRA had learned something."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.lora_B.weight.data = torch.randn(module.lora_B.weight.shape, generator=g) * 0.1


# ------------------------------------------------------------------------------------------------ LoRA itself


def test_lora_begins_as_nothing_and_only_it_learns() -> None:
    model, before = unet(), predict(unet())
    keys = list(model.state_dict())
    add_lora(model, rank=3, alpha=3)
    assert torch.equal(predict(model), before)
    assert [key for key in model.state_dict() if "lora" not in key] == keys
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learning and all(".lora_" in name for name in learning)
    assert len(learning) == 2 * sum(bool(PROJECTIONS.search(name)) for name, _ in unet().named_modules())
    teach(model)
    assert not torch.allclose(predict(model), before, atol=1e-4)


def test_merged_weights_are_the_same_function() -> None:
    model = unet()
    add_lora(model, rank=2, alpha=6)
    teach(model)
    apart = predict(model)
    with merged(model):
        assert not any(isinstance(m, LoRALinear) for m in model.modules())
        assert list(model.state_dict()) == list(unet().state_dict())
        assert torch.allclose(predict(model), apart, atol=1e-5)
    assert any(isinstance(m, LoRALinear) for m in model.modules()) and torch.equal(predict(model), apart)


@pytest.mark.parametrize("names", [(".lora_A", ".lora_B"), (".lora.down", ".lora.up")])
def test_the_file_goes_out_and_comes_back(tmp_path: Path, names: tuple) -> None:
    model = unet()
    add_lora(model, rank=2, alpha=6)
    teach(model)
    save_lora(model, tmp_path / FILE)
    tensors = load_file(tmp_path / FILE, mmap=False)
    save_file({k.replace(".lora_A", names[0]).replace(".lora_B", names[1]): v for k, v in tensors.items()},
              tmp_path / FILE)
    other = unet()
    merge_lora(other, tmp_path / FILE)
    assert torch.allclose(predict(other), predict(model), atol=1e-5)
    untouched = unet()
    merge_lora(untouched, tmp_path / FILE, scale=0)
    assert torch.equal(predict(untouched), predict(unet()))


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    name, path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", tmp_path / FILE
    good = {f"{name}.lora_A.weight": torch.zeros(2, 32), f"{name}.lora_B.weight": torch.zeros(32, 2)}
    for change, words in (({f"{name}.lora_A.weight": torch.zeros(2, 9)}, "the layer"),
                          ({"unet.nothing.lora_A.weight": torch.zeros(2, 2)}, "unet.nothing"),
                          ({f"{name}.alpha": torch.tensor(1.0)}, "alpha"),
                          ({f"{name}.lora_B.weight": torch.zeros(32, 3)}, "times")):
        save_file({**good, **change}, path)
        with pytest.raises(WeightsError, match=words):
            merge_lora(unet(), path)


# ------------------------------------------------------------------------------------------------- the script


def test_lora_on_a_model_folder(tmp_path: Path, sd: Path) -> None:
    """Writes the small file and merged weights; says the same through both; goes on after a stop;
    leaves --init alone."""
    cfg = dataclasses.replace(LATENT, out=str(tmp_path / "run"), init=str(sd), lora=2, lr=0.01, save_every=1,
                              keep=3)
    train_diffusion.main(cfg)
    run = tmp_path / "run"
    whole = (run / "lora" / FILE).read_bytes()
    merge(MergeConfig(str(sd), str(run / "lora" / FILE), 1.0, str(tmp_path / "merged")))
    ours, ready = (StableDiffusionPipeline.from_pretrained(f).unet
                   for f in (tmp_path / "merged", run / "model"))
    before = StableDiffusionPipeline.from_pretrained(sd).unet
    assert torch.allclose(predict(ours), predict(ready), atol=1e-5)
    assert not torch.allclose(predict(ours), predict(before), atol=1e-4)
    state = load_checkpoint(run / "checkpoint.pt")
    assert all(".lora_" in name for name in state["model"])             # small: what is frozen is not in it
    (run / "checkpoint.2.pt").replace(run / "checkpoint.pt")
    assert load_checkpoint(run / "checkpoint.pt")["step"] == 1
    train_diffusion.main(dataclasses.replace(cfg, resume=True))
    assert (run / "lora" / FILE).read_bytes() == whole


def test_latents_are_encoded_once(tmp_path: Path, sd: Path, monkeypatch) -> None:
    cfg = dataclasses.replace(LATENT, out=str(tmp_path / "run"), init=str(sd))
    train_diffusion.main(cfg)
    weights = (tmp_path / "run" / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    def never(*_):
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(latent.LatentTextToImage, "encode", never)
        patch.setattr(StableDiffusionPipeline, "encode_text", never)
        train_diffusion.main(dataclasses.replace(cfg, overwrite=True))
    assert (tmp_path / "run/model/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights
    cached, = (tmp_path / "run" / "cache").iterdir()
    cached.write_bytes(cached.read_bytes()[:-1])
    train_diffusion.main(dataclasses.replace(cfg, overwrite=True))  # damaged: made again
    assert (tmp_path / "run/model/unet/diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_a_single_file_is_the_same_beginning(tmp_path: Path, sd: Path) -> None:
    pipe, prompts = StableDiffusionPipeline.from_pretrained(sd), ["春", "a herb shop"]
    single_file(pipe, tmp_path / "model.safetensors")
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    one = initial_model(dataclasses.replace(LATENT, init=str(tmp_path / "model.safetensors"),
                                             tokenizer=str(tmp_path / "tokenizer")), prompts)
    other = initial_model(dataclasses.replace(LATENT, init=str(sd)), prompts)
    assert torch.equal(one.conditioning(prompts)["text"], other.conditioning(prompts)["text"])
    assert torch.allclose(predict(one.unet), predict(other.unet), atol=1e-5)
    assert one.scheduler.config.prediction_type == "epsilon" and not one.scheduler.config.clip_sample


def test_the_error_of_a_model_that_predicts_noise() -> None:
    """predicted_x0 undoes add_noise, whether the model speaks of eps or of v."""
    x0, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([300, 300])
    for kind in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(prediction_type=kind)
        perfect = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, t)
        writer = SimpleNamespace(scheduler=scheduler, conditioning=lambda prompts: {},
                                 inpaint_input=lambda *_: {}, masks=1,
                                 max_batch=8, predict=lambda *_, perfect=perfect: perfect)
        x_t = scheduler.add_noise(x0, noise, t)
        assert torch.allclose(validation.predicted_x0(writer, x_t, 300, ["", ""]), x0, atol=1e-4)
        writer.predict = lambda *_, perfect=perfect: perfect + 1
        assert TextToImage.forward(writer, x0, [], t, noise).item() == pytest.approx(1.0, rel=1e-5)


def test_latents_and_pictures_go_there_and_back(sd: Path) -> None:
    writer = initial_model(dataclasses.replace(LATENT, init=str(sd)), ["春"])
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = writer.encode(pictures)
    assert codes.shape == (2, *writer.latent_shape) == (2, 4, 8, 8)
    back = writer.vae.decode(writer.vae.encode(pictures).latent_dist.mode()).sample
    assert torch.allclose(writer.decode(codes), back, atol=1e-5)


def test_going_on_from_a_run_of_ones_own(tmp_path: Path) -> None:
    train_diffusion.main(dataclasses.replace(TINY, out=str(tmp_path / "first")))
    first, second = tmp_path / "first" / "model", tmp_path / "second" / "model"
    train_diffusion.main(dataclasses.replace(TINY, out=str(second.parent), init=str(first),
                                             freeze="^text_encoder"))
    text = "text_encoder/model.safetensors"
    assert (first / text).read_bytes() == (second / text).read_bytes()
    first, second = (load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
                     for model in (first, second))
    assert not torch.equal(first["conv_in.weight"], second["conv_in.weight"])


@pytest.mark.parametrize("changes,words", [
    ({"lora": 4}, "--lora 4"), ({"lora": -1, "init": "x"}, "--lora -1"),
    ({"lora_alpha": 2.0}, "--lora-alpha 2.0"),
    ({"freeze": "("}, r"--freeze \("), ({"tokenizer": "x"}, "--tokenizer x"), ({"freeze": ""}, None),
    ({"init": "nowhere"}, "--init nowhere: no such"), ({"init": __file__, "channels": 3}, "--no-jitter"),
    ({"init": __file__, "jitter": False}, "--channels 3"), ({"init": __file__, "stream": True}, "--stream"),
    ({"init": __file__, "channels": 3, "jitter": False}, "give --tokenizer"),
])
def test_refused_before_any_work(changes: dict, words: str | None) -> None:
    cfg = dataclasses.replace(TINY, **changes)
    if words is None:
        train_diffusion.check(cfg)
        return
    with pytest.raises(UserError, match=words):
        train_diffusion.check(cfg)


def test_refused_models(tmp_path: Path, sd: Path) -> None:
    with pytest.raises(UserError, match="multiples of 16"):
        initial_model(dataclasses.replace(LATENT, init=str(sd), size=24), ["春"])
    with pytest.raises(UserError, match="leaves nothing"):
        initial_model(dataclasses.replace(TINY, freeze="."), ["春"])
    make(in_channels=5).save_pretrained(tmp_path / "five")
    with pytest.raises(UserError, match="a UNet of 5 channels .* only of 4 or, for inpainting, 9"):
        initial_model(dataclasses.replace(LATENT, init=str(tmp_path / "five")), ["春"])
    with pytest.raises(WeightsError, match="python -m minidiff --model"):
        TextToImage.load(sd)
    with pytest.raises(UserError, match=re.escape("(16, 1, 2)")):
        train_diffusion.main(dataclasses.replace(TINY, out=str(tmp_path / "run"), steps=1))
        initial_model(dataclasses.replace(TINY, init=str(tmp_path / "run" / "model"), size=32), ["春"])
