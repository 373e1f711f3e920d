"""The pipeline and its command line, without upstream: a whole small model, from arguments to PNG files."""

import json
import os
import subprocess
import sys

import pytest
import torch

from miniclip.config import CLIPTextConfig
from miniclip.model import CLIPTextModel, CLIPTextModelWithProjection
from miniclip.tokenizer import CLIPTokenizer
from miniclip.weights import WeightsError, read_json, save_file, write_json
from minidiff import __main__ as command
from minidiff import convert
from minidiff.__main__ import SAMPLERS, main
from minidiff.pil import from_pil, to_pil
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.pipeline_folder import SCHEDULERS
from minidiff.samplers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from minidiff.unet import UNet2DConditionModel
from minidiff.vae import AutoencoderKL

torch.set_num_threads(1)

TOKENIZER = CLIPTokenizer.train(["a herb shop 春 滿 乾 坤"] * 9, vocab_size=560)
CROSS, DOWN, UP, CROSS_UP = "CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
UNET = {
    "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32,
    "down_block_types": (CROSS, DOWN), "up_block_types": (UP, CROSS_UP), "attention_head_dim": 8,
}  # fmt: skip
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def text(width=32, cls=CLIPTextModel):
    sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    return cls(CLIPTextConfig.for_tokenizer(TOKENIZER, **sizes, projection_dim=width)).eval()


def make(xl=False, seed=0, **unet):
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    ).eval()  # fmt: skip
    parts = {"vae": vae, "text_encoder": text(), "tokenizer": TOKENIZER}
    if xl:
        added = {
            "cross_attention_dim": 64, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 48,
        }  # fmt: skip
        parts |= {"text_encoder_2": text(32, CLIPTextModelWithProjection), "tokenizer_2": TOKENIZER}
        unet = {**added, **unet}
    scheduler = DDIMScheduler(**BETAS, clip_sample=False)
    return StableDiffusionPipeline(unet=UNet2DConditionModel(**{**UNET, **unet}).eval(), scheduler=scheduler,
                                   **parts)


@pytest.fixture(scope="module")
def pipe():
    return make()


def draw(pipe, prompt="a herb shop", seed=0, **kwargs):
    kwargs = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(seed),
              **kwargs}
    return pipe(prompt, **kwargs).images


@pytest.mark.parametrize("xl", [False, True])
def test_pictures(xl):
    pipe = make(xl)
    x = draw(pipe)
    assert x.shape == (1, 3, 16, 16) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(x, draw(pipe)) and not torch.equal(x, draw(pipe, seed=1))
    assert not torch.equal(x, draw(pipe, "春 滿"))
    assert not torch.equal(x, draw(pipe, negative_prompt="乾"))
    assert draw(pipe, ["a", "b"], num_images_per_prompt=2, height=20, width=12).shape == (4, 3, 20, 12)
    assert draw(pipe, output_type="latent").shape == (1, 4, 8, 8)
    pictures = draw(pipe, output_type="pil")
    assert pictures[0].size == (16, 16) and pictures[0].mode == "RGB"


def test_guidance_means_what_it_says(pipe):
    """The answers mix as e_neg + g (e_text - e_neg): 1 is the prompt alone, 0 the negative prompt alone."""
    one = draw(pipe, guidance_scale=1)
    assert torch.equal(one, draw(pipe, guidance_scale=1, negative_prompt="乾"))
    with pytest.warns(UserWarning, match="ignores the prompt"):
        none = draw(pipe, guidance_scale=0)
    with pytest.warns(UserWarning):
        assert torch.equal(none, draw(pipe, "another prompt", guidance_scale=0))
    assert torch.allclose(none, draw(pipe, "", guidance_scale=1), atol=1e-5)    # the empty negative prompt
    near = draw(pipe, guidance_scale=1.01)
    # far above rounding: the difference is the guidance's
    assert 1e-5 < (one - near).abs().max() < 1e-2
    assert not torch.equal(draw(pipe, guidance_scale=3), draw(pipe, guidance_scale=7.5))
    assert torch.equal(draw(pipe), draw(pipe, guidance_scale=7.5))


def test_every_sampler(pipe):
    for name, cls in SCHEDULERS.items():
        pipe.scheduler, kept = cls.from_config(pipe.scheduler.config), pipe.scheduler
        assert torch.isfinite(draw(pipe, num_inference_steps=4)).all(), name
        pipe.scheduler = kept


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_step_waits_for_the_device(name):
    """To read a number from a GPU is to wait for all work before it. Tensors on the meta device have no
    numbers: reading one raises."""
    pipe = make().to("meta")
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    latents = torch.empty(1, 4, 8, 8, device="meta")
    x = pipe("a herb", height=16, width=16, num_inference_steps=5, latents=latents,
             output_type="latent").images
    assert x.is_meta and x.shape == latents.shape


