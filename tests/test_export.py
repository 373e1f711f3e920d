"""Exports, as far as they need no other package: tracing, int8, golden vectors, runner.py's arithmetic."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from miniclip import graphs
from miniclip.tokenizer import CLIPTokenizer
from miniclip.wordpiece import BertTokenizer
from minidiff import export
from minidiff.objective import OBJECTIVES, straight_paths
from minidiff.samplers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from minidiff.text_to_image import ImageFormat, Preset, TextToImage, build_text_to_image
from minidiff.upscaler import build_upscaler

ROOT = Path(__file__).parent.parent
TEXTS = ["", "春 草書", "It's 12 o'clock, ISN'T it?", "a  b\tc", "naïve ÉCOLE ΣΟΦΟΣ",
         "<|endoftext|> x <|STARTOFTEXT|>", "龍馬精神 🐉🐲 ok!!", "e\u0301 &amp; &lt;b&gt; \u0345", "x" * 300]


def module_at(path: Path) -> ModuleType:
    """A file of embed/ as a module; runner.py finds tokens.py as it does in an exported folder."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tokens = module_at(ROOT / "miniclip" / "embed" / "tokens.py")
runner = module_at(ROOT / "minidiff" / "embed" / "runner.py")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    preset = Preset((16, 32), (False, True), 1, 32, 1)
    model = build_text_to_image(preset, ImageFormat(16, 1, 2), ["春 楷書", "滿 草書"])
    model.upscaler = build_upscaler(1)
    folder = tmp_path_factory.mktemp("run")
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def exported(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "pt2"
    assert export.main(["--model", str(run_folder), "--format", "pt2", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def programs(exported: Path) -> dict[str, torch.nn.Module]:
    return {path.stem: torch.export.load(path).module(check_guards=False) for path in exported.glob("*.pt2")}


# ---------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("rules", ["transformers", "openai"])
def test_the_runner_reads_texts_as_the_tokenizer_does(rules: str, tmp_path: Path) -> None:
    tokenizer = CLIPTokenizer.train([*TEXTS, *TEXTS], 700, rules=rules)
    copied = tokens.Tokenizer(tmp_path / "t", graphs.token_rules(tokenizer, tmp_path / "t", fill=True))
    ids, mask = copied(TEXTS)
    wanted = tokenizer(TEXTS, padding="max_length", truncation=True)
    assert ids == wanted.input_ids and mask == wanted.attention_mask


@pytest.mark.parametrize("lower", [True, False])
def test_the_runner_reads_chinese_as_bert_does(lower: bool, tmp_path: Path) -> None:
    signs = sorted(set("".join(TEXTS).lower()) - set(" \t"))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = dict.fromkeys([*special, *signs, *(f"##{s}" for s in signs), "clock"])
    tokenizer = BertTokenizer({symbol: i for i, symbol in enumerate(vocab)}, do_lower_case=lower,
                              model_max_length=52)
    copied = tokens.Tokenizer(tmp_path / "t", graphs.token_rules(tokenizer, tmp_path / "t", fill=False))
    ids, mask = copied(TEXTS)
    wanted = tokenizer(TEXTS, padding=True, truncation=True)
    assert ids == wanted.input_ids and mask == wanted.attention_mask


# --------------------------------------------------------------------------------- graphs and golden vectors


@pytest.mark.parametrize("size", [(2, 8, 8, 3), (1, 8, 8, 4), (3, 7, 13, 2), (1, 1, 1, 1), (2, 2, 40, 4)])
def test_a_traced_unet_takes_any_size(size: tuple, run_folder: Path, programs: dict) -> None:
    model, (B, h, w, S) = TextToImage.load(run_folder), size
    x, t, text = torch.randn(B, 4, h, w), torch.arange(B) * 300, torch.randn(B, S, 32)
    with torch.no_grad():
        wanted = model.unet(x, t, text).sample
        assert graphs.relative_error(programs["unet"](x, t, text), wanted) < 1e-5


def test_golden_vectors_are_what_the_traced_graphs_answer(exported: Path, programs: dict) -> None:
    rules = json.loads((exported / "pipeline.json").read_text(encoding="utf-8"))
    assert set(rules["graphs"]) == {"text_encoder", "unet", "upscaler"}
    for name, graph in rules["graphs"].items():
        inputs, (wanted,) = ([torch.tensor(np.load(exported / "golden" / f"{name}.{key}.npy"))
                              for key in graph[kind]] for kind in ("inputs", "outputs"))
        with torch.no_grad():
            assert graphs.relative_error(programs[name](*inputs), wanted) < 1e-5
        assert graph["float16"]["largest"] > 0 and graph["float16"]["stays_float32"] == []


def test_the_runner_draws_what_pytorch_draws(run_folder: Path, exported: Path, programs: dict) -> None:
    """With its graphs answered by torch; tokens, walk, guidance and decoding are its own."""
    pipeline = runner.Pipeline(exported)

    def run(name: str, *inputs: np.ndarray) -> list[np.ndarray]:
        pipeline.sessions[name] = True
        with torch.no_grad():
            return [programs[name](*map(torch.tensor, inputs)).numpy()]

    pipeline.run = run
    assert runner.check(pipeline)
    noise = pipeline.noise(2, 5, 16, 16, 6)
    found = pipeline.draw(["春 楷書", "春"], noise, 6, 2.0)
    wanted = TextToImage.load(run_folder).denoise(torch.tensor(noise[0]), ["春 楷書", "春"], 6, 2.0)
    assert graphs.relative_error(torch.tensor(found), wanted) < 1e-5
    assert np.array_equal(noise[:, :1], pipeline.noise(1, 5, 16, 16, 6))
    assert runner.png(found[0])[:8] == b"\x89PNG\r\n\x1a\n"


def walker(rules: dict) -> Any:
    """The runner's Pipeline, with a schedule only."""
    pipeline = runner.Pipeline.__new__(runner.Pipeline)
    pipeline.rules = {"schedule": rules}
    pipeline.alpha_bar = np.float32([*rules.get("alphas_cumprod", ()), rules.get("final_alpha_cumprod", 1)])
    return pipeline


def walks_as(pipeline: Any, timesteps: torch.Tensor, step: Callable, seed: int) -> None:
    """Each step of the runner is PyTorch's, given the same noise; `step` draws its own from `seed`."""
    pairs, g = pipeline.walk(len(timesteps)), torch.Generator().manual_seed(seed)
    assert [t for t, _ in pairs] == pytest.approx(timesteps.tolist(), rel=1e-6)
    x = torch.randn(2, 4, 5, 5)
    for (t, below), time in zip(pairs, timesteps, strict=True):
        output, noise = torch.randn_like(x), torch.randn(x.shape, generator=g)
        found = pipeline.step(output.numpy(), x.numpy(), t, below, noise.numpy())
        x = step(output, time, x).prev_sample
        assert graphs.relative_error(torch.tensor(found), x) < 1e-5


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_runner_walks_as_ddim(spacing: str, kind: str) -> None:
    sampler = DDIMScheduler(timestep_spacing=spacing, prediction_type=kind, beta_schedule="scaled_linear",
                            steps_offset=1, clip_sample=kind == "sample")
    pipeline = walker(export.schedule_rules(sampler, eps_from_x0=kind == "sample"))
    for steps in (1, 3, 7, 30):
        sampler.set_timesteps(steps)
        walks_as(pipeline, sampler.timesteps,
                 partial(sampler.step, use_clipped_model_output=kind == "sample"), 0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_runner_walks_as_lcm(kind: str) -> None:
    sampler = LCMScheduler(prediction_type=kind, original_inference_steps=13, clip_sample=True)
    for steps in (1, 4, 13):
        timesteps, step = OBJECTIVES["consistency"].walk(sampler, steps, torch.Generator().manual_seed(3))
        walks_as(walker(export.schedule_rules(sampler, eps_from_x0=True)), timesteps, step, 3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_runner_walks_as_flow(shift: float) -> None:
    sampler = FlowMatchEulerDiscreteScheduler(shift=shift)
    for steps in (1, 4, 30):
        timesteps, step = OBJECTIVES["flow"].walk(sampler, steps, None)
        walks_as(walker(export.schedule_rules(sampler, eps_from_x0=True)), timesteps, step, 0)


def test_a_schedule_that_the_runner_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="flow"):
        export.schedule_rules(FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), eps_from_x0=True)
    with pytest.raises(ValueError, match="thresholding"):
        export.schedule_rules(DDIMScheduler(thresholding=True), eps_from_x0=False)


@pytest.mark.parametrize("name", ["flow", "consistency"])
def test_runs_of_other_objectives_draw_what_pytorch_draws(name: str) -> None:
    """The runner with its graphs answered by the model itself."""
    scheduler = straight_paths() if name == "flow" else LCMScheduler(
        prediction_type="v_prediction", original_inference_steps=5, clip_sample=True)
    torch.manual_seed(0)
    preset = Preset((16, 32), (False, True), 1, 32, 1)
    model = build_text_to_image(preset, ImageFormat(16, 1, 2), ["春", "滿"], scheduler)
    plan = export.plan_run(model, None)
    vectors = export.golden_vectors(plan)
    pipeline = walker(plan.rules["schedule"])
    pipeline.rules, pipeline.sessions = {**plan.rules, "graphs": {"unet": {"inputs": ["x", "t", "text"]}}}, {}
    pipeline.tokens = lambda prompts: [model.tokenizer(prompts, padding="max_length",
                                                       return_tensors="np").input_ids]

    def run(name: str, *inputs: np.ndarray) -> list[np.ndarray]:
        pipeline.sessions[name] = True
        return [o.numpy() for o in graphs.outputs_of(plan.graphs[name], [*map(torch.tensor, inputs)])]

    pipeline.run = run
    noise = vectors["noise"].numpy()
    assert noise.shape == (4 if name == "consistency" else 1, 1, 4, 8, 8)
    found = pipeline.draw([plan.prompt], noise, 4, 1.5)
    assert np.abs(found - vectors["picture"].numpy()).max() < 1e-4
    assert plan.graphs["unet"].inputs["t"].is_floating_point() == (name == "flow")


# ------------------------------------------------------------------------------------------------------ int8


def test_a_size_that_is_fixed_is_no_axis(run_folder: Path) -> None:
    plan = export.plan_run(TextToImage.load(run_folder), (16, 24))
    for name, graph in plan.graphs.items():
        assert {axis for axes in graph.axes.values() for axis in axes.values()} <= {"batch", "tokens"}
        if name != "text_encoder":
            height, width = graph.inputs["x"].shape[2:]
            assert width * 2 == height * 3
    assert plan.draw("春", torch.randn(1, 4, 8, 12), None, 2, 1.5).shape == (1, 1, 32, 48)


def test_int8_weights_are_a_quarter_and_near() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(16, 64, 3), torch.nn.GroupNorm(8, 64),
                                 torch.nn.Conv2d(64, 2, 1))
    small, kept = graphs.with_int8(layers)
    assert kept.pop("2.weight") == "128 numbers only"
    assert kept == dict.fromkeys(["0.bias", "1.weight", "1.bias", "2.bias"], "a bias, norm or scale")
    difference = (small[0].weight - layers[0].weight).abs().flatten(1).amax(1)
    assert (difference <= layers[0].weight.abs().flatten(1).amax(1) / 254 * 1.0001).all()
    assert graphs.number_bytes(small[0]) < 0.27 * graphs.number_bytes(layers[0])


# -------------------------------------------------------------------------------------- one line, or nothing


def one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert export.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_what_cannot_be_exported_leaves_nothing(run_folder: Path, tmp_path: Path, capsys,
                                                monkeypatch) -> None:
    def said(*more: str, model: Path = run_folder, out: str = "out") -> str:
        argv = ["--model", str(model), "--format", "pt2", "--out", str(tmp_path / out)]
        return one_line([*argv, *more], capsys)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    assert "--format gguf" in said("--format", "gguf")
    assert "--size 12" in said("--size", "12")
    assert "multiples of 2" in said("--size", "15x16")
    assert "nowhere" in (error := said(model=tmp_path / "nowhere")) and "--out" not in error
    (tmp_path / "strokes.json").write_text("{}")
    assert "writes strokes" in said(model=tmp_path)
    (tmp_path / "strokes.json").unlink()
    monkeypatch.setattr(graphs, "write_graph", no_space)
    assert "No space left" in said()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    assert "not empty" in said(out="full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_missing_package_is_named(run_folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    error = one_line(["--model", str(run_folder), "--out", str(tmp_path / "out")], capsys)
    assert "pip install 'minidiff[export]'" in error
