"""Fine-tuning SDXL and models for inpainting: what the UNet is told and shown, the cache,
whole runs on tiny models."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
from torch import Tensor

from miniclip.convert import to_openai
from miniclip.model import CLIPTextModelWithProjection
from miniclip.weights import load_file, save_file
from minidiff import convert
from minidiff.lora import FILE
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.vae import DiagonalGaussianDistribution
from tests.test_lora import LATENT
from tests.test_minidiff_pipeline import TOKENIZER, draw, make, single_file
from tests.test_train_parallel import needs_fork, rows, together
from train import latent, train_diffusion, validation
from train.data.folder import CaptionedImages
from train.data.grid import save_image
from train.latent import MASKS, LatentTextToImage, checksum, load_pipeline, random_mask, read_cache

SMALL = {"block_out_channels": (16, 32), "norm_num_groups": 8}
KINDS = {"xl": {**SMALL, "xl": True}, "inpaint": {**SMALL, "in_channels": 9},
         "xl-inpaint": {**SMALL, "xl": True, "in_channels": 9}}
CAPTIONS = ["春", "a herb", "滿 乾", "a shop"]
WEIGHTS = "model/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def short_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "TIMESTEPS", (299, 959))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tiny model folder of each kind, whose latents have a deviation near 1."""
    folder = tmp_path_factory.mktemp("models")
    for kind, options in KINDS.items():
        pipe = make(**options)
        pipe.vae.config = dataclasses.replace(pipe.vae.config, scaling_factor=3.0)
        pipe.save_pretrained(folder / kind)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four pictures of coarse noise: no part of one tells anything about the rest of it, or about another."""
    folder, generator = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    table = ["file,caption"]
    for i, caption in enumerate(CAPTIONS):
        noise = torch.rand(3, 8, 8, generator=generator) * 2 - 1
        save_image(noise.repeat_interleave(2, 1).repeat_interleave(2, 2), folder / f"{i}.png")
        table.append(f"{i}.png,{caption}")
    (folder / "captions.csv").write_text("\n".join(table), encoding="utf-8")
    return folder


def train(init: Path, data: Path, out: Path, **changes) -> Path:
    train_diffusion.main(dataclasses.replace(LATENT, init=str(init), data=str(data), out=str(out),
                                             **{"steps": 2, **changes}))
    return out


def pictures(data: Path) -> Tensor:
    return CaptionedImages(data, size=16, channels=3).images()


def writer_of(folder: Path, data: Path, cache: Path,
              dtype: torch.dtype = torch.float32) -> tuple[LatentTextToImage, Tensor]:
    """A writer and the latents of the pictures in `data`."""
    writer = LatentTextToImage(load_pipeline(str(folder), "").to(dtype), 16, CAPTIONS)
    return writer, writer.cache_latents(pictures(data).to(dtype), cache, "key")


def draws(pipe: StableDiffusionPipeline, image: Tensor) -> Tensor:
    paint = {"image": image[None] / 2 + 0.5, "mask_image": torch.ones(1, 1, 16, 16)}
    return draw(pipe, **(paint if pipe.unet.config.in_channels == 9 else {}))


# ------------------------------------------------------------------------------------------------- whole runs


LORA, FREEZE = {"lora": 2, "lr": 0.01}, {"freeze": "attn|resnets"}


@pytest.mark.parametrize("kind,changes",
                         [("xl", {}), ("xl", LORA), ("xl", FREEZE), ("inpaint", {}), ("inpaint", LORA),
                          ("xl-inpaint", {})])
def test_a_run_ends_in_a_model_that_draws(tmp_path: Path, models: Path, data: Path, kind: str,
                                          changes: dict) -> None:
    """All weights, LoRA's or some; what stays is the same, byte for byte;
    a resumed run ends like one that never stopped."""
    run = train(models / kind, data, tmp_path / "run", save_every=1, keep=3, **changes)
    before, after = (StableDiffusionPipeline.from_pretrained(folder)
                     for folder in (models / kind, run / "model"))
    image = pictures(data)[0]
    assert not torch.equal(draws(before, image), draws(after, image))
    assert (run / "lora" / FILE).exists() == bool(changes.get("lora"))
    same = {name for name, value in after.unet.state_dict().items()
            if torch.equal(value, before.unet.state_dict()[name])}
    learns = ("conv_in",) if changes else ("conv_in", "to_q", "resnets")
    if changes.get("lora"):
        learns = ("to_q", "to_out.0.weight")
    assert all(any(word in name for name in set(after.unet.state_dict()) - same) for word in learns)
    assert bool(same) == bool(changes)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        assert ((run / "model" / part).exists()) == ((models / kind / part).exists())
        for file in (models / kind / part).glob("*.safetensors"):
            assert file.read_bytes() == (run / "model" / part / file.name).read_bytes()
    whole = (run / WEIGHTS).read_bytes(), (run / "metrics.jsonl").read_text()
    (run / "checkpoint.1.pt").replace(run / "checkpoint.pt")                    # of step 1
    train(models / kind, data, run, save_every=1, keep=3, resume=True, **changes)
    assert ((run / WEIGHTS).read_bytes(), (run / "metrics.jsonl").read_text()) == whole


def test_it_learns_from_what_surrounds_the_mask(tmp_path: Path, models: Path, data: Path) -> None:
    """The loss falls, and a model that sees the surroundings of another picture does worse."""
    run = train(models / "inpaint", data, tmp_path, steps=120, lr=0.01, ema=0.9, warmup=5)
    losses = [row["loss"] for row in rows(run) if "loss" in row]
    assert sum(losses[-10:]) < 0.4 * sum(losses[:3]) * 10 / 3
    writer, x0 = writer_of(run / "model", data, tmp_path)
    chosen, masks, t = torch.arange(4), torch.ones(4, dtype=torch.long), torch.full((4,), 300)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        right, wrong = (writer(x0, CAPTIONS, t, noise, writer.inpaint_input(rows, masks)).item()
                        for rows in (chosen, chosen.roll(1)))
    assert right < 0.9 * wrong


@pytest.mark.parametrize("kind", ["xl", "inpaint"])
def test_a_second_run_encodes_nothing(tmp_path: Path, models: Path, data: Path, kind: str,
                                      monkeypatch) -> None:
    weights = (train(models / kind, data, tmp_path) / WEIGHTS).read_bytes()

    def never(*_):
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(LatentTextToImage, "encode", never)
        patch.setattr(StableDiffusionPipeline, "encode_text", never)
        assert (train(models / kind, data, tmp_path, overwrite=True) / WEIGHTS).read_bytes() == weights


def float64(monkeypatch) -> None:
    """Runs of the script in float64, whose sums in another order agree to 1e-11."""
    read, load = CaptionedImages.images, load_pipeline
    monkeypatch.setattr(CaptionedImages, "images", lambda self: read(self).double())
    monkeypatch.setattr(train_diffusion, "load_pipeline", lambda *args: load(*args).to(torch.float64))
    torch.set_default_dtype(torch.float64)


@needs_fork
def test_two_processes_equal_one(tmp_path: Path, models: Path, data: Path, monkeypatch) -> None:
    """Whether each holds the whole model or, with --shard, half of it."""
    float64(monkeypatch)
    work = partial(train, models / "xl-inpaint", data)
    ways = [{"accumulate": 2}] + [{"shard": True}] * hasattr(torch.distributed.fsdp, "fully_shard")
    try:
        one = work(tmp_path / "one")
        for i, changes in enumerate(ways):
            two = tmp_path / f"two{i}"
            assert together(2, partial(work, two, **changes)) == [0, 0]
            for a, b in zip(rows(one), rows(two), strict=True):
                assert a == pytest.approx(b, rel=1e-11, abs=1e-14)
            a, b = (load_file(out / WEIGHTS) for out in (one, two))
            assert all(torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-12) for name in a)
            assert len(list((one / "model").rglob("*"))) == len(list((two / "model").rglob("*")))
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_single_file_of_a_model_for_inpainting(tmp_path: Path, data: Path) -> None:
    single_file(make(in_channels=9), tmp_path / "model.safetensors")
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    run = train(tmp_path / "model.safetensors", data, tmp_path / "run", tokenizer=str(tmp_path / "tokenizer"))
    assert StableDiffusionPipeline.from_pretrained(run / "model").unet.config.in_channels == 9


def test_a_single_file_of_sdxl(tmp_path: Path, data: Path) -> None:
    """Both encoders are found in it, and a run ends in a folder."""
    pipe = make(xl=True, addition_time_embed_dim=256, projection_class_embeddings_input_dim=32 + 6 * 256,
                use_linear_projection=True, attention_head_dim=1)
    second = dataclasses.replace(pipe.text_encoder_2.config, hidden_act="gelu")
    pipe.text_encoder_2 = CLIPTextModelWithProjection(second).eval()
    pipe.vae.config = dataclasses.replace(pipe.vae.config, scaling_factor=0.13025)
    state = {"conditioner.embedders.0.transformer." + n: t for n, t in pipe.text_encoder.state_dict().items()}
    state |= {"conditioner.embedders.1.model." + n: t
              for n, t in to_openai(pipe.text_encoder_2.state_dict()).items()}
    for prefix, model, table in ((convert.UNET, pipe.unet, convert.unet_table(pipe.unet.config)),
                                 ("first_stage_model.", pipe.vae, convert.vae_table(pipe.vae.config))):
        back = convert.rename(model.state_dict(), {new: old for old, new in table.items()})
        state |= {prefix + name: tensor for name, tensor in back.items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    run = train(tmp_path / "model.safetensors", data, tmp_path / "run", tokenizer=str(tmp_path / "tokenizer"))
    assert StableDiffusionPipeline.from_pretrained(run / "model").is_xl
    writer = LatentTextToImage(load_pipeline(str(tmp_path / "model.safetensors"),
                                             str(tmp_path / "tokenizer")), 16, CAPTIONS)
    # which fills up with another token
    pipe.tokenizer_2 = writer.pipe.tokenizer_2
    text, pooled = pipe.encode_text(["春"], ["春"], None)
    told = writer.conditioning(["春"])
    assert torch.allclose(told["text"], text, atol=1e-5) and torch.allclose(told["pooled"], pooled, atol=1e-5)


# ------------------------------------------------------------------------------- what the UNet hears and sees


@pytest.mark.parametrize("zeros", [True, False])
def test_the_loss_of_sdxl_by_hand(zeros: bool) -> None:
    """Both encoders side by side, the pooled text, six sizes;
    what guidance takes for no prompt is what learns as such."""
    pipe = make(xl=True).to(torch.float64)
    pipe.force_zeros_for_empty_prompt = zeros
    prompts, generator = ["春", "", "a herb shop"], torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.tensor([10, 500, 990])
    text, pooled = pipe.encode_text(prompts, prompts, None)
    if zeros:
        text[1], pooled[1] = 0, 0
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = (1 - betas).cumprod(0)[t].view(3, 1, 1, 1).double()
    sizes = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).double().repeat(3, 1)
    answer = pipe.unet(alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise, t, text,
                       added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    loss = LatentTextToImage(pipe, 16, prompts)(x0, prompts, t, noise)
    assert loss.item() == pytest.approx((answer - noise).square().mean().item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["inpaint", "xl-inpaint"])
def test_the_surroundings_are_those_of_the_pipeline(tmp_path: Path, models: Path, data: Path, kind: str,
                                                    monkeypatch) -> None:
    """The channels beside the latents that the pipeline gives its UNet for the same picture and mask."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_: self.mode())
    writer, _ = writer_of(models / kind, data, tmp_path)
    mask, inputs, image = random_mask(16, torch.Generator().manual_seed(5))[None], [], pictures(data)[2:3]
    writer.unet.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    writer.pipe("春", image=image / 2 + 0.5, mask_image=mask, num_inference_steps=1, guidance_scale=1,
                output_type="latent")
    assert torch.allclose(writer.mask_and_latents(image, mask), inputs[0][:, 4:], atol=1e-5)
    inputs.clear()
    writer.pipe("春", image=image / 2 + 0.5, mask_image=mask * 0 + 1, num_inference_steps=1, guidance_scale=1,
                output_type="pt")
    for picture in range(4):
        first = writer.inpaint_input(torch.tensor([picture]), torch.tensor([0]))["inpaint"]
        assert torch.allclose(first, inputs[0][:, 4:], atol=1e-5)           # all is painted: no picture shows
    writer.predict(inputs[0][:, :4], 5, {**writer.conditioning(["春"]),
                                         **writer.inpaint_input(torch.tensor([1]), torch.tensor([2]))})
    assert torch.equal(inputs[-1][:, 4:],
                       writer.inpaint_inputs[1, 2][None]) and torch.equal(inputs[-1][:, :4], inputs[0][:, :4])