def test_the_unet_compiles_as_one_graph(pipe):
    inputs = torch.randn(1, 4, 8, 8), torch.tensor(7), torch.randn(1, 5, 32)
    graph = torch.compile(pipe.unet, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(graph(*inputs).sample, pipe.unet(*inputs).sample)


def test_a_picture_does_not_depend_on_its_batch(pipe):
    generators = [torch.Generator().manual_seed(s) for s in (7, 8, 9)]
    batch = draw(pipe, num_images_per_prompt=3, generator=generators, output_type="latent")
    assert torch.allclose(batch[1:2], draw(pipe, seed=8, output_type="latent"), rtol=1e-4, atol=1e-3)


def test_callback_sees_and_changes_the_latents(pipe):
    seen = []

    def look(pipe, i, t, values):
        seen.append((i, int(t), values["latents"].shape))

    draw(pipe, callback_on_step_end=look)
    assert [s[0] for s in seen] == [0, 1, 2] and seen[0][1] > seen[2][1]
    end = draw(pipe, output_type="latent", callback_on_step_end=lambda p, i, t,
               v: {"latents": v["latents"] * 0})
    assert end.abs().max() == 0


def test_long_prompts_are_cut_with_a_warning(pipe):
    long = "herb " * 80 + "乾坤"
    with pytest.warns(UserWarning, match="this part is dropped: .*乾坤") as caught:
        cut = draw(pipe, long)
    assert "tokens of 77" in str(caught[0].message)
    with pytest.warns(UserWarning):
        assert torch.equal(cut, draw(pipe, "herb " * 85))


def test_image_to_image(pipe):
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    x = draw(pipe, image=image, strength=0.5, num_inference_steps=4)
    assert x.shape == image.shape
    steps = []
    draw(pipe, image=image, strength=0.5, num_inference_steps=4, callback_on_step_end=lambda p, i, t,
         v: steps.append(i))
    assert len(steps) == 2
    weak, strong = (draw(pipe, image=image, strength=s, num_inference_steps=50, output_type="latent")
                    for s in (0.02, 1.0))
    start = pipe._encode(2 * image - 1, 1, torch.Generator().manual_seed(0), torch.float32)
    assert (weak - start).abs().mean() < 0.5 * (strong - start).abs().mean()


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(channels):
    pipe = make(in_channels=channels)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    x = draw(pipe, image=image, mask_image=mask, output_type="latent")
    assert x.shape == (1, 4, 8, 8)
    if channels == 4:  # outside the mask the latents of the picture come back exactly
        known = pipe._encode(2 * image - 1, 1, torch.Generator().manual_seed(0), torch.float32)
        assert torch.allclose(x[..., :4], known[..., :4], atol=1e-6)
        assert not torch.allclose(x[..., 4:], known[..., 4:], atol=1e-2)
    else:
        with pytest.raises(ValueError, match="trained for inpainting"):
            draw(pipe)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"height": 15}, "height = 15"),
        ({"width": 0}, "width = 0"),
        ({"strength": 0.5}, "needs an image"),
        ({"strength": 1.5, "image": torch.zeros(1, 3, 8, 8)}, "strength = 1.5"),
        ({"strength": 0.1, "image": torch.zeros(1, 3, 8, 8)}, "no step"),
        ({"mask_image": torch.zeros(1, 1, 8, 8)}, "needs an image"),
        ({"image": torch.zeros(1, 1, 8, 8)}, "image is"),
        ({"image": torch.zeros(1, 3, 9, 8)}, "multiples of 2"),
        ({"image": torch.full((1, 3, 8, 8), 255.0)}, "not in 0 to 1"),
        ({"image": torch.zeros(1, 3, 8, 8), "mask_image": torch.zeros(1, 1, 8, 10)}, "does not fit"),
        ({"image": torch.zeros(3, 3, 8, 8), "num_images_per_prompt": 2}, "3 images for 2"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2"),
        ({"output_type": "jpg"}, "output_type"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents are \[1, 4, 4, 4\]"),
        ({"prompt": []}, "no prompt"),
    ],
)
def test_arguments_that_are_refused(pipe, kwargs, word):
    with pytest.raises(ValueError, match=word):
        draw(pipe, **{"prompt": "a", **kwargs})


