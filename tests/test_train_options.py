"""Every option of train_diffusion that saves memory or time: what it changes, what it must not,
what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from minidiff.text_to_image import Preset, TextToImage
from train import train_diffusion, validation
from train.errors import UserError
from train.run.checkpoint import load_checkpoint
from train.run.settings import check_processes
from train.train_diffusion import TrainConfig, check

ROOT = Path(__file__).parent.parent
TINY = TrainConfig(data=str(ROOT / "data" / "calligraphy"), size=16, preset="tiny", steps=4, batch=4,
                   samples=0, sample_steps=1, device="cpu")


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train_diffusion.PRESETS, "tiny", Preset((8, 16), (False, True), 1, 32, 1))
    monkeypatch.setattr(validation, "TIMESTEPS", (499,))


def train(out: Path, **changes) -> list[float]:
    """The losses of a run."""
    train_diffusion.main(dataclasses.replace(TINY, out=str(out), **changes))
    return losses(out)


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        train(folder)
    return folder


@pytest.fixture
def plain(plain_run: Path) -> list[float]:
    return losses(plain_run)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_but_not_equal(tmp_path: Path, plain: list[float], precision: str) -> None:
    rough = train(tmp_path, precision=precision)
    assert rough == pytest.approx(plain, rel=0.03) and rough != plain
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert all(weight.dtype == torch.float32
               for weight in state["model"].values() if weight.is_floating_point())
    assert ("scale" in state["scaler"]) == (precision == "fp16")


def test_fp16_steps_that_overflow_are_left_out_and_lower_the_scale(tmp_path: Path, monkeypatch) -> None:
    diffusion_loss, calls, seen = TextToImage.forward, [], []

    def overflows(writer, *args):
        calls.append(1)
        seen.append(writer.unet.conv_in.weight.detach().clone())
        return diffusion_loss(writer, *args) * (1e38 if len(calls) == 2 else 1.0)

    monkeypatch.setattr(TextToImage, "forward", overflows)
    train(tmp_path, precision="fp16", warmup=0)
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[2], seen[3])
    assert load_checkpoint(tmp_path / "checkpoint.pt")["scaler"]["scale"] == 2.0**15


def test_pieces_and_recomputing_change_nothing_but_rounding(tmp_path: Path, plain: list[float]) -> None:
    assert train(tmp_path / "a", accumulate=2) == pytest.approx(plain, rel=1e-4)
    assert train(tmp_path / "b", gradient_checkpointing=True) == pytest.approx(plain, rel=1e-4)


def test_recomputing_keeps_fewer_tensors(tmp_path: Path, monkeypatch) -> None:
    kept: dict[bool, int] = {}
    diffusion_loss = TextToImage.forward

    def counted(writer, *args):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            loss = diffusion_loss(writer, *args)
        kept[writer.unet.is_gradient_checkpointing] = sum(sizes)
        return loss

    monkeypatch.setattr(TextToImage, "forward", counted)
    for on in (False, True):
        train(tmp_path, steps=1, gradient_checkpointing=on, overwrite=True)
    assert kept[True] < 0.5 * kept[False]


def test_compile_compiles_the_unet_and_changes_no_key(tmp_path: Path, plain: list[float],
                                                      monkeypatch) -> None:
    """Traced for real; the code generator behind it would need a C++ compiler and a minute."""
    compiled, compile_module = [], nn.Module.compile

    def traced(self, *args, **kwargs):
        compiled.append(type(self).__name__)
        compile_module(self, *args, **kwargs, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", traced)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert train(tmp_path, compile=True) == pytest.approx(plain, rel=1e-4)
    assert compiled == ["UNet2DConditionModel"]
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4      # not one for each timestep
    assert "unet.conv_in.weight" in load_checkpoint(tmp_path / "checkpoint.pt")["model"]


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    assert train(tmp_path / "a", clip=1e-9, optimizer="adamw") != train(tmp_path / "b", optimizer="adamw")


def test_checkpoints_every_few_steps(tmp_path: Path) -> None:
    train(tmp_path, steps=9, save_every=2, keep=4)
    steps = {path.name: load_checkpoint(path)["step"] for path in tmp_path.glob("*.pt")}
    assert [steps[name] for name in ("checkpoint.pt", "checkpoint.1.pt", "checkpoint.2.pt",
                                     "checkpoint.3.pt")] == [9, 8, 6, 4]
    assert steps["best.pt"] in (0, 9)


@pytest.mark.parametrize("changes,words", [
    ({"accumulate": 0}, "--accumulate 0"), ({"save_every": 0}, "--save-every 0"), ({"keep": 0}, "--keep 0"),
])
def test_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(dataclasses.replace(TINY, **changes))


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match="--batch 20.* 3 processes"):
        check_processes(dataclasses.replace(TINY, batch=20), 3)
    with pytest.raises(UserError, match="--accumulate 3"):
        check_processes(dataclasses.replace(TINY, batch=4), 1, parts=3)
    check_processes(dataclasses.replace(TINY, batch=20), 2, parts=5)


# ------------------------------------------------------------------------------------ all options, one by one

CHANGE = [      # option, another value, what stands beside it in both runs: the run's numbers become others
    ("caption_column", "character", {}), ("size", 32, {}), ("channels", 3, {}), ("fold", 1, {}),
    ("preset", "base", {}), ("objective", "flow", {}),
    ("steps", 3, {}), ("batch", 5, {}), ("optimizer", "adamw", {}), ("lr", 0.01, {}), ("muon_lr", 0.05, {}),
    ("warmup", 0, {}), ("ema", 0.0, {}), ("clip", 1e-3, {"optimizer": "adamw", "warmup": 0, "lr": 0.1}),
    ("caption_drop", 0.9, {}), ("jitter", False, {}), ("jitter_amount", 1.0, {}),
    ("noise_bias", 1.0, {}), ("flip", True, {}),
    ("seed", 1, {}),
    ("precision", "bf16", {}), ("freeze", "^text_encoder", {}), ("samples", 1, {}), ("stream", True, {}),
]  # fmt: skip
SAME = [("accumulate", 2), ("gradient_checkpointing", True), ("workers", 1), ("save_every", 1), ("keep", 1),
        ("device", "auto"), ("sample_steps", 3), ("guidance", 3.0)]
ELSEWHERE = {   # option: the test that holds it
    "data": "nearly all", "out": "all", "compile": "above", "init": "test_lora.py",
    "tokenizer": "test_lora.py",
    "lora": "test_lora.py", "lora_alpha": "test_lora.py", "shard": "test_train_parallel.py",
    "resume": "test_train_diffusion.py", "overwrite": "test_train_start.py",
}  # fmt: skip


@pytest.mark.parametrize("option, value, beside", CHANGE, ids=[name for name, _, _ in CHANGE])
def test_an_option_that_shapes_the_run(tmp_path: Path, plain_run: Path, monkeypatch, option: str, value,
                                       beside: dict) -> None:
    monkeypatch.setitem(train_diffusion.PRESETS, "base", Preset((8, 8), (True, True), 1, 32, 1))
    if beside:
        train(tmp_path / "a", **beside)
    train(tmp_path / "b", **{**beside, option: value})
    a, b = ((folder / "metrics.jsonl").read_bytes()
            for folder in (tmp_path / "a" if beside else plain_run, tmp_path / "b"))
    assert a != b


@pytest.mark.parametrize("option, value", SAME, ids=[name for name, _ in SAME])
def test_an_option_that_leaves_what_is_learned(tmp_path: Path, plain: list[float], option: str,
                                               value) -> None:
    beside = {"stream": True} if option == "workers" else {}
    wanted = train(tmp_path / "a", **beside) if beside else plain
    assert train(tmp_path / "b", **{**beside, option: value}) == pytest.approx(wanted, rel=1e-4)


def test_what_samples_are_drawn_with_shows_in_them(tmp_path: Path) -> None:
    pictures = set()
    for name, changes in (("a", {}), ("b", {"sample_steps": 3}), ("c", {"guidance": 3.0})):
        train(tmp_path / name, **changes)
        pictures.add((tmp_path / name / "samples" / "000004.png").read_bytes())
    assert len(pictures) == 3


def test_no_option_is_without_a_test() -> None:
    tested = [name for name, *_ in CHANGE + SAME] + list(ELSEWHERE)
    assert sorted(tested) == sorted(field.name for field in dataclasses.fields(TrainConfig))
