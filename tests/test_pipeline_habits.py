"""What users of diffusers type, without diffusers: encoded prompts, callbacks, LoRA, offloading, parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import minidiff
from miniclip.weights import WeightsError, load_file, save_file
from minidiff import EulerDiscreteScheduler, StableDiffusionPipeline
from minidiff.lora import FILE, LORA_METADATA, LoRALinear
from tests.test_lora import teach
from tests.test_minidiff_pipeline import draw, make
from train.lora import CLIP_PROJECTIONS, add_lora, save_lora


@pytest.fixture(scope="module", params=[False, True], ids=["sd", "xl"])
def pipe(request: pytest.FixtureRequest) -> StableDiffusionPipeline:
    return make(request.param)


def encoded(pipe: StableDiffusionPipeline, *args, **kwargs) -> dict[str, torch.Tensor]:
    names = [f"{sign}{kind}_embeds" for kind in ("prompt", "pooled_prompt") for sign in ("", "negative_")]
    return dict(zip(names, pipe.encode_prompt(*args, **kwargs), strict=False))


def test_encoded_prompts_stand_for_prompts(pipe) -> None:
    whole = draw(pipe, "goji", negative_prompt="old", num_images_per_prompt=2)
    embeds = encoded(pipe, "goji", "cpu", 1, True, negative_prompt="old")
    assert torch.equal(draw(pipe, None, num_images_per_prompt=2, **embeds), whole)
    kept, pipe.text_encoder = pipe.text_encoder, None
    assert torch.equal(draw(pipe, None, num_images_per_prompt=2, **embeds), whole)
    with pytest.raises(ValueError, match="give prompt_embeds"):
        draw(pipe)
    pipe.text_encoder = kept


def test_without_a_negative_prompt_the_usual_one_is_taken(pipe) -> None:
    embeds = {k: v for k, v in encoded(pipe, "goji").items() if "negative" not in k}
    assert torch.equal(draw(pipe, None, **embeds), draw(pipe, "goji"))
    assert all(v is None for k, v in encoded(pipe, "goji", None, 1, False).items() if "negative" in k)


def test_arrays_and_tuples(pipe) -> None:
    picture = draw(pipe)
    array = draw(pipe, output_type="np")
    assert array.shape == (1, 16, 16, 3) and torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), picture)
    images, *rest = pipe("a herb shop", num_inference_steps=1, output_type="latent", return_dict=False)
    assert rest == ([] if pipe.is_xl else [None]) and images.shape == (1, 4, 8, 8)
    for image in (array, array[0], [array[0]], picture, picture[0]):
        assert torch.equal(draw(pipe, image=image, strength=0.5, num_inference_steps=4),
                           draw(pipe, image=picture, strength=0.5, num_inference_steps=4))


def test_a_walk_of_ones_own(pipe) -> None:
    kept = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(kept.config)
    seen = []
    note = lambda p, i, t, v: seen.append(round(float(t)))  # noqa: E731
    draw(pipe, timesteps=[900, 400, 20], num_inference_steps=None, callback_on_step_end=note)
    assert seen == [900, 400, 20] and pipe.num_timesteps == 3
    pipe.scheduler.set_timesteps(5)
    by_sigma = draw(pipe, sigmas=pipe.scheduler.sigmas.tolist())
    assert torch.allclose(by_sigma, draw(pipe, num_inference_steps=5), atol=1e-3)
    pipe.scheduler = kept
    with pytest.raises(ValueError, match="takes no sigmas"):
        draw(pipe, sigmas=[3.0, 1.0, 0.0])


def test_two_models_in_turn(pipe) -> None:
    """denoising_end stops, denoising_start goes on from there: together they are the whole walk."""
    kept = pipe.scheduler
    for kind in (minidiff.DDIMScheduler, EulerDiscreteScheduler, minidiff.PNDMScheduler):
        pipe.scheduler = kind.from_config(kept.config, skip_prk_steps=True, timestep_spacing="leading")
        if kind is not minidiff.PNDMScheduler:      # whose memory of past steps does not go over
            half = draw(pipe, num_inference_steps=10, denoising_end=0.6, output_type="latent")
            rest = draw(pipe, image=half, num_inference_steps=10, denoising_start=0.6)
            assert torch.allclose(rest, draw(pipe, num_inference_steps=10), atol=1e-5)
    pipe.scheduler = kept
    for start, end in ((0.0, None), (None, 1.5), (0.7, 0.2)):
        with pytest.raises(ValueError, match="denoising"):
            draw(pipe, image=torch.zeros(1, 4, 8, 8), denoising_start=start, denoising_end=end)


def test_callbacks(pipe) -> None:
    names = pipe._callback_tensor_inputs
    seen = []

    def look(p, i, t, values):
        seen.append(sorted(values))
        p._guidance_scale += 1
        return values

    draw(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names, guidance_scale=2)
    assert seen == [sorted(names)] * 3 and pipe.guidance_scale == 5
    with pytest.raises(ValueError, match="'unet' is not one of latents, prompt_embeds"):
        draw(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["unet"])


def test_guidance_that_stops_half_way(pipe) -> None:
    """diffusers' documented trick: from a step on, the prompt's rows alone."""
    texts = [name for name in pipe._callback_tensor_inputs if name in ("prompt_embeds", "add_text_embeds",
                                                                       "add_time_ids")]
    rows = []

    def stop(p, i, t, values):
        p._guidance_scale = 0.0
        return {name: values[name].chunk(2)[-1] for name in texts} if i == 0 else {}

    hook = pipe.unet.register_forward_pre_hook(lambda unet, args: rows.append(len(args[0])))
    draw(pipe, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["latents", *texts])
    hook.remove()
    assert rows == [2, 1, 1]


def test_interrupted(pipe) -> None:
    kept = []

    def stop(p, i, t, values):
        kept.append(values["latents"])
        p._interrupt = i == 1

    last = draw(pipe, num_inference_steps=5, callback_on_step_end=stop, output_type="latent")
    assert len(kept) == 2 and torch.equal(last, kept[1]) and pipe.interrupt
    assert draw(pipe).shape == (1, 3, 16, 16) and not pipe.interrupt       # the next call starts anew


@pytest.mark.parametrize(("kwargs", "word"), [
    ({"prompt": None}, "either prompt or prompt_embeds"),
    ({"prompt": 3}, "a int, not a text"),
    ({"prompt_embeds": torch.zeros(1, 5, 32)}, "either prompt or"),
    ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 5, 32)}, "negative_prompt_embeds"),
    ({"callback": print}, "use callback_on_step_end"),
    ({"denoising_start": 0.5}, "needs an image"),
    ({"ip_adapter_image": 1}, "IP adapters"),
])
def test_refused_in_a_call(pipe, kwargs, word) -> None:
    with pytest.raises(ValueError, match=word):
        draw(pipe, **{"prompt": "a", **kwargs})


def test_an_unknown_option_is_a_typeerror(pipe) -> None:
    with pytest.raises(TypeError, match="'guidence_scale'"):
        draw(pipe, guidence_scale=3)


# ------------------------------------------------------------------------------------------------- the object


def test_parts(pipe) -> None:
    own = {"text_encoder_2", "tokenizer_2"} if pipe.is_xl else {"safety_checker"}
    assert set(pipe.components) == {"vae", "unet", "scheduler", "tokenizer", "text_encoder",
                                    "feature_extractor", "image_encoder", *own}
    other = StableDiffusionPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet and torch.equal(draw(other), draw(pipe))
    assert StableDiffusionPipeline(**pipe.components).vae is pipe.vae
    with pytest.raises(ValueError, match="safety_checker is not supported"):
        StableDiffusionPipeline(**{**pipe.components, "safety_checker": torch.nn.Linear(1, 1)})


def test_moving(pipe) -> None:
    half = pipe.to(dtype=torch.bfloat16)
    assert half is pipe and pipe.dtype == torch.bfloat16
    pipe.to(device="cpu", dtype=torch.float32)
    assert pipe.device == torch.device("cpu") and pipe.vae.dtype == torch.float32


def test_offloading_moves_each_model_when_it_works(pipe, monkeypatch) -> None:
    """No GPU is needed to see who is moved where."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.backends.mps, "is_available", lambda: False)
        with pytest.raises(ValueError, match="no GPU"):
            pipe.enable_model_cpu_offload()
    whole, moves = draw(pipe), []
    names = {id(model): name for name, model in pipe.components.items()}
    monkeypatch.setattr(pipe, "at_work", lambda *models: moves.append({names[id(m)] for m in models if m}))
    assert torch.equal(draw(pipe), whole)
    texts = {"text_encoder", "text_encoder_2"} if pipe.is_xl else {"text_encoder"}
    assert [move for i, move in enumerate(moves) if move != moves[i - 1]] == [texts, {"unet"}, {"vae"}, set()]
    monkeypatch.undo()
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe.device.type == "cpu" and torch.equal(draw(pipe), whole)
    pipe.to("cpu")
    assert pipe.offload_device is None


