"""miniclip/trace.py and minidiff/trace.py beside real forwards: shapes, FLOPs, skips; files and errors."""

from __future__ import annotations

import csv
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from miniclip import trace as clip_trace
from miniclip.bert import BertConfig, ChineseCLIPConfig, ChineseCLIPModel
from miniclip.config import CLIPConfig, CLIPResNetConfig, CLIPTextConfig
from miniclip.convert import to_openai
from miniclip.image_text import PRESETS as CLIP_PRESETS
from miniclip.image_text import build_image_text
from miniclip.model import CLIPModel, CLIPTextModelWithProjection
from miniclip.resnet import CLIPResNetModel
from miniclip.simple import SimpleCLIPConfig, SimpleCLIPModel
from miniclip.trace import Trace, amount, first, hollow, hollow_model, inputs_of, page, shape_of, trace
from miniclip.weights import save_file
from minidiff import trace as unet_trace
from minidiff.config import UNet2DConditionConfig
from minidiff.resnet import ResnetBlock2D
from minidiff.text_to_image import PRESETS, ImageFormat, build_text_to_image
from minidiff.trace import skips_of, trace_part, unet_inputs
from minidiff.unet import Block, UNet2DConditionModel, UpBlock
from minidiff.vae import AutoencoderKL, AutoencoderKLConfig
from tests.test_minidiff_convert import single_file
from tests.torchscript import archive
from train import train_clip, train_diffusion

ROOT = Path(__file__).parent.parent
FIXTURES = Path(__file__).parent / "fixtures"
TEXT = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48, vocab_size=50,
            max_position_embeddings=9, eos_token_id=49, bos_token_id=48, projection_dim=16)
VISION = dict(hidden_size=48, num_attention_heads=4, num_hidden_layers=2, intermediate_size=80,
              image_size=16, patch_size=8, projection_dim=16)
UNET = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 24,
        "attention_head_dim": 2, "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "sample_size": 10}
PUBLISHED = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}


def unet_config(**more: Any) -> UNet2DConditionConfig:
    return UNet2DConditionConfig.from_dict({**UNET, **more}, "test")


def clip_case(kind: type, config: Any, **options: int) -> tuple[type, Any, dict[str, Any]]:
    given = {"batch": 2, "size": None, "tokens": None, **options}
    return kind, config, inputs_of(hollow_model(kind, config), **given)


def unet_case(**more: Any) -> tuple[type, Any, dict[str, Any]]:
    config = unet_config(**more)
    return UNet2DConditionModel, config, unet_inputs(config, 2, None, 5)


def bert() -> BertConfig:
    return BertConfig(vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
                      intermediate_size=48, max_position_embeddings=9)


CASES = {
    "unet": lambda: unet_case(),
    "odd": lambda: unet_case(sample_size=(9, 7)),
    "linear": lambda: unet_case(use_linear_projection=True, transformer_layers_per_block=2),
    "sdxl": lambda: unet_case(addition_embed_type="text_time", addition_time_embed_dim=8,
                              projection_class_embeddings_input_dim=16 + 6 * 8),
    "classes": lambda: unet_case(num_class_embeds=7, time_cond_proj_dim=12, encoder_hid_dim=20),
    "timestep": lambda: unet_case(class_embed_type="timestep", only_cross_attention=True),
    "projection": lambda: unet_case(class_embed_type="projection", projection_class_embeddings_input_dim=10),
    "identity": lambda: unet_case(class_embed_type="identity", mid_block_type=None),
    "textless": lambda: unet_case(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
                                  mid_block_type="UNetMidBlock2D"),
    "vae": lambda: (AutoencoderKL, AutoencoderKLConfig.from_dict({
        "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2, "sample_size": 16,
        "up_block_types": ("UpDecoderBlock2D",) * 2}, "test"), {"sample": hollow(2, 3, 16, 16)}),
    "clip": lambda: clip_case(CLIPModel, CLIPConfig(text_config=TEXT, vision_config=VISION)),
    "larger": lambda: clip_case(CLIPModel, CLIPConfig(text_config=TEXT, vision_config=VISION), size=24,
                                tokens=4),
    "text": lambda: clip_case(CLIPTextModelWithProjection, CLIPTextConfig(**TEXT)),
    "resnet": lambda: clip_case(CLIPResNetModel, CLIPResNetConfig(
        text_config=CLIPTextConfig(**TEXT), vision_layers=(1, 2, 1, 1), vision_width=16, image_size=32)),
    "simple": lambda: clip_case(SimpleCLIPModel, SimpleCLIPConfig(
        text_config=TEXT, image_layers=(1, 2, 1, 1), image_width=8), size=32),
    "chinese": lambda: clip_case(ChineseCLIPModel, ChineseCLIPConfig(
        text_config=bert(), vision_config=VISION, projection_dim=16)),
}