def test_each_picture_has_masks_of_its_own(tmp_path: Path, models: Path, data: Path) -> None:
    writer, x0 = writer_of(models / "inpaint", data, tmp_path)
    masks = writer.inpaint_inputs[:, :, 0]                                    # [N, M, h, w]
    assert writer.inpaint_inputs.shape == (4, MASKS, 5, 8, 8) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert (masks[:, 0] == 1).all() and len(masks.flatten(0, 1).unique(dim=0)) > 10
    again, _ = writer_of(models / "inpaint", data, tmp_path / "other")
    assert torch.equal(again.inpaint_inputs, writer.inpaint_inputs)             # drawn from a fixed seed
    # where the VAE's view meets no mask
    far = torch.nn.functional.max_pool2d(masks[2, 1][None], 7, 1, 3)[0] == 0
    assert not far.any() or torch.allclose(writer.inpaint_inputs[2, 1, 1:, far], x0[2][:, far], atol=0.5)


def test_random_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (16, 64):
        covered = torch.stack([random_mask(size, generator) for _ in range(300)]).mean((1, 2, 3))
        assert 0.04 < covered.min() < 0.15 and 0.5 < covered.max() < 0.65 and 0.25 < covered.mean() < 0.4


def test_the_writer_holds_all_models_and_only_the_unet_learns(models: Path) -> None:
    """What is not among its parts would stay behind when it moves to another device."""
    writer = LatentTextToImage(load_pipeline(str(models / "xl"), ""), 16, CAPTIONS)
    parts = {name.split(".")[0] for name, _ in writer.named_parameters()}
    assert parts == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert {name.split(".")[0] for name, p in writer.named_parameters() if p.requires_grad} == {"unet"}


