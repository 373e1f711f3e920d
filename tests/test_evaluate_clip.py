"""train/evaluate_clip.py: its measures on numbers known beforehand, a run from end to end, the shuffled control, docs."""

import json
import re
from pathlib import Path

import pytest
import torch

from train import evaluate_clip, train_clip
from train.common import UserError
from train.evaluate_clip import EvaluateConfig, answers, by_chance, by_colours, histogram, interval, measure
from train.matcher import PRESETS, Preset
from train.train_clip import Pairs, TrainConfig, read_pairs

ROOT = Path(__file__).parent.parent
HERBS = ROOT / "data" / "herbs"


def plain(color, size=32):
    return torch.tensor(color)[:, None, None].expand(3, size, size).contiguous()


def pairs(colors, *columns, held_out=False):
    return Pairs([f"{i}.png" for i in range(len(colors))], torch.stack([plain(c) for c in colors]), list(columns),
                 [held_out] * len(colors))


RED, DARK_RED, BLUE, GREEN = (0.9, -1.0, -1.0), (0.6, -1.0, -1.0), (-1.0, -1.0, 0.9), (-1.0, 0.9, -1.0)


def test_colours_find_what_has_those_colours():
    train = pairs([RED, BLUE, GREEN], ["red", "blue", "green"], ["rot", "blau", "grün"])
    asked = pairs([BLUE, DARK_RED], ["blue", "red"], ["blau", "rot"], held_out=True)
    for columns, many in ((slice(1), 3), (slice(None), 6)):
        names, relevant = answers(train, asked, columns)
        assert len(names) == many and relevant.sum(dim=1).tolist() == [many // 3] * 2
        scores = measure(by_colours(train, asked, names, columns), relevant, asked.captions[0], 20)
        if columns == slice(1):
            assert {scores[way][0] for way in scores} == {1.0}
    assert torch.allclose(histogram(train.pictures).sum(dim=1), torch.ones(3))


def test_a_name_without_training_picture_is_never_the_answer():
    train, asked = pairs([RED, BLUE], ["red", "blue"]), pairs([GREEN], ["green"], held_out=True)
    names, relevant = answers(train, asked)
    scores = measure(by_colours(train, asked, names), relevant, asked.captions[0], 20)
    assert scores["image_to_text_R@1"][0] == 0.0 and scores["text_to_image_R@1"][0] == 1.0     # one picture to choose


def test_every_matching_caption_counts():
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.2, 0.1]])
    relevant = torch.tensor([[True, True, False], [False, False, True]])
    scores = measure(similarity, relevant, ["a", "b"], 20)
    assert scores["image_to_text_R@1"][0] == 0.5 and scores["text_to_image_R@1"][0] == pytest.approx(1 / 3)
    assert by_chance(relevant)["image_to_text_R@1"] == [pytest.approx((2 / 3 + 1 / 3) / 2)]


def test_the_interval():
    """Of 400 things, half found: 0.5 +- 1.96 sqrt(0.25 / 400); as 200 things of two alike pictures it is wider."""
    hit = torch.arange(400).remainder(2).double()
    low, high = interval(hit, torch.arange(400), 400, 4000, seed=0)
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)
    low, high = interval(hit.sort().values, torch.arange(400) // 2, 200, 4000, seed=0)
    assert low == pytest.approx(0.431, abs=0.008) and high == pytest.approx(0.569, abs=0.008)
    assert interval(torch.ones(5).double(), torch.arange(5), 5, 50, seed=1) == (1.0, 1.0)


def config(out, **more):
    return TrainConfig(**{**dict(data=str(HERBS), out=str(out), size=32, batch=8, steps=30, warmup=2, checks=0, device="cpu",
                                 hold_out="artist=twitter"), **more})


def test_a_run_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", Preset("resnet", 8, (1, 1, 1, 1), 0, 64, 1, 64))
    train_clip.main(config(tmp_path))
    capsys.readouterr()
    evaluate_clip.main(EvaluateConfig(run=str(tmp_path), device="cpu", resamples=50, shown=3))
    said, first = capsys.readouterr().out, (tmp_path / "evaluation.json").read_bytes()
    assert said.startswith("4 pictures of 4 things, held out (artist=twitter); 4 names to choose from")
    found = json.loads(first)["scores"]
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert found["model"]["image_to_text_R@1"][0] == pytest.approx(last["held_out_image_to_text_R@1"])
    assert found["chance"]["text_to_image_R@1"] == [0.25] and set(found) == {"model", "nearest by colours", "chance"}
    page = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
    assert "data:image/png;base64" in page and "大蒜" in page
    evaluate_clip.main(EvaluateConfig(run=str(tmp_path), device="cpu", resamples=50, shown=3))
    assert (tmp_path / "evaluation.json").read_bytes() == first
    evaluate_clip.main(EvaluateConfig(run=str(tmp_path), device="cpu", resamples=50, shown=0, every_column=True))
    assert "12 names to choose from" in capsys.readouterr().out


def test_shuffled_captions_stay_rows(tmp_path):
    """Chinese and English names of a thing move together, and the same way each time."""
    train, _ = read_pairs(config(tmp_path, caption_column="zh-Hant,en")).split()
    seeds = [train.shuffled(seed) for seed in range(4)]
    assert any(s.captions != train.captions for s in seeds) and train.shuffled(2) .captions == seeds[2].captions
    rows = set(zip(*train.captions, strict=True))
    assert all(set(zip(*s.captions, strict=True)) == rows for s in seeds)


@pytest.mark.parametrize("flags, message", [(dict(), "no run of train.train_clip here"), (dict(resamples=1), "at least 10")])
def test_bad_flags(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        evaluate_clip.main(EvaluateConfig(run=str(tmp_path), **flags))


def test_the_four_gates_in_the_docs():
    """docs/clip.md's code runs as printed: each gate asserts itself."""
    text = (ROOT / "docs" / "clip.md").read_text(encoding="utf-8")
    gates = "\n".join(re.findall(r"```python\n(# gate.*?)```", text, re.DOTALL))
    assert gates.count("assert") >= 4
    exec(compile(gates, "docs/clip.md", "exec"), {})