def with_numbers(value: Any) -> Any:
    """Hollow inputs as real ones on the CPU."""
    if isinstance(value, dict):
        return {name: with_numbers(part) for name, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    return torch.ones_like(value, device="cpu")


class Seen:
    """What hooks of the plainest kind see of a real forward."""

    def __init__(self, model: nn.Module):
        self.begun: list[str] = []
        self.shapes: dict[str, list] = {}
        self.made: dict[str, Any] = {}
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self.begun.append(name))
            module.register_forward_hook(lambda *a, name=name: self.note(name, *a), with_kwargs=True)

    def note(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.made[name] = output
        self.shapes.setdefault(name, []).append((shape_of(first((args, kwargs))), shape_of(first(output))))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_trace_is_what_a_real_forward_does(name: str) -> None:
    """Order, shapes, parameters; FLOPs of the whole and of each module by torch's own counter on the CPU."""
    kind, config, given = CASES[name]()
    hollow = trace(hollow_model(kind, config), given)
    assert all(p.is_meta for p in hollow_model(kind, config).parameters())
    model = kind(config).eval()
    seen = Seen(model)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**with_numbers(given))
    assert [row.name for row in hollow.rows] == seen.begun
    calls = {name: iter(shapes) for name, shapes in seen.shapes.items()}
    assert [(row.input, row.output) for row in hollow.rows] == [next(calls[row.name]) for row in hollow.rows]
    assert hollow.total.flops == counter.get_total_flops() > 0
    counts = {path: sum(ops.values()) for path, ops in counter.get_flop_counts().items()}
    for row in hollow.rows[1:]:
        if seen.begun.count(row.name) == 1:
            assert row.flops == counts.get(f"{kind.__name__}.{row.name}", 0), row.name
        assert row.parameters == sum(p.numel() for p in model.get_submodule(row.name).parameters())
    assert hollow.total.parameters == model.num_parameters()


