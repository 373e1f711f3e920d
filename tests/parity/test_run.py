"""A run of train_diffusion opens in diffusers and transformers, part by part, and says the same there."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
import transformers

from minidiff.text_to_image import TextToImage
from tests.parity.compare import relative_error
from train import train_diffusion
from train.train_diffusion import TrainConfig

DATA = Path(__file__).parent.parent.parent / "data" / "calligraphy"


def test_a_trained_run_opens_upstream(tmp_path: Path) -> None:
    train_diffusion.main(TrainConfig(data=str(DATA), out=str(tmp_path / "run"), size=16, preset="tiny",
                                     steps=2, batch=4, samples=0, sample_steps=2, device="cpu"))
    folder = tmp_path / "run" / "model"
    ours = TextToImage.load(folder)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    sampler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")

    prompts = ["春 草書", "乾 楷書", "", "龍"]
    ids = tokenizer(prompts, padding="max_length", max_length=ours.tokenizer.model_max_length,
                    truncation=True, return_tensors="pt").input_ids
    mine = ours.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, mine)
    x = torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        context = text(ids).last_hidden_state
        assert relative_error(ours.conditioning(prompts)["text"], context) <= 2e-6
        assert relative_error(ours.unet(x, 500, context).sample, unet(x, 500, context).sample) <= 2e-6
        sampler.set_timesteps(4)
        y = x
        for t in sampler.timesteps:         # a whole sampling run with upstream's parts only
            y = sampler.step(unet(y, t, context).sample, t, y, use_clipped_model_output=True).prev_sample
        z = ours.denoise(x, prompts, steps=4, guidance=1.0)
    assert relative_error(z, ours.decode(y).clamp(-1, 1)) <= 1e-5