def test_memory_switches(pipe) -> None:
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe.vae.use_slicing and pipe.vae.use_tiling
    pipe.disable_vae_slicing()
    pipe.disable_vae_tiling()
    with pytest.warns(UserWarning, match="does nothing here"):
        pipe.enable_attention_slicing()
    pipe.set_progress_bar_config(disable=True, desc="x")


def test_what_is_left_out_says_what_to_do(pipe) -> None:
    with pytest.raises(AttributeError, match="enable_sequential_cpu_offload is left out: use enable_model"):
        pipe.enable_sequential_cpu_offload()
    assert not hasattr(pipe, "load_ip_adapter")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        pipe.nothing  # noqa: B018


def test_a_folder_with_other_parts(tmp_path: Path, pipe) -> None:
    pipe.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "text_encoder" / "pytorch_model.bin").exists()
    assert not list(tmp_path.rglob("*.safetensors"))
    read = StableDiffusionPipeline.from_pretrained
    again = read(tmp_path, unet=pipe.unet, safety_checker=None, local_files_only=True, use_safetensors=True)
    assert again.unet is pipe.unet and torch.equal(draw(again), draw(pipe))
    with pytest.raises(TypeError, match="'text_encodr'"):
        read(tmp_path, text_encodr=None)
    with pytest.raises(ValueError, match="device_map is not supported"):
        read(tmp_path, device_map="auto")
    assert read(tmp_path, text_encoder=None, tokenizer=None).text_encoder is None