@pytest.mark.parametrize("kind", ["xl", "inpaint"])
def test_which_mask_is_drawn_last_and_only_where_there_are_masks(models: Path, kind: str) -> None:
    writer = LatentTextToImage(load_pipeline(str(models / kind), ""), 16, CAPTIONS)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    drawn = writer.draw_masks(400, generator)
    assert torch.equal(generator.get_state(), before) == (kind == "xl")
    assert drawn.unique().tolist() == ([0] if kind == "xl" else list(range(MASKS)))


def test_validation_sees_all_masks_and_claims_no_bound(tmp_path: Path, models: Path, data: Path,
                                                       monkeypatch) -> None:
    asked, around = [], LatentTextToImage.inpaint_input
    monkeypatch.setattr(LatentTextToImage, "inpaint_input", lambda self,
                        *rows: (asked.append(rows), around(self, *rows))[1])
    monkeypatch.setattr(LatentTextToImage, "max_batch", 3)
    writer, x0 = writer_of(models / "inpaint", data, tmp_path)
    grid = writer.sample(CAPTIONS, 0, LATENT.sample_steps, LATENT.guidance, batch=3)
    scores = validation.validate(writer, x0, CAPTIONS, complete=True)
    assert grid.shape == (4, 3, 16, 16) and "bound" not in scores and "val" in scores
    painted = [masks for chosen, masks in asked if len(chosen) == len(masks) and not masks.any()
               and not chosen.any()]
    seen = [pair for rows in asked for pair in zip(*(r.tolist() for r in rows), strict=True)]
    assert painted and set(seen) == {(0, 0), (1, 1), (2, 2), (3, 3)}
    xl, x0 = writer_of(models / "xl", data, tmp_path)
    assert "bound" in validation.validate(xl, x0, CAPTIONS, complete=True)


