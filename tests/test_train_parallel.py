"""Two processes, or a batch in two parts, do what one process does on the whole batch: to float64
rounding."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp

from miniclip import image_text
from miniclip.weights import load_file
from minidiff.text_to_image import Preset, TextToImage
from train import train_clip, train_diffusion, validation
from train.data.folder import CaptionedImages
from train.errors import UserError
from train.run import cli, distributed, state
from train.run.checkpoint import load_checkpoint
from train.run.distributed import Ranks
from train.train_diffusion import Batch, TrainConfig

ROOT = Path(__file__).parent.parent
TINY = TrainConfig(data=str(ROOT / "data" / "calligraphy"), size=16, preset="tiny", steps=4, batch=4,
                   samples=0, sample_steps=1, optimizer="adamw", device="cpu")
CLIP_PRESET = image_text.Preset("vit", 32, (1,), 8, 32, 1, 32)
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(),
                                reason="processes by fork")


def process(rank: int, size: int, port: int, work: Callable[[], None]) -> None:
    """What torchrun gives each process, without the seconds that torchrun takes to start."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    cli.start(work)


def together(size: int, work: Callable[[], None]) -> list[int]:
    """Exit codes of `size` processes that run `work` as one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=process, args=(rank, size, port, work)) for rank in range(size)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    codes = [job.exitcode for job in jobs]
    for job in jobs:
        job.kill()                                  # one that hangs, or pytest would wait for it in the end
    return codes


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = CaptionedImages.images
    monkeypatch.setattr(CaptionedImages, "images", lambda self: pictures(self).double())
    monkeypatch.setitem(train_diffusion.PRESETS, "tiny", Preset((8, 16), (False, True), 1, 32, 1))
    monkeypatch.setitem(train_clip.PRESETS, "vit-tiny", CLIP_PRESET)
    monkeypatch.setattr(validation, "TIMESTEPS", (99, 899))
    monkeypatch.setattr(state, "clip_gradients", clip_and_keep)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


gradients: list[list[torch.Tensor]] = []            # of each step of the run that goes on


def clip_and_keep(parameters, most: float) -> float:
    """clip_gradients, which leaves a copy of the gradients of all steps in the working folder."""
    parameters = list(parameters)
    gradients.append([distributed.gather_full(p.grad).clone() for p in parameters if p.grad is not None])
    if os.environ.get("RANK", "0") == "0":
        torch.save(gradients, "gradients.pt")
    return distributed.clip_gradients(parameters, most)


def do(work: Callable[[], None], size: int, out: Path) -> Path:
    """Runs it in `out`, as one process or several."""
    gradients.clear()
    out.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        codes = together(size, work) if size > 1 else [work() or 0]
    assert codes == [0] * size
    return out


def train(out: Path, size: int = 1, **changes) -> Path:
    return do(partial(train_diffusion.main, dataclasses.replace(TINY, out=str(out), **changes)), size, out)


def match(out: Path, size: int = 1, **changes) -> Path:
    cfg = train_clip.TrainConfig(data=str(ROOT / "data" / "herbs"), out=str(out), size=32, preset="vit-tiny",
                                 batch=8, steps=4, checks=0, warmup=0, optimizer="adamw", device="cpu")
    return do(partial(train_clip.main, dataclasses.replace(cfg, **changes)), size, out)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def agree(one: Path, other: Path, weights: str = "model/unet/diffusion_pytorch_model.safetensors") -> None:
    """Losses, gradient norms and validation of every step, every gradient of every step,
    and the weights at the end."""
    assert len(rows(one)) == len(rows(other)) == 6
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a == pytest.approx(b, rel=1e-11, abs=1e-14)
    wanted, found = (torch.load(out / "gradients.pt", weights_only=True) for out in (one, other))
    assert len(wanted) == 4 and found
    # a resumed run has the last ones
    for a, b in zip(wanted[-len(found):], found, strict=True):
        assert all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(a, b, strict=True))
    a, b = (load_file(out / weights) for out in (one, other))
    assert all(torch.allclose(a[name], b[name], rtol=1e-9, atol=1e-12) for name in a)


def needs_fsdp2() -> None:
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("FSDP2 needs PyTorch 2.6")


@needs_fork
def test_two_processes_equal_one(tmp_path: Path, float64) -> None:
    one = train(tmp_path / "one")
    agree(one, train(tmp_path / "two", size=2))
    agree(one, train(tmp_path / "pieces", accumulate=2))
    agree(one, train(tmp_path / "both", size=2, accumulate=2))
    agree(one, train(tmp_path / "frugal", gradient_checkpointing=True))
    assert rows(one) != rows(train(tmp_path / "other", seed=1))


@needs_fork
@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_two_processes_that_match_pictures_equal_one(tmp_path: Path, float64, loss: str) -> None:
    """Every picture meets every caption, those of the other process too, and the gradients know it."""
    one = match(tmp_path / "one", loss=loss)
    agree(one, match(tmp_path / "two", size=2, loss=loss), "model/model.safetensors")
    agree(one, match(tmp_path / "chunks", chunk=3, loss=loss), "model/model.safetensors")
    agree(one, match(tmp_path / "both", size=2, chunk=3, loss=loss), "model/model.safetensors")


@needs_fork
def test_batch_norm_and_dropout_see_the_whole_batch(tmp_path: Path, float64, monkeypatch) -> None:
    """The ResNet preset: statistics of the whole batch, running ones too,
    and one process's random numbers."""
    monkeypatch.setitem(train_clip.PRESETS, "tiny",
                        image_text.Preset("resnet", 4, (1, 1, 1, 1), 0, 32, 1, 16))
    one = match(tmp_path / "one", preset="tiny")
    agree(one, match(tmp_path / "two", size=2, preset="tiny"), "model/model.safetensors")
    agree(one, match(tmp_path / "four", size=4, preset="tiny"), "model/model.safetensors")
    weights = load_file(one / "model" / "model.safetensors")
    assert weights["image_encoder.model.bn1.num_batches_tracked"] == 4