def test_old_attributes_of_a_model(tmp_path: Path) -> None:
    unet = make().unet
    with pytest.warns(FutureWarning, match=r"read \.config\.in_channels"):
        assert unet.in_channels == 4
    unet.register_to_config(sample_size=96)
    unet.save_config(tmp_path)
    assert minidiff.UNet2DConditionModel.load_config(tmp_path)["sample_size"] == 96
    assert minidiff.UNet2DConditionModel.from_config(dict(unet.config)).config.sample_size == 96
    unet.register_to_config(note="mine")
    assert unet.config["note"] == "mine" and "note" not in unet.config.to_dict()


# ------------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A file for the UNet, and the scale 2 inside of B."""
    unet = make().unet
    add_lora(unet, rank=2, alpha=4)
    teach(unet)
    save_lora(unet, tmp_path / FILE)
    return tmp_path


def test_lora_goes_in_and_out(lora: Path) -> None:
    pipe = make()
    before, keys = draw(pipe), list(pipe.unet.state_dict())
    pipe.load_lora_weights(lora, adapter_name="ink")
    taken = draw(pipe)
    assert not torch.allclose(taken, before, atol=1e-3)
    assert pipe.get_active_adapters() == ["ink"] and pipe.get_list_adapters() == {"unet": ["ink"]}
    assert torch.allclose(draw(pipe, cross_attention_kwargs={"scale": 0.0}), before, atol=1e-6)
    half = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.set_adapters("ink", 0.5)
    assert torch.equal(draw(pipe), half)
    pipe.disable_lora()
    assert pipe.get_active_adapters() == [] and torch.allclose(draw(pipe), before, atol=1e-6)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), taken)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), before) and list(pipe.unet.state_dict()) == keys
    assert not any(isinstance(m, LoRALinear) for m in pipe.unet.modules())


