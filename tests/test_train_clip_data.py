"""Which columns train_clip takes for captions, what it holds out, and that runs of before go on."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from miniclip.image_text import PRESETS, Preset
from train import evaluate_clip, train_clip
from train.data import pairs as reader
from train.data.pairs import caption_columns_of, random_share
from train.errors import DataError, UserError
from train.run.checkpoint import load_checkpoint, save_checkpoint
from train.train_clip import TrainConfig, check, with_columns

HERBS = Path(__file__).parent.parent / "data" / "herbs"


@pytest.fixture(autouse=True)
def small_presets(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", Preset("resnet", 8, (1, 1, 1, 1), 0, 64, 1, 64))


def config(out, **more):
    values = dict(data=str(HERBS), out=str(out), size=32, batch=8, steps=2, warmup=2, checks=0, device="cpu")
    return TrainConfig(**{**values, **more})


def list_pairs(cfg):
    columns = caption_columns_of(cfg.data, cfg.caption_column, cfg.hold_out)
    return reader.list_pairs(cfg.data, cfg.size, columns, cfg.hold_out, cfg.seed)


def table(root, *lines):
    root.mkdir(exist_ok=True)
    (root / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(root / f"{i}.png")
    return str(root)


# ------------------------------------------------------------------------------------ the columns of captions


def test_a_table_of_file_and_caption_trains(tmp_path, capsys):
    data = table(tmp_path / "d", "file,caption", "0.png,薑", "1.png,大蒜")
    train_clip.main(config(tmp_path / "run", data=data))
    assert "captions (caption): 2 different" in capsys.readouterr().out
    settings = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert settings["caption_column"] == "caption"


def test_without_a_word_the_herbs_have_their_three_languages(tmp_path):
    named = list_pairs(config(tmp_path, caption_column="zh-Hant,zh-Hans,en"))
    assert list_pairs(config(tmp_path)).captions == named.captions and len(named.captions) == 3
    assert with_columns(config(tmp_path)).caption_column == "zh-Hant,zh-Hans,en"


def test_what_is_held_out_by_its_column_is_no_caption(tmp_path):
    data = table(tmp_path / "d", "file,name,english,shop", "0.png,a,b,east", "1.png,c,d,west",
                 "2.png,e,f,east")
    assert with_columns(config(tmp_path, data=data, hold_out="shop=west")).caption_column == "name,english"


@pytest.mark.parametrize("layout", ["herbs", "classes", "a column more"])
def test_a_run_of_before_goes_on(tmp_path, layout):
    """Its config names the columns that were the default then, in class folders too."""
    data, before = str(HERBS), "zh-Hant,zh-Hans,en"
    if layout == "classes":
        for i, name in enumerate("abab"):
            (tmp_path / "d" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / "d" / name / f"{i}.png")
        data = str(tmp_path / "d")
    elif layout == "a column more":
        data = table(tmp_path / "d", f"file,{before},ja", *(f"{i}.png,a{i},b{i},c{i},d{i}" for i in range(4)))
    out = tmp_path / "run"
    train_clip.main(config(out, data=data, caption_column=before))
    settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    state = load_checkpoint(out / "checkpoint.pt")
    assert settings["caption_column"] == state["config"]["caption_column"] == before
    whole = (out / "metrics.jsonl").read_bytes()
    train_clip.main(config(out, data=data, resume=True))
    assert (out / "metrics.jsonl").read_bytes() == whole
    if layout != "a column more":
        return
    # then the table decides, and it says why not
    (out / "config.json").write_text("damaged", encoding="utf-8")
    with pytest.raises(UserError, match=f"trained with caption_column = '{before}', not '{before},ja'"):
        train_clip.main(config(out, data=data, resume=True))
    state["config"]["caption_column"] = "en"
    save_checkpoint(out / "checkpoint.pt", state)
    with pytest.raises(UserError, match=f"trained with caption_column = 'en', not '{before}'"):
        train_clip.main(config(out, data=data, resume=True, caption_column=before))


def test_a_column_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no column 'fr'; its columns are: 'file', 'zh-Hant', .* with "
                                        "--caption-column"):
        list_pairs(config(tmp_path, caption_column="en,fr"))
    with pytest.raises(UserError, match="--hold-out shop=west: no column 'shop' in captions.csv; it has "
                                        "file, zh-Hant"):
        list_pairs(config(tmp_path, hold_out="shop=west"))
    with pytest.raises(UserError, match="--caption-column: name at least one"):
        list_pairs(config(tmp_path, caption_column=","))


# ------------------------------------------------------------------------------------------- a share held out


def test_a_share_of_the_pictures_is_held_out():
    """Decided by the seed; every caption of two pictures or more keeps one; a caption of one may go."""
    files = [f"{i}.png" for i in range(100)]
    captions = [[f"name {i % 30}" if i < 60 else f"own {i}" for i in range(100)]]
    held = random_share(files, captions, 0.3, 0)
    torch.manual_seed(9)
    assert random_share(files, captions, 0.3,
                        0) == held and sum(held) == 30 != sum(random_share(files, captions, 0.4, 0))
    assert random_share(files, captions, 0.3, 1) != held
    kept = {caption for caption, out in zip(captions[0], held) if not out}
    assert all(f"name {i}" in kept for i in range(30)) and any(f"own {i}" not in kept for i in range(60, 100))
    assert sum(random_share(files, captions, 0.99, 0)) == 70
    assert sum(random_share(files, captions, 0.001, 0)) == 1


def test_a_caption_of_any_column_stays_and_a_picture_of_two_rows_is_one_picture():
    files, captions = [*"aabbcd"], [[*"123456"], [*"xyxyxy"]]
    for seed in range(20):
        held = random_share(files, captions, 0.9, seed)
        kept = {f for f, out in zip(files, held) if not out}
        assert kept and not kept & {f for f, out in zip(files, held) if out}
        assert {y for y, out in zip(captions[1], held) if not out} == {"x", "y"}


def test_training_with_a_share_held_out_and_evaluating_it(tmp_path, capsys):
    cfg = config(tmp_path / "run", hold_out="0.25", seed=3)
    train_clip.main(cfg)
    said = capsys.readouterr().out
    assert "6 pictures, 4 captions, 2 pictures held out" in said and "held out R@1" in said
    assert "2 pictures held out (0.25)" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    train, test = list_pairs(cfg).split()
    again, asked, _ = evaluate_clip.read_run(tmp_path / "run")
    assert asked.files == test.files and again.files == train.files and not set(train.files) & set(test.files)
    with pytest.raises(UserError, match="trained with hold_out = '0.25', not '0.5'"):
        train_clip.main(dataclasses.replace(cfg, hold_out="0.5", resume=True))


def test_a_share_that_leaves_too_little(tmp_path):
    data = table(tmp_path / "d", "file,caption", "0.png,a", "1.png,b", "2.png,c", "3.png,d")
    with pytest.raises(UserError, match="--hold-out 0.9: leaves fewer than two captions to train on"):
        list_pairs(config(tmp_path, data=data, hold_out="0.9"))


@pytest.mark.parametrize("text", ["0", "1", "-0.2", "1.5", "nan", "20%", "artist", " "])
def test_nonsense_is_one_line(text, tmp_path):
    words = f"--hold-out {re.escape(text)}: must be column=value, .* or a share"
    with pytest.raises(UserError, match=words) as caught:
        check(config(tmp_path, hold_out=text))
    assert "\n" not in str(caught.value)
