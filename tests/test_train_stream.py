"""Data at size: the kept index, the stream that goes on anywhere, broken files,
and the script that trains on it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from minidiff.text_to_image import Preset
from train import train_diffusion
from train.data import folder as reader
from train.data import table as tables
from train.data.folder import CaptionedImages, Stream
from train.errors import DataError, UserError
from train.train_diffusion import TrainConfig


def make_data(root: Path, n: int = 10, table: bool = False) -> Path:
    root.mkdir(parents=True)
    names = [f"{i}.png" for i in range(n)]
    for i, name in enumerate(names):
        (root / f"k{i % 3}").mkdir(exist_ok=True) if not table else None
        Image.new("L", (16, 16), 20 * i).save(root / name if table else root / f"k{i % 3}" / name)
    if table:
        text = "file,caption\n" + "".join(f"{name},春 {i}\n" for i, name in enumerate(names))
        (root / "captions.csv").write_text(text, encoding="utf-8")
    return root


# -------------------------------------------------------------------------------------------------- the index


def test_the_index_spares_looking_at_every_file(tmp_path: Path, monkeypatch) -> None:
    data, index = make_data(tmp_path / "data", table=True), tmp_path / "index.json"
    first = CaptionedImages(data, 16, index=index)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "list_captioned", lambda *_: pytest.fail("looked again"))
        assert CaptionedImages(data, 16, index=index).entries == first.entries
    for damaged in ("", "{}", '{"made_of": 3}', "[]"):
        index.write_text(damaged)
        assert CaptionedImages(data, 16, index=index).entries == first.entries
    table = data / "captions.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("春", "滿"), encoding="utf-8")
    os.utime(table, ns=(1, 1))
    assert CaptionedImages(data, 16, index=index).captions[3] == "滿 3"
    assert len(CaptionedImages(data, 16, caption_column="file", index=index)) == 10
    assert CaptionedImages(make_data(tmp_path / "classes"), 16,
                           index=tmp_path / "no.json").captions[0] == "k0"


def test_an_index_that_cannot_be_kept_is_done_without(tmp_path: Path) -> None:
    data, index = make_data(tmp_path / "data", table=True), tmp_path / "index.json"
    index.mkdir()                                               # nothing can be moved onto a folder
    assert len(CaptionedImages(data, 16, index=index)) == 10
    assert len(CaptionedImages(data, 16, index=tmp_path / "no" / "folder.json")) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "index.json"]


# ------------------------------------------------------------------------------------------------- the stream


def test_every_epoch_shows_every_picture_once_in_another_order(tmp_path: Path) -> None:
    stream = Stream(CaptionedImages(make_data(tmp_path / "data"), 16), batch=4, seed=0, steps=5)
    seen = torch.cat([stream[step][1] for step in range(5)])                # 20 places: two epochs of 10
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert not torch.equal(seen[:10], seen[10:])
    other = Stream(stream.folder, batch=4, seed=1, steps=5)
    assert not torch.equal(other[0][1], stream[0][1])


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_anywhere_with_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    stream = Stream(CaptionedImages(make_data(tmp_path / "data"), 16), batch=4, seed=0, steps=6)
    whole = [stream[step] for step in range(6)]
    rest = list(DataLoader(stream, None, sampler=range(3, 6), num_workers=workers))
    assert len(rest) == 3
    for (pixels, indices, broken), (other, others, _) in zip(rest, whole[3:], strict=True):
        assert torch.equal(pixels, other) and torch.equal(indices, others) and broken == []
        assert (pixels[:, 0, 0, 0] == 20 * indices_to_grey(stream, indices)).all()


def indices_to_grey(stream: Stream, indices: torch.Tensor) -> torch.Tensor:
    return torch.tensor([int(stream.folder.entries[i].path.stem) for i in indices])


def test_shares_of_a_batch_are_the_batch(tmp_path: Path) -> None:
    folder = CaptionedImages(make_data(tmp_path / "data"), 16)
    whole = Stream(folder, 6, 0, 3)
    parts = [Stream(folder, 6, 0, 3, rows) for rows in (slice(0, 3), slice(3, 6))]
    assert torch.equal(whole[2][1], torch.cat([part[2][1] for part in parts]))


def test_broken_files_give_way_and_are_listed(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    (data / "k1" / "4.png").write_bytes(b"no picture")
    (data / "k1" / "7.png").unlink()
    folder = CaptionedImages(data, 16)
    # as if it vanished after listing
    folder.entries.append(folder.entries[0]._replace(path=data / "gone.png"))
    stream = Stream(folder, batch=10, seed=0, steps=1)
    pixels, indices, broken = stream[0]
    assert len(pixels) == 10 and len(broken) == 2
    assert any("4.png" in line for line in broken) and any("gone.png" in line for line in broken)
    for path in data.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="all broken"):
        Stream(CaptionedImages(data, 16), 1, 0, 1)[0]


# ------------------------------------------------------------------------------------------------- the script


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch) -> TrainConfig:
    monkeypatch.setitem(train_diffusion.PRESETS, "tiny", Preset((8, 16), (False, True), 1, 32, 1))
    data = make_data(tmp_path / "data", table=True)
    (data / "3.png").write_bytes(b"no picture")
    return TrainConfig(data=str(data), out=str(tmp_path / "run"), size=16, preset="tiny", steps=5, batch=4,
                       samples=0, sample_steps=1, device="cpu", stream=True, save_every=1, keep=9)


def test_training_from_a_stream(cfg: TrainConfig, capsys) -> None:
    """Leaves out what is broken, says how much, and goes on in the middle of an epoch, byte for byte."""
    run = Path(cfg.out)
    train_diffusion.main(cfg)
    assert "1 broken files left out" in capsys.readouterr().out
    assert "3.png" in (run / "skipped.txt").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "val" in rows[0] and "bound" not in rows[0]          # the bound would need all pictures
    weights = run / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    whole, metrics = weights.read_bytes(), (run / "metrics.jsonl").read_bytes()
    for name in ("checkpoint.pt", "checkpoint.1.pt", "checkpoint.2.pt"):        # back to step 2 of 5, epoch 0
        (run / name).unlink()
    train_diffusion.main(dataclasses.replace(cfg, resume=True, workers=1))
    assert weights.read_bytes() == whole and (run / "metrics.jsonl").read_bytes() == metrics


def test_what_a_stream_cannot_do_is_refused(cfg: TrainConfig) -> None:
    with pytest.raises(UserError, match="--workers 2"):
        train_diffusion.check(dataclasses.replace(cfg, stream=False, workers=2))
    with pytest.raises(UserError, match="--workers -1"):
        train_diffusion.check(dataclasses.replace(cfg, workers=-1))


def test_too_much_for_memory_says_what_to_do(cfg: TrainConfig, monkeypatch) -> None:
    monkeypatch.setattr(reader, "STACK_BYTES", 100)
    with pytest.raises(DataError, match="--stream"):
        train_diffusion.main(dataclasses.replace(cfg, stream=False))