def test_fused_and_not(lora: Path) -> None:
    pipe = make()
    before = draw(pipe)
    pipe.load_lora_weights(lora / FILE)
    half = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.fuse_lora(lora_scale=0.5)
    assert torch.allclose(draw(pipe), half, atol=1e-5)
    assert not any(isinstance(m, LoRALinear) for m in pipe.unet.modules())
    pipe.unfuse_lora()
    assert torch.equal(draw(pipe, cross_attention_kwargs={"scale": 0.5}), half)
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()                              # what was fused stays
    assert torch.allclose(draw(pipe), half, atol=1e-5) and not torch.allclose(draw(pipe), before, atol=1e-4)


def test_a_text_encoder_learns_too(tmp_path: Path) -> None:
    """Under transformers 4's names and 5's; diffusers' note of rank and alpha beside the weights counts."""
    pipe = make()
    add_lora(pipe.text_encoder, 2, 2, CLIP_PROJECTIONS)
    teach(pipe.text_encoder)
    save_lora(pipe.text_encoder, tmp_path / "a.safetensors", "text_encoder")
    taught = draw(pipe)
    tensors = load_file(tmp_path / "a.safetensors", mmap=False)
    newer = {key.replace("text_model.", ""): value for key, value in tensors.items()}
    for source in (tmp_path, tensors, newer):
        fresh = make()
        fresh.load_lora_weights(source)
        assert torch.allclose(draw(fresh), taught, atol=1e-5)
    note = '{"text_encoder.r": 2, "text_encoder.lora_alpha": 8}'
    halved = {key: value / 4 if "lora_B" in key else value for key, value in tensors.items()}
    save_file(halved, tmp_path / "a.safetensors", {LORA_METADATA: note})
    fresh = make()
    fresh.load_lora_weights(tmp_path, weight_name="a.safetensors")
    assert torch.allclose(draw(fresh), taught, atol=1e-5)


def test_lora_files_that_are_refused(lora: Path) -> None:
    pipe, tensors = make(), load_file(lora / FILE, mmap=False)
    before = draw(pipe)
    for change, word in (({"lora_unet_down": torch.zeros(1)}, "kohya"),
                         ({"unet.x.lora_A.weight": torch.zeros(1)}, "unet.x")):
        with pytest.raises(WeightsError, match=word):
            pipe.load_lora_weights({**tensors, **change})
    with pytest.raises(WeightsError, match="holds no LoRA"):
        pipe.load_lora_weights({})
    save_file(tensors, lora / FILE, {LORA_METADATA: '{"unet.r": 0}'})
    with pytest.raises(WeightsError, match="names no rank and alpha"):
        pipe.load_lora_weights(lora)
    assert torch.equal(draw(pipe), before)                  # all or nothing
    with pytest.raises(ValueError, match="none is loaded"):
        pipe.fuse_lora()
    pipe.load_lora_weights(tensors, adapter_name="a")
    with pytest.raises(ValueError, match="only 'a' is loaded"):
        pipe.set_adapters("b")
    with pytest.raises(ValueError, match="'a' is loaded: fuse_lora"):
        pipe.load_lora_weights(tensors)
