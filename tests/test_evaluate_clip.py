"""train/evaluate_clip.py: its measures on numbers known beforehand and in blocks,
runs from end to end, streams, docs."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from miniclip.image_text import PRESETS, ImageTextModel, Preset
from miniclip.retrieval import chance, ranks
from train import evaluate_clip, train_clip
from train.data import batches as reader
from train.data.image import read_image
from train.data.pairs import Pairs
from train.errors import DataError, UserError
from train.evaluate_clip import (
    EvaluateConfig,
    Relevant,
    answers,
    by_chance,
    by_colours,
    histogram,
    interval,
    measure,
    sampled,
)
from train.run.distributed import Ranks
from train.train_clip import TrainConfig, read_folder

ROOT = Path(__file__).parent.parent
HERBS = ROOT / "data" / "herbs"


def plain(color, size=32):
    return torch.tensor(color)[:, None, None].expand(3, size, size).contiguous()


def pairs(colors, *columns, held_out=False):
    return Pairs([f"{i}.png" for i in range(len(colors))], torch.stack([plain(c) for c in colors]),
                 list(columns), [held_out] * len(colors))


RED, DARK_RED, BLUE, GREEN = (0.9, -1.0, -1.0), (0.6, -1.0, -1.0), (-1.0, -1.0, 0.9), (-1.0, 0.9, -1.0)


def test_colours_find_what_has_those_colours():
    train = pairs([RED, BLUE, GREEN], ["red", "blue", "green"], ["rot", "blau", "grün"])
    asked = pairs([BLUE, DARK_RED], ["blue", "red"], ["blau", "rot"], held_out=True)
    for columns, many in ((slice(1), 3), (slice(None), 6)):
        names, relevant = answers(train, asked, columns)
        assert len(names) == many and relevant.counts()[0].tolist() == [many // 3] * 2
        scores = measure(by_colours(train, asked, names, columns), relevant, asked.captions[0], 20)
        if columns == slice(1):
            assert {scores[way][0] for way in scores} == {1.0}
    assert torch.allclose(histogram(train.images).sum(dim=1), torch.ones(3))


def test_a_name_without_training_picture_is_never_the_answer():
    train, asked = pairs([RED, BLUE], ["red", "blue"]), pairs([GREEN], ["green"], held_out=True)
    names, relevant = answers(train, asked)
    scores = measure(by_colours(train, asked, names), relevant, asked.captions[0], 20)
    # one picture to choose
    assert scores["image_to_text_R@1"][0] == 0.0 and scores["text_to_image_R@1"][0] == 1.0


def test_every_matching_caption_counts():
    similarity = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.2, 0.1]])
    relevant = Relevant(torch.tensor([[0, 1], [2, 2]]), 3)
    scores = measure(similarity, relevant, ["a", "b"], 20)
    assert scores["image_to_text_R@1"][0] == 0.5 and scores["text_to_image_R@1"][0] == pytest.approx(1 / 3)
    assert by_chance(relevant)["image_to_text_R@1"] == [pytest.approx((2 / 3 + 1 / 3) / 2)]


def dense(relevant):
    """The matrix that a Relevant stands for, made in the plainest way."""
    found = torch.zeros(len(relevant.own), relevant.names, dtype=torch.bool)
    for picture, own in enumerate(relevant.own.tolist()):
        found[picture, own] = True
    return found


def in_one_piece(similarity, relevant, things, resamples, seed):
    """What measure() computes, from whole matrices [N, M]."""
    number = [list(dict.fromkeys(things)).index(thing) for thing in things]
    wanted = relevant.any(dim=0)
    first = torch.tensor([number[int(column.nonzero()[0])] for column in relevant.T if column.any()])
    ways = {"image_to_text": (similarity, relevant, torch.tensor(number)),
            "text_to_image": (similarity.T[wanted], relevant.T[wanted], first)}
    scores = {}
    for way, (s, r, of) in ways.items():
        for k in (1, 5):
            hit = (ranks(s, r) < k).double()
            scores[f"{way}_R@{k}"] = [hit.mean().item(),
                                      *interval(hit, of, len(set(number)), resamples, seed)]
    return scores


@pytest.mark.parametrize("cells", [1, 60, 333, 2**24])
def test_blocks_of_any_size_give_the_same_numbers(cells, monkeypatch):
    """30 pictures of 17 names, 40 names that no picture here has,
    equal names in both columns and equal scores."""
    generator = torch.Generator().manual_seed(1)
    relevant = Relevant(torch.randint(17, (30, 2), generator=generator), 57)
    similarity = torch.randint(300, (30, 57), generator=generator).float()
    similarity += 60 * dense(relevant)
    things = [f"thing {i % 9}" for i in range(30)]
    expected = in_one_piece(similarity, dense(relevant), things, 200, 3)
    assert 0 < expected["image_to_text_R@1"][0] < expected["text_to_image_R@5"][0] < 1
    monkeypatch.setattr(evaluate_clip, "CELLS", cells)
    assert measure(similarity, relevant, things, 200, 3) == expected
    blocks = []

    def score(pictures, names):
        blocks.append(similarity[pictures][:, names])
        return blocks[-1]

    assert measure(score, relevant, things, 200, 3) == expected
    assert all(block.numel() <= cells or 1 in block.shape for block in blocks)      # a row at least


def test_chance_needs_no_matrix():
    relevant = Relevant(torch.randint(17, (30, 2), generator=torch.Generator().manual_seed(1)), 57)
    right = dense(relevant)
    asked = right.T[right.any(dim=0)]
    assert by_chance(relevant) == {f"{way}_R@{k}": [chance(r, k)] for k in (1, 5)
                                   for way, r in (("image_to_text", right), ("text_to_image", asked))}


@pytest.mark.parametrize("cells", [1, 20, 2**24])
def test_nearest_colours_in_blocks(cells, monkeypatch):
    """Any block of the scores is that of the whole matrix;
    a name that only one column holds is found as well."""
    generator = torch.Generator().manual_seed(2)
    pictures = torch.rand(13, 3, 32, 32, generator=generator) * torch.rand(13, 3, 1, 1, generator=generator)
    captions = [[f"name {i % 5}" for i in range(13)], [f"other {i % 3}" for i in range(13)]]
    train = Pairs([""] * 10, pictures[:10], [column[:10] for column in captions], [False] * 10)
    asked = Pairs([""] * 3, pictures[10:], [[*captions[0][10:12], "new"], captions[1][10:]], [True] * 3)
    names, _ = answers(train, asked, slice(None))
    apart = torch.cdist(histogram(asked.images), histogram(train.images), p=1)                     # [3, 10]
    carries = torch.tensor([[name in row for name in names] for row in zip(*train.captions, strict=True)])
    nearest = torch.stack([apart[:, rows].min(dim=1).values if rows.any() else torch.full((3,), 9.0)
                           for rows in carries.T])
    sizes, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda *args,
                        **more: (found := cdist(*args, **more), sizes.append(found.shape))[0])
    monkeypatch.setattr(evaluate_clip, "CELLS", cells)
    score, every = by_colours(train, asked, names, slice(None)), slice(None)
    assert torch.equal(score(every, every), -nearest.T) and (nearest == 9).sum() == 3
    assert torch.equal(score(torch.tensor([2, 0]), torch.tensor([7, 1, 4])), -nearest.T[[2, 0]][:, [7, 1, 4]])
    assert all(n * k <= max(cells, n) for n, k in sizes)
    nothing = Pairs([], train.images[:0], [[], []], [])
    assert (by_colours(nothing, asked, names, slice(None))(every, every) == -9).all()


def test_the_interval():
    """Of 400 things, half found: 0.5 +- 1.96 sqrt(0.25 / 400);
    as 200 things of two alike pictures it is wider."""
    hit = torch.arange(400).remainder(2).double()
    low, high = interval(hit, torch.arange(400), 400, 4000, seed=0)
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)
    low, high = interval(hit.sort().values, torch.arange(400) // 2, 200, 4000, seed=0)
    assert low == pytest.approx(0.431, abs=0.008) and high == pytest.approx(0.569, abs=0.008)
    assert interval(torch.ones(5).double(), torch.arange(5), 5, 50, seed=1) == (1.0, 1.0)


def read_pairs(cfg):
    return read_folder(cfg, Ranks(0, 1, torch.device("cpu")))[0]


def config(out, **more):
    return TrainConfig(**{**dict(data=str(HERBS), out=str(out), size=32, batch=8, steps=30, warmup=2,
                                 checks=0, device="cpu", hold_out="artist=twitter"), **more})


def test_a_run_from_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", Preset("resnet", 8, (1, 1, 1, 1), 0, 64, 1, 64))
    train_clip.main(config(tmp_path))
    capsys.readouterr()
    evaluate_clip.main(EvaluateConfig(run=str(tmp_path), device="cpu", resamples=50, shown=3))
    said, first = capsys.readouterr().out, (tmp_path / "evaluation.json").read_bytes()
    assert said.startswith("4 pictures of 4 things, held out (artist=twitter); 4 names to choose from\n|")
    found = json.loads(first)["scores"]
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert found["model"]["image_to_text_R@1"][0] == pytest.approx(last["held_out_image_to_text_R@1"])
    assert found["chance"]["text_to_image_R@1"] == [0.25]
    assert set(found) == {"model", "nearest by colours", "chance"}
    page = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
    assert "data:image/png;base64" in page
    rows = [name for name in ("薑", "草藥", "大蒜", "辣椒") if f"<tr><td>{name}</td><td>" in page]
    assert len(rows) == 3                              # which three hangs on what so short a run has learned
    evaluate_clip.main(EvaluateConfig(run=str(tmp_path), device="cpu", resamples=50, shown=3))
    assert (tmp_path / "evaluation.json").read_bytes() == first
    evaluate_clip.main(EvaluateConfig(run=str(tmp_path), device="cpu", resamples=50, shown=0,
                                      every_column=True))
    assert "12 names to choose from" in capsys.readouterr().out


def test_shuffled_captions_stay_rows(tmp_path):
    """Chinese and English names of a thing move together, and the same way each time."""
    train, _ = read_pairs(config(tmp_path, caption_column="zh-Hant,en")).split()
    seeds = [train.shuffled(seed) for seed in range(4)]
    assert any(s.captions != train.captions
               for s in seeds) and train.shuffled(2) .captions == seeds[2].captions
    rows = set(zip(*train.captions, strict=True))
    assert all(set(zip(*s.captions, strict=True)) == rows for s in seeds)


def make_stream(root, rows=range(14)):
    """Pictures of five names, every third held out, each with a second name of its own.
    4 and 5 are broken."""
    root.mkdir(exist_ok=True)
    for i in range(14):
        Image.new("RGB", (16, 16), (18 * i, 90, 255 - 18 * i)).save(root / f"{i}.png")
    for i in (4, 5):
        (root / f"{i}.png").write_bytes(b"no picture")
    lines = [f"{i}.png,name {i % 5},own {i},{'out' if i % 3 == 2 else 'in'}" for i in rows]
    (root / "captions.csv").write_text("\n".join(["file,one,two,side", *lines]), encoding="utf-8")
    return root


def train_stream(tmp_path, **more):
    data = make_stream(tmp_path / "data")
    train_clip.main(config(tmp_path / "run", data=str(data), **{**dict(
        stream=True, caption_column="one,two", hold_out="side=out", batch=4, steps=5), **more}))
    return data


def evaluated(run, **flags):
    evaluate_clip.main(EvaluateConfig(**{**dict(run=str(run), device="cpu", resamples=50), **flags}))
    return json.loads((run / "evaluation.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("hold_out, asked, names",
                         [("side=out", "3 pictures of 3 things", 17), ("", "12 pictures of 5", 17)])
def test_broken_files_of_a_stream_are_as_if_they_were_not_there(hold_out, asked, names, tmp_path, capsys):
    """Neither they nor the names that only they have;
    the run folder lists them as long as they are broken."""
    data, run = train_stream(tmp_path, hold_out=hold_out), tmp_path / "run"
    capsys.readouterr()
    found = evaluated(run, every_column=True)
    said, listed = capsys.readouterr().out, (run / "evaluation-skipped.txt").read_text(encoding="utf-8")
    assert found.pop("broken") == 2 and found["names"] == names and asked in said
    assert f"2 broken files left out ({run / 'evaluation-skipped.txt'})" in said
    assert "4.png" in listed and "5.png" in listed and len(listed.splitlines()) == 2
    assert "2 broken files left out" in (run / "evaluation.html").read_text(encoding="utf-8")
    make_stream(data, [i for i in range(14) if i not in (4, 5)])
    assert evaluated(run, every_column=True) == found and not (run / "evaluation-skipped.txt").exists()
    assert "left out" not in capsys.readouterr().out


def test_every_picture_is_read_once_and_few_at_a_time(tmp_path, monkeypatch):
    """And those on the page once more; only those asked about go through the model."""
    train_stream(tmp_path, hold_out="")
    read, batches, few, look_at = [], [], evaluate_clip.readable, evaluate_clip.histogram

    def watched(path, *args, **more):
        read.append(Path(path).name)
        return read_image(path, *args, **more)

    monkeypatch.setattr(reader, "read_image", watched)
    monkeypatch.setattr(evaluate_clip, "histogram",
                        lambda pictures: (batches.append(len(pictures)), look_at(pictures))[1])
    monkeypatch.setattr(evaluate_clip, "readable", lambda *args: few(*args, batch=3))
    embedded, embed = [], ImageTextModel.embed_images
    monkeypatch.setattr(ImageTextModel, "embed_images", lambda self,
                        p: (embedded.append(len(p)), embed(self, p))[1])
    assert evaluated(tmp_path / "run", shown=2, most=5)["pictures"] == sum(embedded) <= 5
    assert sorted(read[:14]) == sorted(f"{i}.png" for i in range(14)) and len(read[14:]) == 4
    assert max(batches) == 3 and sum(batches) == 12


def test_all_that_is_asked_about_is_broken(tmp_path):
    data = train_stream(tmp_path)
    for i in (2, 8, 11):
        (data / f"{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 4 pictures asked about can be read: .*2\.png"):
        evaluated(tmp_path / "run")


def test_no_more_than_most_are_asked_about(tmp_path, capsys):
    """Sampled at random, each with its own vector; the names to choose from and the training pictures stay
    all."""
    data, run = train_stream(tmp_path, hold_out="", steps=2), tmp_path / "run"
    make_stream(data, [i for i in range(14) if i not in (4, 5)])
    whole = evaluated(run, every_column=True)
    assert whole["rows"] == "all trained on" and whole == evaluated(run, every_column=True, most=12)
    other = evaluated(run, every_column=True, most=7, seed=1)
    capsys.readouterr()
    drawn = evaluated(run, every_column=True, most=7)
    assert re.match(r"7 pictures of \d things, all trained on, sampled at random from 12; 17 names to choose "
                    r"from\n", capsys.readouterr().out)
    assert [drawn[name] for name in ("pictures", "names",
                                     "rows")] == [7, 17, "all trained on, sampled at random from 12"]
    assert drawn != other and drawn == evaluated(run, every_column=True, most=7)

    pairs = read_pairs(config(run, data=str(data), caption_column="one,two", hold_out=""))
    (names, relevant), rows = answers(pairs, pairs, slice(None)), sorted(sampled(12, 7, 0))
    matcher = ImageTextModel.load(run / "model")
    similarity = matcher.embed_images(pairs.images) @ matcher.embed_texts(names).T
    things = [pairs.captions[0][i] for i in rows]
    assert drawn["scores"]["model"] == in_one_piece(similarity[rows], dense(relevant)[rows], things, 50, 0)
    colours = by_colours(pairs, pairs, names, slice(None))(torch.tensor(rows), slice(None))
    assert drawn["scores"]["nearest by colours"] == in_one_piece(colours, dense(relevant)[rows], things, 50,
                                                                 0)


def test_names_of_held_out_pictures_that_were_not_drawn_stay_to_choose_from(tmp_path):
    """Even that of a broken file, which nobody has opened."""
    train_stream(tmp_path)
    found = evaluated(tmp_path / "run", every_column=True, most=1)
    assert found["pictures"] == 1 and found["rows"] == "held out (side=out), sampled at random from 4"
    assert found["names"] == 5 + 13 and found["broken"] == 1


@pytest.mark.parametrize("flags, message", [
    (dict(), "no run of train.train_clip here"), (dict(resamples=1), "--resamples 1: from 10"),
    (dict(most=0), "--most 0: from 1 to 1,000,000"), (dict(most=2_000_000), "--most 2000000"),
    (dict(shown=-1), "--shown -1"),
])  # fmt: skip
def test_bad_flags(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        evaluate_clip.main(EvaluateConfig(run=str(tmp_path), **flags))


def test_the_four_gates_in_the_docs():
    """docs/clip.md's code runs as printed: each gate asserts itself."""
    text = (ROOT / "docs" / "clip.md").read_text(encoding="utf-8")
    gates = "\n".join(re.findall(r"```python\n(# gate.*?)```", text, re.DOTALL))
    assert gates.count("assert") >= 4
    exec(compile(gates, "docs/clip.md", "exec"), {})
