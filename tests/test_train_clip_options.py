"""Every option that train_clip shares with train_diffusion: what it changes, what it must not,
what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from miniclip.image_text import PRESETS, ImageTextModel, Preset
from miniclip.weights import load_file
from minidiff.lora import merge_lora
from tests.test_train_parallel import needs_fork, together
from train import towers, train_clip
from train.errors import UserError
from train.index import Index
from train.lora import CLIP_PROJECTIONS, PEFT, PEFT_FILE, add_lora
from train.run.checkpoint import load_checkpoint
from train.run.distributed import Ranks
from train.train_clip import TrainConfig, check

ROOT = Path(__file__).parent.parent
TINY = TrainConfig(data=str(ROOT / "data" / "herbs"), size=32, preset="vit-tiny", steps=4, batch=8, warmup=2,
                   checks=0, device="cpu")


@pytest.fixture(autouse=True)
def small_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", Preset("resnet", 8, (1, 1, 1, 1), 0, 64, 1, 64))
    monkeypatch.setitem(PRESETS, "vit-tiny", Preset("vit", 32, (2,), 8, 32, 2, 32))


def train(out: Path, **changes) -> list[float]:
    """The losses of a run."""
    train_clip.main(dataclasses.replace(TINY, out=str(out), **changes))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


# -------------------------------------------------------------------------------------------- memory and time


def test_recomputing_changes_nothing_but_rounding(tmp_path: Path) -> None:
    plain = train(tmp_path / "a")
    assert train(tmp_path / "b", gradient_checkpointing=True) == pytest.approx(plain, rel=1e-4)
    assert train(tmp_path / "c", gradient_checkpointing=True, chunk=3) == pytest.approx(plain, rel=1e-4)


# a ResNet's text tower alone
@pytest.mark.parametrize("preset, most", [("vit-tiny", 0.5), ("tiny", 0.9)])
def test_recomputing_keeps_fewer_tensors(preset: str, most: float, tmp_path: Path, monkeypatch) -> None:
    kept: list[int] = []
    match_loss = ImageTextModel.forward

    def counted(*args):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            loss = match_loss(*args)
        kept.append(sum(sizes))
        return loss

    monkeypatch.setattr(ImageTextModel, "forward", counted)
    for on in (False, True):
        train(tmp_path, steps=1, preset=preset, gradient_checkpointing=on, overwrite=True)
    assert kept[1] < most * kept[0]


def test_recomputing_without_a_transformer_is_refused() -> None:
    matcher = nn.Sequential(nn.Linear(2, 2))
    towers.enable_checkpointing(matcher, False)
    with pytest.raises(UserError, match="--gradient-checkpointing"):
        towers.enable_checkpointing(matcher, True)


@pytest.mark.parametrize("preset, towers", [
    ("vit-tiny", ["CLIPVisionTransformer", "CLIPTextTransformer"]),
    ("tiny", ["ResNet", "CLIPTextTransformer"]),
])  # fmt: skip
def test_compile_compiles_both_towers_and_changes_no_key(preset: str, towers: list[str], tmp_path: Path,
                                                         monkeypatch) -> None:
    """Traced for real; the code generator behind it would need a C++ compiler and a minute."""
    compiled, compile_module = [], nn.Module.compile

    def traced(self, *args, **kwargs):
        compiled.append(type(self).__name__)
        compile_module(self, *args, **kwargs, backend="eager")

    plain = train(tmp_path / "plain", preset=preset)
    monkeypatch.setattr(nn.Module, "compile", traced)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    assert train(tmp_path / "run", preset=preset, compile=True) == pytest.approx(plain, rel=1e-3)
    assert compiled == towers and torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    a, b = (load_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("plain", "run"))
    assert list(a) == list(b)


# --------------------------------------------------------------------------------------------------- a stream


def make_data(root: Path, n: int = 12) -> str:
    """Pictures of three names, every fourth held out; one that is trained on and one held out are broken."""
    root.mkdir()
    for i in range(n):
        Image.new("RGB", (16, 16), (20 * i, 0, 255 - 20 * i)).save(root / f"{i}.png")
    for i in (5, 7):
        (root / f"{i}.png").write_bytes(b"no picture")
    lines = [f"{i}.png,name {i % 3},Name {i % 3},{'out' if i % 4 == 3 else 'in'}" for i in range(n)]
    (root / "captions.csv").write_text("\n".join(["file,one,two,side", *lines]), encoding="utf-8")
    return str(root)


STREAM = {"stream": True, "caption_column": "one,two", "hold_out": "side=out", "batch": 4, "steps": 5,
          "save_every": 1,
          "keep": 9}


def test_training_from_a_stream(tmp_path: Path, capsys) -> None:
    """Leaves out what is broken, says how much, and goes on in the middle of an epoch, byte for byte."""
    run, data = tmp_path / "run", make_data(tmp_path / "data")
    train(run, data=data, **STREAM)
    said = capsys.readouterr().out
    assert "9 pictures, 3 captions, 3 pictures held out" in said and "2 broken files left out" in said
    assert [name in (run / "skipped.txt").read_text(encoding="utf-8")
            for name in ("5.png", "7.png")] == [True, True]
    files = Index.load(run / "index").files
    assert [Path(file).name for file in files] == [f"{i}.png" for i in range(12) if i not in (5, 7)]
    weights, metrics = ((run / name).read_bytes() for name in ("model/model.safetensors", "metrics.jsonl"))
    # back to step 1 of 5
    for name in ("checkpoint.pt", "checkpoint.1.pt", "checkpoint.2.pt", "checkpoint.3.pt"):
        (run / name).unlink()
    skipped = (run / "skipped.txt").read_bytes()
    train(run, data=data, **STREAM, resume=True, workers=1)
    assert (run / "skipped.txt").read_bytes() == skipped
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_a_stream_trains_on_every_picture_once_an_epoch_under_its_own_name(
        tmp_path: Path, monkeypatch) -> None:
    """And on none that is held out."""
    seen: list[tuple[int, int]] = []
    match_loss = ImageTextModel.forward

    def watched(model, pictures, ids, mask, labels):
        # a picture's colour is its number
        reds = ((pictures[:, 0, 0, 0] + 1) * 127.5 / 20).round().int().tolist()
        seen.extend(zip(reds, labels.tolist(), strict=True))
        return match_loss(model, pictures, ids, mask, labels)

    monkeypatch.setattr(ImageTextModel, "forward", watched)
    data = Path(make_data(tmp_path / "data"))
    Image.new("RGB", (16, 16), (100, 0, 155)).save(data / "5.png")
    train(tmp_path / "run", data=str(data), **{**STREAM, "batch": 3, "steps": 6}, jitter=False)
    trained_on = [i for i in range(12) if i % 4 != 3]
    assert sorted(i for i, _ in seen[:9]) == sorted(i for i, _ in seen[9:]) == trained_on
    assert seen[:9] != seen[9:]
    assert all(label == i % 3 for i, label in seen)


@needs_fork
def test_two_processes_share_a_stream(tmp_path: Path) -> None:
    """The same run as one process, broken files included; they read their own rows only."""
    data = make_data(tmp_path / "data")
    one = train(tmp_path / "one", data=data, **STREAM, optimizer="adamw")
    cfg = dataclasses.replace(TINY, out=str(tmp_path / "two"), data=data, **STREAM, optimizer="adamw")
    assert together(2, lambda: train_clip.main(cfg)) == [0, 0]
    lists = [(tmp_path / name / "skipped.txt").read_text(encoding="utf-8").splitlines()
             for name in ("one", "two")]
    assert sorted(lists[0]) == sorted(lists[1]) and len(lists[0]) == 2
    text = (tmp_path / "two" / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(one, rel=1e-3)


# ------------------------------------------------------------------------------------------------ fine-tuning


@pytest.mark.parametrize("preset, pattern, some", [
    ("vit-tiny", "^text_model", 20), ("vit-tiny", r"layers\.0\.", 20), ("tiny", "^image_encoder", 20),
])  # fmt: skip
def test_what_is_frozen_stays_and_the_rest_learns(preset: str, pattern: str, some: int,
                                                  tmp_path: Path) -> None:
    """The statistics of a frozen batch norm stay too."""
    train(tmp_path / "a", preset=preset, steps=2)
    model = str(tmp_path / "a" / "model")
    train(tmp_path / "b", preset=preset, init=model, freeze=pattern)
    before, after = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    frozen = {name for name in before if re.search(pattern, name)}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert len(frozen) >= some and changed and not changed & frozen
    assert not frozen & {name.removeprefix("model.") for name, _ in learned(tmp_path / "b")}


@pytest.mark.parametrize("preset", ["vit-tiny", "tiny"])
def test_lora_learns_in_a_small_file_and_is_merged(preset: str, tmp_path: Path) -> None:
    """--init plus the file is model/; nothing but the attention projections moves."""
    train(tmp_path / "a", preset=preset, steps=2)
    init = str(tmp_path / "a" / "model")
    losses = train(tmp_path / "b", preset=preset, init=init, lora=2, lora_alpha=6.0, steps=20,
                   optimizer="adamw", lr=0.01, jitter=False, caption_column="en")
    before, after = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert list(before) == list(after) and losses[-1] < losses[0]
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name, _ in ImageTextModel.load(init).model.named_modules()
                       if CLIP_PROJECTIONS.search(name)}
    tuned, file = ImageTextModel.load(init).model, tmp_path / "b" / "lora" / PEFT_FILE
    merge_lora(tuned, file, prefix=PEFT)
    assert all(torch.allclose(value, after[name], atol=1e-6)
               for name, value in tuned.state_dict().items() if name in changed)
    assert len(load_file(file)) == 2 * len(changed)
    state = load_checkpoint(tmp_path / "b" / "checkpoint.pt")["model"]
    assert all("lora_" in name for name in state if state[name].is_floating_point()
               and "running_" not in name)


def test_a_lora_run_goes_on_where_it_was(tmp_path: Path) -> None:
    train(tmp_path / "a", steps=2)
    flags = {"init": str(tmp_path / "a" / "model"), "lora": 2, "steps": 4, "save_every": 1, "keep": 9,
             "ema": 0.9}
    whole, files = train(tmp_path / "b", **flags), (f"lora/{PEFT_FILE}", "model/model.safetensors")
    written = [(tmp_path / "b" / name).read_bytes() for name in files]
    (tmp_path / "b" / "checkpoint.pt").unlink(), (tmp_path / "b" / "checkpoint.1.pt").unlink()
    assert train(tmp_path / "b", **flags, resume=True) == whole
    assert [(tmp_path / "b" / name).read_bytes() for name in files] == written


def test_lora_of_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UserError, match="--lora 2: this model has no attention projections"):
        add_lora(nn.Sequential(nn.Linear(2, 2)), 2, 2, CLIP_PROJECTIONS)


def test_a_frozen_temperature_is_not_called_dead(tmp_path: Path) -> None:
    train(tmp_path / "a", steps=24), train(tmp_path / "b", steps=24, freeze="logit_scale")
    pages = [(tmp_path / name / "report.html").read_text(encoding="utf-8") for name in "ab"]
    assert "Temperature" in pages[0] and "Temperature" not in pages[1] and "Dead temperature" not in pages[1]


def learned(out: Path) -> list[tuple[str, torch.Tensor]]:
    """Weights in the checkpoint; frozen ones are not kept there. Buffers are."""
    model = load_checkpoint(out / "checkpoint.pt")["model"]
    return [(name, value) for name, value in model.items() if "running_" not in name
            and "num_batches" not in name]


@pytest.mark.parametrize("changes, words", [
    ({"freeze": "("}, r"--freeze \(: not a regular expression"),
    ({"workers": 2}, "--workers 2: only --stream"), ({"workers": -1, "stream": True}, "--workers -1"),
    ({"lora": 2}, "--lora 2: a rank above 0, beside an --init"), ({"lora": -1, "init": "x"}, "--lora -1"),
    ({"lora_alpha": 2.0, "init": "x"}, "--lora-alpha 2.0: means nothing"),
])  # fmt: skip
def test_refused(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(dataclasses.replace(TINY, **changes))


def test_freezing_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--freeze .: leaves nothing to learn"):
        train(tmp_path, freeze=".")


# ------------------------------------------------------------------------------------ all options, one by one

CHANGE = [      # option, another value, what stands beside it in both runs: the run's numbers become others
    ("caption_column", "en", {}), ("hold_out", "artist=twitter", {}), ("size", 48, {}),
    ("preset", "vit-small", {}),
    ("loss", "siglip", {}), ("steps", 3, {}), ("batch", 6, {}), ("optimizer", "adamw", {}), ("lr", 0.1, {}),
    ("muon_lr", 0.1, {}), ("warmup", 0, {}), ("ema", 0.9, {}),
    ("clip", 1e-3, {"optimizer": "adamw", "lr": 0.1}),
    ("jitter", False, {}), ("hues", 0.3, {}), ("flip", True, {}), ("shuffle_captions", True, {}),
    ("checks", 1, {}),
    ("seed", 1, {}), ("precision", "bf16", {}), ("freeze", "^text_model", {}), ("stream", True, {}),
]  # fmt: skip
SAME = [("chunk", 3), ("gradient_checkpointing", True), ("workers", 1), ("save_every", 1), ("keep", 1),
        ("device", "auto"), ("threads", 2)]
ELSEWHERE = {   # option: the test that holds it
    "data": "nearly all", "out": "all", "compile": "above", "init": "above", "lock": "test_train_clip.py",
    "lora": "above",
    "lora_alpha": "above", "shard": "test_train_parallel.py", "overwrite": "test_train_start.py",
    "resume": "test_train_clip.py",
}  # fmt: skip


@pytest.mark.parametrize("option, value, beside", CHANGE, ids=[name for name, _, _ in CHANGE])
def test_an_option_that_shapes_the_run(tmp_path: Path, monkeypatch, option: str, value, beside: dict) -> None:
    monkeypatch.setitem(PRESETS, "vit-small", Preset("vit", 64, (1,), 8, 32, 1, 32))
    train(tmp_path / "a", **beside), train(tmp_path / "b", **{**beside, option: value})
    a, b = ([(tmp_path / name / file).read_bytes() for file in ("metrics.jsonl", "model/model.safetensors")]
            for name in "ab")
    assert a != b


@pytest.mark.parametrize("option, value", SAME, ids=[name for name, _ in SAME])
def test_an_option_that_leaves_what_is_learned(tmp_path: Path, option: str, value) -> None:
    beside = {"stream": True} if option == "workers" else {}
    expected = train(tmp_path / "a", **beside)
    assert train(tmp_path / "b", **{**beside, option: value}) == pytest.approx(expected, rel=1e-3)


def test_captions_dealt_out_at_random_stay_the_same_captions(tmp_path: Path) -> None:
    """The control learns as many names as the run, but of other pictures."""
    pairs, _ = train_clip.read_folder(dataclasses.replace(TINY, caption_column="en,zh-Hant"),
                                      Ranks(0, 1, torch.device("cpu")))
    dealt = pairs.shuffled(0)
    assert dealt.captions != pairs.captions and sorted(dealt.captions[0]) == sorted(pairs.captions[0])
    assert set(zip(*dealt.captions, strict=True)) == set(zip(*pairs.captions, strict=True))
    assert dealt.files == pairs.files


def test_no_option_is_without_a_test() -> None:
    tested = [name for name, *_ in CHANGE + SAME] + list(ELSEWHERE)
    assert sorted(tested) == sorted(field.name for field in dataclasses.fields(TrainConfig))