# -------------------------------------------------------------------------------------------------- the cache


def test_the_cache_holds_nothing_stale(tmp_path: Path, models: Path, data: Path) -> None:
    """Other text encoders, VAEs, settings or pictures make another file."""
    writer, _ = writer_of(models / "xl", data, tmp_path)

    def made(change) -> LatentTextToImage:
        pipe = load_pipeline(str(models / "xl"), "")
        pixels = pictures(data)
        with torch.no_grad():
            change(pipe, pixels)
        files = len(list(tmp_path.iterdir()))
        other = LatentTextToImage(pipe, 16, CAPTIONS)
        other.cache_latents(pixels, tmp_path, "key")
        other.is_new = len(list(tmp_path.iterdir())) > files
        return other

    def second(pipe, _) -> None:
        pipe.text_encoder_2.text_projection.weight[3, 4] += 1

    assert not made(lambda *_: None).is_new
    assert not torch.equal(made(second).conditioning(["春"])["pooled"], writer.conditioning(["春"])["pooled"])
    assert made(lambda pipe, _: pipe.vae.decoder.conv_out.bias[0].add_(1)).is_new
    layers = "text_model.encoder.layers"
    assert made(lambda pipe, _: pipe.text_encoder.get_submodule(layers)[0].mlp.fc1.bias[-1].add_(1)).is_new
    assert made(lambda _, pixels: pixels[2, 1, 3, 3].add_(0.1)).is_new
    assert made(lambda pipe, _: setattr(pipe, "force_zeros_for_empty_prompt",
                                        False)).conditioning([""])["text"].abs().max() > 0
    assert not made(lambda pipe, _: pipe.unet.conv_in.weight.add_(1)).is_new