@needs_fork
def test_shared_out_towers_are_the_same_run(tmp_path: Path, float64) -> None:
    """FSDP2 on CLIP, whose temperature stays whole: same numbers, same files;
    also in chunks, and on from the other."""
    needs_fsdp2()
    one, run, weights = match(tmp_path / "one", save_every=1,
                              keep=9), tmp_path / "run", "model/model.safetensors"
    agree(one, match(run, size=2, shard=True, save_every=1, keep=9), weights)
    agree(one, match(tmp_path / "chunks", size=2, shard=True, chunk=3), weights)
    agree(match(tmp_path / "siglip", loss="siglip"),
          match(tmp_path / "two", size=2, shard=True, loss="siglip"), weights)
    (run / "checkpoint.pt").unlink()
    agree(one, match(run, resume=True, save_every=1, keep=9), weights)
    (run / "checkpoint.pt").unlink()
    agree(one, match(run, size=2, shard=True, resume=True, save_every=1, keep=9), weights)


@needs_fork
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, float64, monkeypatch) -> None:
    def stop_after_two(*args):
        if losses.append(1) or len(losses) == 2:
            os.kill(os.getpid(), 15)                        # of one process alone: they agree to stop
        return diffusion_loss(*args)

    one, losses, diffusion_loss = train(tmp_path / "one"), [], TextToImage.forward
    with monkeypatch.context() as patch:
        patch.setattr(TextToImage, "forward", stop_after_two)
        train(tmp_path / "run", size=2)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    agree(one, train(tmp_path / "run", size=1, resume=True))
    (tmp_path / "run" / "checkpoint.pt").unlink()           # the one before it: step 2
    agree(one, train(tmp_path / "run", size=2, resume=True))


@needs_fork
def test_shared_out_weights_are_the_same_run(tmp_path: Path, float64) -> None:
    """FSDP2: same numbers, same files; and it may go on with one process that holds everything, and back."""
    needs_fsdp2()
    one, run = train(tmp_path / "one"), tmp_path / "run"
    agree(one, train(run, size=2, shard=True, save_every=1, keep=9))
    a, b = (load_checkpoint(out / "checkpoint.pt") for out in (one, run))
    assert all(torch.allclose(a["model"][k], b["model"][k], rtol=1e-9, atol=1e-12) for k in a["model"])
    (run / "checkpoint.pt").unlink()
    agree(one, train(run, resume=True, save_every=1, keep=9))
    (run / "checkpoint.pt").unlink()
    agree(one, train(run, size=2, resume=True, shard=True, save_every=1, keep=9))


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"lora": 2, "init": "x"}, {"compile": True},
                                     {"precision": "fp16"}])
@pytest.mark.parametrize("script", [train_diffusion, train_clip])
def test_what_cannot_be_shared_out_is_refused(script, changes: dict) -> None:
    with pytest.raises(UserError, match="--shard"):
        script.check(script.TrainConfig(**{"shard": True, "optimizer": "adamw", **changes}))


def test_one_process_has_nobody_to_share_with(tmp_path: Path) -> None:
    for run in (train, match):
        with pytest.raises(UserError, match="--shard: there is one process only"):
            run(tmp_path, shard=True)