def test_early_schedulers_are_mended():
    """SD 1 folders of the first days lack steps_offset and clip_sample; upstream mends them on reading."""
    models = make()
    parts = {name: getattr(models, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    mended = StableDiffusionPipeline(scheduler=DDIMScheduler(beta_end=0.012), **parts).scheduler.config
    assert mended.steps_offset == 1 and not mended.clip_sample and mended.beta_end == 0.012
    kept = PNDMScheduler(**BETAS)
    assert StableDiffusionPipeline(scheduler=kept, **parts).scheduler is kept


@pytest.mark.parametrize("xl", [False, True])
def test_folder_round_trip(tmp_path, xl):
    pipe = make(xl)
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(pipe), draw(again)) and again.is_xl == xl
    half = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype="bfloat16")
    assert all(model.dtype == torch.bfloat16 for model in half.models())
    assert draw(half, num_inference_steps=2).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"unet": ["diffusers", "UNet2DModel"]}, "'UNet2DModel' is not supported"),
        ({"scheduler": ["diffusers", "UniPCMultistepScheduler"]}, "DPMSolverMultistepScheduler"),
        ({"vae": None}, "'vae' is missing"),
        ({"text_encoder": [None, None]}, "'text_encoder' is missing"),
        ({"requires_aesthetics_score": True}, "refiner"),
        ({"unet": []}, "'unet' is missing"),
        ({"unet": {}}, "'unet' is missing"),
        ({"unet": ["diffusers", ["x"]]}, "['x'] is not supported"),
        ({"unet": [[], [[]]]}, "[[]] is not supported"),
        ({"scheduler": ["diffusers", 7]}, "7 is not supported"),
        ({"tokenizer": ["transformers", {"a": 1}]}, "{'a': 1} is not supported"),
        ({"vae": ["diffusers", "x" * 10**6]}, "is not supported"),
    ],
)
def test_folders_that_are_refused(pipe, tmp_path, change, word):
    pipe.save_pretrained(tmp_path)
    write_json(tmp_path / "model_index.json", {**read_json(tmp_path / "model_index.json"), **change})
    with pytest.raises(WeightsError, match="model_index.json") as caught:
        StableDiffusionPipeline.from_pretrained(tmp_path)
    assert word in str(caught.value) and len(str(caught.value)) < 700


def single_file(pipe, path):
    state = {}
    for prefix, model, table in (
        (convert.UNET, pipe.unet, convert.unet_table(pipe.unet.config)),
        ("first_stage_model.", pipe.vae, convert.vae_table(pipe.vae.config)),
    ):
        back = convert.rename(model.state_dict(), {new: old for old, new in table.items()})
        state |= {prefix + name: tensor for name, tensor in back.items()}
    state |= {"cond_stage_model.transformer." + n: t for n, t in pipe.text_encoder.state_dict().items()}
    save_file(state, path)


def test_single_file(tmp_path):
    pipe = make()
    single_file(pipe, tmp_path / "model.safetensors")
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    pipe.scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True)
    for tokenizer in (TOKENIZER, tmp_path / "tokenizer"):
        read = StableDiffusionPipeline.from_single_file(tmp_path / "model.safetensors", tokenizer)
        size = {"height": 16, "width": 16}
        assert torch.allclose(draw(read, **size), draw(pipe, **size), atol=1e-5)


def test_pillow_round_trip():
    x = torch.arange(0, 256).float().view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    assert torch.equal((from_pil(to_pil(x), 16, 16, "RGB") * 255).round(), (x * 255).round())
    assert from_pil(to_pil(x), 8, 12, "L").shape == (1, 1, 8, 12)


# ------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pipe):
    path = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(path)
    return str(path)


def test_command_line(folder, tmp_path, capsys):
    from PIL import Image

    call = ["--model", folder, "--prompt", "a herb shop", "--steps", "2", "--out", str(tmp_path / "out")]
    assert main([*call, "--count", "3", "--batch", "2", "--seed", "5"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / f"{i:04d}.png") for i in range(3)]
    second = Image.open(tmp_path / "out" / "0001.png").tobytes()
    assert main([*call, "--seed", "6"]) == 0    # picture 1 of seed 5
    alone = Image.open(tmp_path / "out" / "0000.png").tobytes()
    assert max(abs(a - b) for a, b in zip(alone, second, strict=True)) <= 1
    Image.new("RGB", (17, 20)).save(tmp_path / "in.png")
    Image.new("L", (17, 20), 255).save(tmp_path / "mask.png")
    assert main([*call, "--image", str(tmp_path / "in.png"), "--mask", str(tmp_path / "mask.png")]) == 0
    assert Image.open(tmp_path / "out" / "0000.png").size == (16, 20)
    for sampler in SAMPLERS:
        assert main([*call, "--sampler", sampler, "--guidance", "1"]) == 0