def test_a_cache_of_another_kind_is_made_again(tmp_path: Path, models: Path, data: Path, capsys) -> None:
    writer, x0 = writer_of(models / "xl-inpaint", data, tmp_path)
    path, = tmp_path.iterdir()
    kept = load_file(path, mmap=False)
    assert set(kept) == {"latents", "text", "pooled", "surroundings"}
    for wrong in ({**kept, "text": kept["text"][:-1]}, {k: v for k, v in kept.items() if k != "pooled"},
                  {**kept, "surroundings": torch.tensor(1.0)}):
        save_file(wrong, path)
        again, latents = writer_of(models / "xl-inpaint", data, tmp_path)
        assert "encoding again" in capsys.readouterr().out
        assert torch.equal(latents, x0) and torch.equal(again.inpaint_inputs, writer.inpaint_inputs)
        assert read_cache(path, {name: len(rows) for name, rows in kept.items()}) is not None
    assert all(torch.equal(again.texts[p][name], values) for p, text in writer.texts.items()
               for name, values in text.items())


def test_the_checksum_sees_every_byte_of_every_type() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        a, b = torch.zeros(3, 4, dtype=dtype), torch.zeros(3, 4, dtype=dtype)
        b[2, 3] = 1
        assert len({checksum([a, a], ""), checksum([a, b], ""), checksum([b, a], ""),
                    checksum([a, a], "x")}) == 4
    assert checksum([torch.tensor(1.0)], "") != checksum([torch.tensor(2.0)],
                                                         "") and math.isfinite(checksum([], ""))


def test_load_pipeline_is_float32(tmp_path: Path) -> None:
    make(xl=True).to(torch.float16).save_pretrained(tmp_path)
    assert {model.dtype for model in latent.load_pipeline(str(tmp_path), "").models()} == {torch.float32}
