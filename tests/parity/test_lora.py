"""Our LoRA file in diffusers' own load_lora_weights (which needs peft), and diffusers' file in ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from miniclip.weights import load_file
from tests.test_lora import predict, teach, unet
from tests.test_minidiff_pipeline import make
from train import train_clip
from train.lora import FILE, add_lora, merge_lora, save_lora
from train.matcher import PRESETS, Preset

ROOT = Path(__file__).parent.parent.parent

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")


def theirs(folder: Path) -> diffusers.StableDiffusionPipeline:
    make().save_pretrained(folder)
    model = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=model, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def test_diffusers_reads_our_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe, ours = theirs(tmp_path / "sd"), unet()
    ours.load_state_dict(pipe.unet.state_dict())
    before = predict(ours)
    add_lora(ours, rank=3, alpha=6)
    teach(ours)
    save_lora(ours, tmp_path / FILE)
    pipe.load_lora_weights(tmp_path)
    assert len(pipe.unet.peft_config) == 1
    assert torch.allclose(predict(pipe.unet), predict(ours), atol=1e-5)
    assert not torch.allclose(predict(ours), before, atol=1e-3)
    pipe.fuse_lora()
    assert torch.allclose(predict(pipe.unet), predict(ours), atol=1e-5)


def test_peft_reads_the_folder_of_a_clip(tmp_path: Path, monkeypatch) -> None:
    """On transformers' model of --init it gives the weights that we merged."""
    from peft import PeftModel
    from transformers import CLIPModel

    monkeypatch.setitem(PRESETS, "vit-tiny", Preset("vit", 32, (2,), 8, 32, 2, 32))
    first = train_clip.TrainConfig(data=str(ROOT / "data" / "herbs"), out=str(tmp_path / "a"), size=32, batch=8, steps=4,
                                   preset="vit-tiny", checks=0, device="cpu", optimizer="adamw", lr=0.01)
    train_clip.main(first)
    init = tmp_path / "a" / "model"
    train_clip.main(dataclasses.replace(first, out=str(tmp_path / "b"), init=str(init), lora=2, lora_alpha=6.0))
    theirs = PeftModel.from_pretrained(CLIPModel.from_pretrained(init), tmp_path / "b" / "lora").merge_and_unload()
    ours, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "b" / "model", init))
    assert all(torch.allclose(theirs.state_dict()[name], value, atol=1e-6) for name, value in ours.items())
    assert sum(not torch.equal(value, before[name]) for name, value in ours.items()) == 16


def test_we_read_the_file_of_diffusers(tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    pipe, ours = theirs(tmp_path / "sd"), unet()
    ours.load_state_dict(pipe.unet.state_dict())
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    merge_lora(ours, tmp_path / FILE)
    assert torch.allclose(predict(pipe.unet), predict(ours), atol=1e-5)