@torch.no_grad()
def test_fused_attention_would_count_as_much() -> None:
    """torch's own formula for the kernel that runs on a CPU, which its counter leaves out."""
    kind, config, given = CASES["unet"]()
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def count(q: tuple, k: tuple, v: tuple, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    with FlopCounterMode(display=False, custom_mapping={fused: count}) as counter:
        kind(config).eval()(**with_numbers(given))
    assert counter.get_flop_counts()["Global"][fused] > 0
    assert trace(hollow_model(kind, config), given).total.flops == counter.get_total_flops()


@pytest.mark.parametrize("name", ["unet", "odd", "sdxl", "textless", "identity"])
@torch.no_grad()
def test_skips_are_the_tensors_that_the_way_up_pops(name: str) -> None:
    kind, config, given = CASES[name]()
    model = kind(config).eval()
    seen, found = Seen(model), []

    def popped(block: str) -> Any:
        def hook(module: Block, args: tuple) -> None:
            for j, tensor in zip(range(len(module.resnets)), reversed(args[1])):
                makers = [name for name, made in seen.made.items() if made is tensor]
                # the outermost: others hand it on
                found.append((min(makers, key=lambda name: name.count(".")), f"{block}.resnets.{j}"))
        return hook

    for path, module in model.named_modules():
        if isinstance(module, UpBlock):
            module.register_forward_pre_hook(popped(path))
    model(**with_numbers(given))
    rows = trace(hollow_model(kind, config), given).rows
    assert sorted((rows[a].name, rows[b].name) for a, b in skips_of(rows)) == sorted(found)
    for _, taker in skips_of(rows):
        assert rows[taker].kind is ResnetBlock2D and rows[taker].input[1] > config.block_out_channels[0]


def test_activations_are_counted_where_they_are_made() -> None:
    kind, config, given = CASES["unet"]()
    t = trace(hollow_model(kind, config), given)
    rows = {row.name: row for row in t.rows}
    assert rows["conv_in"].activation_bytes == 2 * 16 * 10 * 10 * 4
    assert rows["down_blocks.0.resnets.0.dropout"].activation_bytes == 0        # hands on what it was given
    leaves = [row for row, after in zip(t.rows, [*t.rows[1:], t.rows[0]]) if after.depth <= row.depth]
    assert t.total.activation_bytes == sum(row.activation_bytes for row in leaves)


# ----------------------------------------------------------------------------------------------- known models


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_unets(name: str) -> None:
    began = time.process_time()
    t = trace_part(name)
    assert t.total.parameters == PUBLISHED[name]
    assert time.process_time() - began < 60
    text = page(t)
    assert len(text.encode()) < 1_000_000 and len(t.skips) == {"sdxl": 9}.get(name, 12)


def test_what_sdxl_takes() -> None:
    t = trace_part("sdxl", size=32)
    assert any(row.name == "down_blocks.2" and row.output == [1, 1280, 8, 8] for row in t.rows)
    assert t.inputs == {"sample": [1, 4, 32, 32], "timestep": [1], "encoder_hidden_states": [1, 77, 2048],
                        "text_embeds": [1, 1280], "time_ids": [1, 6]}
    assert t.rows[-1].name == "conv_out" and t.rows[-1].output == [1, 4, 32, 32]


@pytest.mark.parametrize("name, parameters", [("clip-b32", 151_277_313), ("clip-l14", 427_616_513),
                                              ("rn50", 102_007_137)])
def test_known_clips(name: str, parameters: int) -> None:
    t = clip_trace.trace_clip(name)
    assert t.total.parameters == parameters and {tower for tower, *_ in t.drawn} == {"text", "picture"}


def test_the_demos_are_what_the_trainers_build() -> None:
    cfg = train_diffusion.TrainConfig()
    with open(ROOT / cfg.data / "captions.csv", encoding="utf-8", newline="") as file:
        captions = [row["caption"] for row in csv.DictReader(file)]
    model = build_text_to_image(PRESETS[cfg.preset], ImageFormat(cfg.size, cfg.channels, cfg.fold), captions)
    assert unet_trace.demo() == (model.unet.config, model.tokenizer.model_max_length)
    with open(ROOT / "data" / "herbs" / "captions.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["artist"] != "twitter"]
    captions = [row[column] for column in ("zh-Hant", "zh-Hans", "en") for row in rows]
    cfg = train_clip.TrainConfig()
    shop = build_image_text(CLIP_PRESETS[cfg.preset], cfg.size, captions)
    mine = clip_trace.demo()
    shapes = [{name: t.shape for name, t in m.state_dict().items()} for m in (mine, shop.model)]
    assert shapes[0] == shapes[1] and clip_trace.DEMO_SIZE == cfg.size


# ------------------------------------------------------------------------------------------------------ paths


def test_a_run_of_diffusion_traces_its_unet_and_says_so(capsys: pytest.CaptureFixture) -> None:
    run = str(FIXTURES / "run_diffusion")
    assert unet_trace.main([run, "--depth", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{run}, unet: UNet2DConditionModel(sample [1, ")
    assert said[-1].startswith("total")
    unet = UNet2DConditionModel.from_pretrained(f"{run}/model/unet")
    assert f"{unet.num_parameters():,}" in said[-1]
    text = trace_part(run, "text_encoder")
    assert text.total.kind.__name__ == "CLIPTextModel" and text.title.endswith("text_encoder")
    assert text.inputs["input_ids"][1] == trace_part(run).inputs["encoder_hidden_states"][1]
    for path in ("model/unet", "model/unet/config.json", "model/unet/diffusion_pytorch_model.safetensors"):
        assert trace_part(f"{run}/{path}").total.parameters == unet.num_parameters()


def test_a_run_of_clip_and_its_files() -> None:
    run = FIXTURES / "run_clip"
    whole = clip_trace.trace_clip(str(run))
    for path in ("model", "model/config.json", "model/model.safetensors"):
        other = clip_trace.trace_clip(str(run / path))
        assert [row.name for row in other.rows] == [row.name for row in whole.rows]
        assert other.inputs == whole.inputs and other.total.flops == whole.total.flops


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_single_files_of_the_original_layout(kind: str, tmp_path: Path) -> None:
    models, state = single_file(kind)
    save_file(state, tmp_path / "model.safetensors")
    for name, model in models.items():
        t = trace_part(str(tmp_path / "model.safetensors"), name, size=64)
        assert t.total.parameters == model.num_parameters() and t.total.kind is type(model)
    assert trace_part(str(tmp_path / "model.safetensors"), size=16).title.endswith(", unet")


@pytest.mark.filterwarnings("ignore")       # torch.jit is deprecated; only the test writes with it
@pytest.mark.parametrize("kind", ["clip", "resnet"])
def test_archives_of_openai(kind: str, tmp_path: Path) -> None:
    text = {**TEXT, "hidden_size": 64, "num_attention_heads": 1}
    if kind == "clip":
        vision = {**VISION, "hidden_size": 64, "num_attention_heads": 1}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        tensors = to_openai(model.state_dict())
    else:
        model = CLIPResNetModel(CLIPResNetConfig(
            text_config=CLIPTextConfig(**text), vision_layers=(1, 1, 1, 1), vision_width=16, image_size=32,
            projection_dim=16))
        state = model.state_dict()
        tensors = {**to_openai({k: v for k, v in state.items() if not k.startswith("visual.")}),
                   **{k: v for k, v in state.items() if k.startswith("visual.")}}
    t = clip_trace.trace_clip(str(archive(tensors, tmp_path / "a.pt")))
    assert t.total.parameters == model.num_parameters() and t.total.kind is type(model)


# ---------------------------------------------------------------------------------------------------- showing


def test_the_table_indents_modules_in_modules(capsys: pytest.CaptureFixture) -> None:
    assert unet_trace.main(["demo", "--depth", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("down_blocks.0 ")]
    assert lines[at + 1].startswith("  resnets.0 ") and lines[at + 2].startswith("    norm1 ")
    assert "[1, 32, 32, 32] -> [1, 32, 32, 32]" in lines[at + 1]
    where = lines[at + 1].split()[-1]
    assert where.startswith("minidiff/resnet.py:")
    source = (ROOT / "minidiff" / "resnet.py").read_text(encoding="utf-8").splitlines()
    assert source[int(where.split(":")[1]) - 1].startswith("class ResnetBlock2D")
    assert "100.0 %" in lines[-1] and len([line for line in lines if line.startswith("   ")]) > 20


def test_json_for_programs(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert unet_trace.main(["demo", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    t = trace_part("demo")
    assert [row["name"] for row in found["rows"]] == [row.name for row in t.rows[1:]]
    assert found["total"]["flops"] == t.total.flops and found["total"]["share"] == 1
    assert sum(row["flops"] for row in found["rows"] if row["depth"] == 1) == t.total.flops
    assert len(found["skips"]) == len(t.skips) and all(name.startswith("up_") for _, name in found["skips"])
    assert clip_trace.main(["demo", "--json", str(tmp_path / "a.json"), "--depth", "1", "--batch", "3"]) == 0
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert {row["depth"] for row in found["rows"]} == {1} and found["inputs"]["image"] == [3, 3, 64, 64]


@pytest.mark.parametrize("command, model", [(unet_trace.main, "demo"), (clip_trace.main, "demo"),
                                            (clip_trace.main, "rn50")])
def test_a_page_holds_everything_and_fetches_nothing(command: Any, model: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.html"
    assert command([model, "--html", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    t = trace_part("demo") if command is unet_trace.main else clip_trace.trace_clip(model)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert [row[0] for row in data["rows"]] == [row.name for row in t.rows]
    shown = [i for _, _, boxes in data["drawn"] for i in boxes]
    assert len(shown) == len(set(shown)) and {i for pair in data["skips"] for i in pair} <= set(shown)
    for i, row in enumerate(t.rows):        # every block that hands a map on is drawn, in it or around it
        if row.depth == 1 and row.output and len(row.output) > 2:
            assert any(t.rows[j].name.startswith(row.name) for _, j, _ in data["drawn"]), (i, row.name)
    named = set(re.findall(r"https?://[^\"'\s)]*", text))
    assert named == {"http://www.w3.org/2000/svg"}                  # a name of things, which nobody fetches
    assert not re.search(r"\bsrc\s*=|\bhref\s*=|@import|url\(|fetch\(|XMLHttpRequest|<link|import\(", text)
    assert len(text.encode()) < 1_000_000


def test_a_title_cannot_break_out_of_its_page() -> None:
    t = trace(nn.Linear(2, 3).to("meta"), {"input": torch.empty(1, 2, device="meta")}, "</script><b>&")
    assert isinstance(t, Trace) and page(t).count("</script>") == 2
    assert "<b>" not in page(t).replace("<b>\n", "")


@pytest.mark.parametrize("number, text", [(0, "0"), (999, "999"), (1000, "1.00 k"), (12_345, "12.3 k"),
                                          (999_499, "999 k"), (999_999, "1.00 M"),
                                          (6_761_236_398_080, "6.76 T")])
def test_amounts(number: int, text: str) -> None:
    assert amount(number) == text


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("command, arguments, words", [
    (unet_trace.main, ["sd16"], "sd16: neither one of sd15, sd21, sdxl, demo nor a file or folder"),
    (unet_trace.main, ["sd15", "--size", "0"], "--size: '0' is not a whole number from 1"),
    (unet_trace.main, ["sd15", "--depth", "x"], "--depth: 'x' is not a whole number"),
    (unet_trace.main, ["sd15", "--part", "vae"], "--part vae: sd15 is a UNet alone"),
    (unet_trace.main, ["sd15", "--part", "nose"], "--part: invalid choice: 'nose'"),
    (unet_trace.main, ["--colour"], "unrecognized arguments: --colour"),
    (unet_trace.main, ["{run}", "--part", "vae"], "no vae in it; there is unet, text_encoder"),
    (unet_trace.main, ["{run}/metrics.jsonl"], "metrics.jsonl"),
    (unet_trace.main, ["{tmp}"], "config.json"),
    (unet_trace.main, ["demo", "--html", "{tmp}/no/a.html"], "no/a.html: cannot be written"),
    (clip_trace.main, ["vit"], "vit: neither one of clip-b32, clip-l14, rn50, demo nor a file or folder"),
    (clip_trace.main, ["rn50", "--size", "64"], "Input image size (64*64) doesn't match model (224*224)"),
    (clip_trace.main, ["clip-b32", "--tokens", "78"], "78 tokens, but the model has max_position_embeddings"),
    (clip_trace.main, ["{tmp}"], "no config.json in it"),
    (clip_trace.main, ["{run}"], "config.json says model_type None"),
    (clip_trace.main, ["{run}/model/unet/config.json"], "config.json says"),
    (clip_trace.main, ["{run}/model/unet/diffusion_pytorch_model.safetensors"], "family not known"),
    (clip_trace.main, ["demo", "--size", "1" * 5000], "is not a whole number"),
])
def test_mistakes_end_in_one_line(command: Any, arguments: list[str], words: str, tmp_path: Path,
                                  capsys: pytest.CaptureFixture) -> None:
    run = FIXTURES / "run_diffusion"
    assert command([a.format(run=run, tmp=tmp_path) if len(a) < 100 else a for a in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and said.err.startswith("trace: ")
    assert words in said.err


def test_help_says_what_there_is(capsys: pytest.CaptureFixture) -> None:
    for command, words in ((unet_trace.main, "sd15, sd21, sdxl, demo"), (clip_trace.main, "clip-b32, ")):
        with pytest.raises(SystemExit):
            command(["--help"])
        assert words in " ".join(capsys.readouterr().out.split())