def test_shortcuts_from_the_command_line(folder, tmp_path, monkeypatch):
    seen, plain = [], command.load

    def load(a):
        pipe = plain(a)
        layers = {type(module).__name__ for module in pipe.unet.modules()}
        cached, hooks = "forward" in vars(pipe.unet), [m for m in pipe.unet.modules() if m._forward_pre_hooks]
        seen.append((layers, cached, bool(hooks), pipe.guidance_interval))
        return pipe

    monkeypatch.setattr(command, "load", load)
    call = ["--model", folder, "--prompt", "a", "--steps", "4", "--out", str(tmp_path)]
    for extra in ([], ["--optimize", "no"], ["--deep-cache", "2", "--merge-tokens", "0.5", "--int8",
                                            "--guidance-interval", "0.2", "0.8"]):
        assert main([*call, *extra]) == 0
    usual, plain_layers, short = (layers for layers, *_ in seen)
    assert "PackedConv2d" in usual and "PackedConv2d" not in plain_layers
    assert "Int8Conv2d" in short and not {"PackedConv2d", "Conv2d", "Linear"} & short
    assert [rest for _, *rest in seen] == 2 * [[False, False, (0.0, 1.0)]] + [[True, True, (0.2, 0.8)]]


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        (["--model", "hub/name"], "hub/name: no such folder or file; models are read from local folders "
                                  "only"),
        (["--count", "0"], "--count 0"),
        (["--steps", "0"], "num_inference_steps = 0"),
        (["--guidance", "nan"], "--guidance nan: not a finite number"),
        (["--guidance", "inf"], "--guidance inf"),
        (["--guidance", "1e38"], "the pictures are not finite"),
        (["--strength", "nan"], "strength = nan"),
        (["--seed", str(2**64)], f"--seed {2**64}: "),
        (["--seed", str(2**64 - 1), "--count", "2"], "with --count 2"),
        (["--height", "13"], "height = 13"),
        (["--image", "no.png"], "no.png"),
        (["--strength", "0.5"], "needs an image"),
        (["--device", "gpu"], "gpu"),
        (["--variant", "fp16"], "fp16"),
        (["--out", __file__ + "/out"], "out"),
        (["--guidance-interval", "0.8", "0.2"], "guidance_interval = 0.8, 0.2"),
        (["--deep-cache", "0"], "deep_cache: every = 0"),
        (["--merge-tokens", "0.9"], "merge_tokens: ratio = 0.9"),
    ],
)
def test_command_line_mistakes_take_one_line(folder, tmp_path, capsys, extra, word):
    call = ["--model", folder, "--prompt", "a", "--steps", "1", "--out", str(tmp_path)]
    assert main([*call, *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("minidiff: ") and error.count("\n") == 1 and word in error


def test_command_line_from_a_shell(folder, tmp_path):
    """As a user types it; and the import stays light: torch and the standard library."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    call = [sys.executable, "-m", "minidiff", "--model", folder, "--prompt", "a", "--steps", "1", "--out",
            str(tmp_path)]
    done = subprocess.run(call, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "0000.png").exists(), done.stderr
    probe = "import sys, json, torch; before = set(sys.modules); import minidiff, minidiff.pipeline; " \
        "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, check=True)
    known = {"minidiff", "miniclip", "torch", "sympy", "mpmath"}            # the last two are torch's own
    foreign = [m for m in json.loads(done.stdout) if m not in sys.stdlib_module_names and m not in known]
    assert foreign == []


def test_a_reader_that_stops_reading_is_no_mistake(folder, tmp_path):
    """`python -m ... | head`: no traceback, no complaint."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    calls = (["minidiff.trace"], ["miniclip.convert", f"{folder}/text_encoder", str(tmp_path / "text")],
             # fmt: skip
             ["minidiff", "--model", folder, "--prompt", "a", "--steps", "1", "--out", str(tmp_path)])
    running = []
    for call in calls:
        process = subprocess.Popen([sys.executable, "-m", *call], cwd=root, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        process.stdout.close()
        running.append(process)
    for process in running:
        with process.stderr:
            assert process.stderr.read() == b"" and process.wait() == 0


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("1 to 1000 (default: 50)", "(default: 7.5, for SDXL 5, for a run 1.5)",
                  "seed N + i (default: 0)", "default: float32",
                  # fmt: skip
                  "(default: cpu)", "0001.png ... (default: out)", "(default: 0.8, with --mask 1)"):
        assert words in said


@pytest.mark.parametrize("name", ["guidance_scale", "guidance_rescale", "eta"])
def test_numbers_that_are_none_are_refused(pipe, name):
    with pytest.raises(ValueError, match=f"{name} = nan is not a finite number"):
        draw(pipe, **{name: float("nan")})
    with pytest.raises(ValueError, match="not finite"):
        to_pil(torch.full((1, 3, 2, 2), float("nan")))


def test_euler_in_a_pipeline_starts_at_its_own_deviation(pipe):
    pipe.scheduler, kept = EulerDiscreteScheduler.from_config(pipe.scheduler.config), pipe.scheduler
    first = []
    draw(pipe, callback_on_step_end=lambda p, i, t, v: first.append(v["latents"].std().item()))
    assert first[0] > 1.5
    pipe.scheduler = kept
