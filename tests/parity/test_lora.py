"""Our LoRA files in diffusers' load_lora_weights (which needs peft) and in peft itself,
and theirs in ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from miniclip import CLIPImageProcessor, CLIPTokenizer, convert
from miniclip.image_text import PRESETS, Preset
from miniclip.weights import WeightsError, load_file
from minidiff.lora import FILE, merge_lora
from tests.parity.compare import relative_error
from tests.test_lora import predict, teach, unet
from tests.test_minidiff_pipeline import make
from train import train_clip
from train.lora import (
    CLIP_PROJECTIONS,
    PEFT_CONFIG,
    add_lora,
    merged,
    read_adapter,
    save_adapter,
    save_lora,
)
from train.merge_lora import MergeConfig, main

ROOT = Path(__file__).parent.parent.parent
TEXT = {"vocab_size": 560, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 12}
VISION = {**{k: v for k, v in TEXT.items() if "vocab" not in k and "max_" not in k}, "image_size": 16,
          "patch_size": 8}

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
    first = train_clip.TrainConfig(data=str(ROOT / "data" / "herbs"), out=str(tmp_path / "a"), size=32,
                                   batch=8, steps=4,
                                   preset="vit-tiny", checks=0, device="cpu", optimizer="adamw", lr=0.01)
    train_clip.main(first)
    init = tmp_path / "a" / "model"
    train_clip.main(dataclasses.replace(first, out=str(tmp_path / "b"), init=str(init), lora=2,
                                        lora_alpha=6.0))
    theirs = PeftModel.from_pretrained(CLIPModel.from_pretrained(init),
                                       tmp_path / "b" / "lora").merge_and_unload()
    ours, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "b" / "model", init))
    assert all(torch.allclose(theirs.state_dict()[name], value, atol=1e-6) for name, value in ours.items())
    assert sum(not torch.equal(value, before[name]) for name, value in ours.items()) == 16


def read_both(model, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[4, E]: the features of two pictures and of two texts, of their model or of ours."""
    with torch.no_grad():
        both = model.get_image_features(pixels), model.get_text_features(ids, mask)
    # transformers 4: a tensor
    return torch.cat([getattr(features, "pooler_output", features) for features in both])


def questions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g, mask = torch.Generator().manual_seed(0), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    return torch.randn(2, 3, 16, 16, generator=g), torch.randint(1, 500, (2, 6), generator=g) * mask, mask


def test_peft_reads_the_folder_of_a_chinese_clip(tmp_path: Path) -> None:
    """BERT's projections too: peft on transformers' model says what ours says, before and after merging."""
    from peft import PeftModel
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    torch.manual_seed(0)
    config = ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=10)
    ChineseCLIPModel(config).save_pretrained(tmp_path / "init")
    ours = convert.load(tmp_path / "init")
    before, weights = read_both(ours, *questions()), {k: v.clone() for k, v in ours.state_dict().items()}
    add_lora(ours, 3, 6, CLIP_PROJECTIONS)
    teach(ours)
    save_adapter(ours, tmp_path / "lora", 3)
    theirs = PeftModel.from_pretrained(ChineseCLIPModel.from_pretrained(tmp_path / "init"),
                                       tmp_path / "lora").eval()
    apart = read_both(theirs, *questions())
    assert relative_error(read_both(ours, *questions()), apart) <= 1e-6
    for picture_or_text in range(4):
        assert (apart - before)[picture_or_text].abs().max() > 1e-3
    together = theirs.merge_and_unload().state_dict()
    with merged(ours):
        state = ours.state_dict()
        assert list(state) == list(together) == list(weights)
        assert all(torch.allclose(value, together[name], rtol=0, atol=1e-6) for name, value in state.items())
    changed = {name for name, value in together.items() if not torch.equal(value, weights[name])}
    assert changed == {f"{name}.weight" for name, _ in ours.named_modules() if CLIP_PROJECTIONS.search(name)}
    assert sum("attention.output.dense" in name for name in changed) == 2 and len(changed) == 16


def test_our_script_merges_what_peft_made(tmp_path: Path) -> None:
    """A stranger's adapter, alpha other than r, of two of the four projections: as peft's
    merge_and_unload."""
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    base = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=10))
    base.save_pretrained(tmp_path / "model")
    CLIPTokenizer.train(["herb shop"] * 3, vocab_size=530).save_pretrained(tmp_path / "model")
    CLIPImageProcessor(size=16, crop_size=16).save_pretrained(tmp_path / "model")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "lora")
    main(MergeConfig(str(tmp_path / "model"), str(tmp_path / "lora"), 1.0, str(tmp_path / "out")))
    wanted, got = theirs.merge_and_unload(), convert.load(tmp_path / "out")
    state = got.state_dict()
    assert all(torch.allclose(state[name], value, rtol=0, atol=1e-6)
               for name, value in wanted.state_dict().items())
    assert sum(not torch.equal(state[name], value) for name, value in before.items()) == 8
    assert relative_error(read_both(got, *questions()), read_both(wanted.eval(), *questions())) <= 1e-6
    opened = CLIPModel.from_pretrained(tmp_path / "out").eval()
    assert relative_error(read_both(opened, *questions()), read_both(wanted, *questions())) <= 1e-6


@pytest.mark.parametrize("changes", [
    {"use_rslora": True}, {"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 2}},
    {"alpha_pattern": {"q_proj": 2}}, {"fan_in_fan_out": True}, {"init_lora_weights": "pissa"},
    {"lora_bias": True, "init_lora_weights": True},
])  # fmt: skip
def test_we_know_the_fields_of_peft(changes: dict, tmp_path: Path) -> None:
    """The names in its own file: what it writes for plain LoRA is taken, each other kind is refused."""
    from peft import LoraConfig

    plain = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "lora_dropout": 0.1,
             "init_lora_weights": "gaussian"}
    LoraConfig(**plain).save_pretrained(tmp_path)
    assert read_adapter(tmp_path / PEFT_CONFIG) == (4, 6)
    LoraConfig(**{**plain, **changes}).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=f"{PEFT_CONFIG}: {next(iter(changes))} = "):
        read_adapter(tmp_path / PEFT_CONFIG)


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