@needs_fork
def test_a_process_that_fails_says_so(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.setitem(train_diffusion.PRESETS, "tiny", Preset((8, 16), (False, True), 1, 32, 1))
    diffusion_loss = TextToImage.forward

    def fails(*args):
        if os.environ["RANK"] == "1":
            raise UserError("the disk of this machine is gone")
        return diffusion_loss(*args)

    monkeypatch.setattr(TextToImage, "forward", fails)
    codes = together(2, lambda: train_diffusion.main(dataclasses.replace(TINY, out=str(tmp_path / "run"))))
    assert 0 not in codes and "error (process 1): the disk of this machine is gone" in capfd.readouterr().err


@needs_fork
def test_what_processes_cannot_share_is_refused(tmp_path: Path, capfd) -> None:
    base = train_clip.TrainConfig(data=str(ROOT / "data" / "herbs"), out=str(tmp_path), size=32, batch=8,
                                  device="cpu")
    for changes, words in (({"preset": "tiny", "shard": True, "optimizer": "adamw"},
                            "--shard: shards transformers"),
                           ({"preset": "vit-tiny", "batch": 9}, "--batch 9")):
        codes = together(2, partial(train_clip.main, dataclasses.replace(base, **changes)))
        assert 0 not in codes and words in capfd.readouterr().err


@needs_fork
@pytest.mark.parametrize("different, words", [
    ({"lr": 0.1}, "the processes differ in lr: 0.001 and 0.1; start all of them alike"),
    ({"seed": 5}, "differ in seed: 0 and 5"), ({"data": "reordered"}, "differ in checksum: "),
])  # fmt: skip
@pytest.mark.parametrize("script", ["diffusion", "clip"])
def test_processes_started_differently_all_end(tmp_path: Path, script: str, different: dict, words: str,
                                               capfd) -> None:
    """With other flags or data one of them would train another model, and nobody would see it."""
    source = ROOT / "data" / ("calligraphy" if script == "diffusion" else "herbs")
    if "data" in different:
        shutil.copytree(source, tmp_path / "reordered")
        head, *lines = (source / "captions.csv").read_text(encoding="utf-8").splitlines()
        (tmp_path / "reordered" / "captions.csv").write_text("\n".join([head, *reversed(lines)]),
                                                             encoding="utf-8")
        different = {"data": str(tmp_path / "reordered")}
    base = {"data": str(source), "out": str(tmp_path / "run"), "device": "cpu", "size": 32}
    module = train_diffusion if script == "diffusion" else train_clip

    def work() -> None:
        mine = different if os.environ["RANK"] == "1" else {}
        module.main(module.TrainConfig(**{**base, **mine}))

    assert together(2, work) == [2, 2]
    assert len(re.findall(words, capfd.readouterr().err)) == 2
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@needs_fork
def test_a_checkpoint_that_only_some_see_ends_all(tmp_path: Path, float64, capfd) -> None:
    train(tmp_path / "one")
    cfg = dataclasses.replace(TINY, out=str(tmp_path / "one"), resume=True)

    def work() -> None:
        elsewhere = {"out": str(tmp_path / "two")} if os.environ["RANK"] == "1" else {}
        train_diffusion.main(dataclasses.replace(cfg, **elsewhere))

    (tmp_path / "two").mkdir()
    assert together(2, work) == [2, 2]
    assert capfd.readouterr().err.count("--resume: the processes found different checkpoints") == 2


@needs_fork
def test_losing_another_process_is_one_line(tmp_path: Path, float64, monkeypatch, capfd) -> None:
    def dies(*args):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), 9)
        return diffusion_loss(*args)

    diffusion_loss = TextToImage.forward
    monkeypatch.setattr(TextToImage, "forward", dies)
    codes = together(2, partial(train_diffusion.main, dataclasses.replace(TINY, out=str(tmp_path / "run"))))
    assert codes == [2, -9]
    said = capfd.readouterr().err
    assert "error (process 0): lost another process (" in said and "Traceback" not in said


def test_shares_cover_the_batch_once() -> None:
    cpu = torch.device("cpu")
    rows, empty = torch.arange(12), torch.empty(12)
    for size, pieces in ((1, 1), (2, 1), (1, 3), (2, 3), (3, 2)):
        own = [Ranks(rank, size, cpu).local_rows(12) for rank in range(size)]
        shares = [part for r in own for part in Batch(rows[r], [""] * (12 // size), rows[r], empty[r],
                                                      {}).split(pieces)]
        assert len(shares) == size * pieces
        assert [i for part in shares for i in part.t.tolist()] == list(range(12))


def test_a_group_of_one_adds_nothing() -> None:
    assert Ranks(0, 1, torch.device("cpu")).mean(0.1, 1 / 3) == [0.1, 1 / 3]
