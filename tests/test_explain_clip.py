"""train.search --explain: the numbers of the page are the model's, and the page asks nobody for anything."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from miniclip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer
from miniclip.image import CLIPImageProcessor
from miniclip.image_text import PRESETS, ImageTextModel, Preset
from miniclip.model import attention_written_out
from miniclip.weights import WeightsError
from train import explain_clip, search, train_clip
from train.data.batches import load_image
from train.errors import DataError, UserError
from train.explain_clip import GRID, class_attention, embed_ids, occlusion, read_token_by_token, window
from train.index import Index
from train.search import SearchConfig
from train.train_clip import TrainConfig

HERBS = Path(__file__).parent.parent / "data" / "herbs"
SMALL = {"tiny": Preset("resnet", 8, (1, 1, 1, 1), 0, 64, 1, 64),
         "vit-tiny": Preset("vit", 32, (2,), 8, 32, 1, 32)}


@pytest.fixture(scope="module", params=SMALL)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps of either kind of tower, for all tests that only look at it."""
    out = tmp_path_factory.mktemp(request.param) / "herbs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, request.param, SMALL[request.param])
        train_clip.main(TrainConfig(data=str(HERBS), out=str(out), size=32, preset=request.param, batch=8,
                                    steps=6, warmup=2, checks=2, hold_out="artist=twitter", device="cpu"))
    return out


def page_of(run: Path, **flags: object) -> tuple[str, dict]:
    """The page's text and its data."""
    path = run / "page.html"
    search.main(SearchConfig(run=str(run), explain=str(path), device="cpu", **flags))
    text = path.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def images_of(run: Path, size: int) -> torch.Tensor:
    index = Index.load(run / "index")
    return torch.stack([load_image(index.path(i), size) for i in range(len(index.files))])


def test_the_numbers_are_the_models(run: Path, monkeypatch) -> None:
    parts = []
    monkeypatch.setattr(explain_clip.Progress, "show", lambda self, done, _: parts.append((done, self.total)))
    text, data = page_of(run)
    assert parts == [(i + 1, 8 + 12) for i in range(20)]
    model = ImageTextModel.load(run / "model")
    images = images_of(run, model.size)
    assert len(data["pictures"]) == 8 and len(data["names"]) == 12
    assert set(data["names"]) == set(model.captions)
    wanted = model.embed_images(images) @ model.embed_texts(data["names"]).T
    assert torch.allclose(torch.tensor(data["similarity"]), wanted, atol=1e-4)
    assert data["scale"] == pytest.approx(model.model.logit_scale.exp().item())
    for reading, scores in zip(data["readings"], wanted.T):         # typed to its end, a name is the name
        assert torch.allclose(torch.tensor(reading["typed"][-1]), scores, atol=1e-4)
        assert len(reading["typed"]) == len(reading["pieces"]) + 1 == len(reading["without"]) + 1
    assert [len(data["falls"]), len(data["falls"][0]), len(data["falls"][0][0])] == [8, 12, GRID * GRID]
    assert (data["attention"] is None) == (data["tower"] == "ResNet")
    assert len(set(map(str, data["things"]))) == 4                  # three spellings of each herb

    first = dict(data["nearest_names"][0])
    assert max(first.values()) == pytest.approx(max(data["similarity"][0]), abs=2e-4) and len(first) == 4
    for name, found in zip(range(12), data["nearest_pictures"]):
        assert found[0][1] == pytest.approx(max(row[name] for row in data["similarity"]), abs=2e-3)

    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/2000/svg", "", text)
    assert not re.search(r"<link|<iframe|@import|url\(|fetch\(|XMLHttp|<script src", text)
    assert "default-src 'none'" in text and len(text.encode()) < 5e6


def test_training_is_shown_as_the_run_left_it(run: Path) -> None:
    _, data = page_of(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = data["training"]
    assert shown["loss"] == [[row["step"], row["loss"]] for row in rows if "loss" in row]
    found = [[row["step"], row["held_out_text_to_image_R@1"]] for row in rows if "text_to_image_R@1" in row]
    assert shown["recall"]["held out, name to picture"] == found
    trained, held_out = shown["sides"]
    assert [frame["step"] for frame in trained["frames"]] == [step for step, _ in found]
    assert trained["rows"] == held_out["rows"] == ["薑", "草藥", "大蒜", "辣椒"] == train_names(run)


def train_names(run: Path) -> list[str]:
    """The first column of the table, as `recall.evaluate` orders it."""
    return list(dict.fromkeys(Index.load(run / "index").captions))


def test_covering_a_place_is_what_it_says(run: Path) -> None:
    """One square, painted here by hand."""
    model = ImageTextModel.load(run / "model")
    image, texts = images_of(run, model.size)[0], model.embed_texts(["薑", "garlic"])
    falls = occlusion(model, image, texts)
    assert list(falls.shape) == [GRID, GRID, 2]
    covered = image.clone()
    covered[:, 10:18, 18:26] = image.mean(dim=(1, 2))[:, None, None]        # row 3, column 5; 4 pixels each
    both = model.embed_images(torch.stack([image, covered])) @ texts.T
    assert torch.allclose(falls[3, 5], both[0] - both[1], atol=1e-6) and falls.abs().max() > 0
    assert (window(3, 32), window(0, 32), window(7, 32)) == (slice(10, 18), slice(0, 6), slice(26, 32))


def test_a_token_is_taken_out(run: Path) -> None:
    """Two tokens: without the first the second is read alone, as the tokenizer would read it."""
    model = ImageTextModel.load(run / "model")
    pictures = model.embed_images(images_of(run, model.size))
    reading = read_token_by_token(model, "ginger root", pictures)
    assert [piece["text"].strip() for piece in reading["pieces"]] == ["ginger", "root"]
    alone = model.embed_texts(["root", "ginger", ""]) @ pictures.T
    for mine, scores in zip([*reading["without"], reading["typed"][0]], alone):
        assert torch.allclose(torch.tensor(mine), scores, atol=1e-4)
    assert reading["typed"][1] == reading["without"][1]             # "ginger" both times
    assert reading["typed"][2] != reading["without"][0] != reading["without"][1]

    long = read_token_by_token(model, "ginger " * 200, pictures)    # cut as the model cuts it
    assert len(long["pieces"]) == model.tokenizer.model_max_length - 2
    whole = model.embed_texts(["ginger " * 200]) @ pictures.T
    assert torch.allclose(torch.tensor(long["typed"][-1]), whole[0], atol=1e-4)
    assert embed_ids(model, [[]]).shape[0] == 1


def test_attention_is_the_modules_own(run: Path) -> None:
    """Rows sum to 1; the weights, from the module's own projections, give the output that the module gave."""
    model = ImageTextModel.load(run / "model")
    images = images_of(run, model.size)
    found = class_attention(model, images)
    if not hasattr(model.model, "vision_model"):
        assert found is None
        return
    assert list(found.shape) == [8, 2, 17] and torch.allclose(found.sum(dim=-1), torch.ones(8, 2))
    seen = []
    for layer in model.model.vision_model.encoder.layers:
        layer.self_attn.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out[0])))
    vectors = model.embed_images(images)
    for number, (module, x, out) in enumerate(seen):
        q, k, v = (project(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
                   for project in (module.q_proj, module.k_proj, module.v_proj))
        y, weights = attention_written_out(q, k, v, None, False, 0.0)
        assert torch.allclose(module.out_proj(y.transpose(1, 2).flatten(2)), out, atol=1e-5)
        assert torch.allclose(weights[:, :, 0].mean(dim=1), found[:, number], atol=1e-6)
    tower = model.model.vision_model
    assert torch.equal(model.embed_images(images), vectors) and not tower._forward_hooks
    assert not tower._forward_pre_hooks


def test_a_question_comes_first(run: Path, tmp_path: Path, capsys) -> None:
    asked = tmp_path / "<b>&.png"
    Image.new("RGB", (40, 30), "red").save(asked)
    text, data = page_of(run, image=str(asked), out=str(tmp_path / "hits.png"))
    assert data["pictures"][0]["file"] == str(asked) and len(data["pictures"]) == 9
    assert "<b>&.png" not in text and "\\u003cb>&.png" in text      # no text of the data is read as HTML
    said = capsys.readouterr().out
    assert "its name:" in said and data["nearest_names"][0][0][0] in said
    _, data = page_of(run, text="hot </script>", out=str(tmp_path / "hits.png"), top=2)
    assert data["names"][0] == "hot </script>" and len(data["nearest_pictures"][0]) == 2
    scores = [row[0] for row in data["similarity"]]
    assert scores == sorted(scores, reverse=True)                   # pictures nearest to the name first
    _, data = page_of(run, names="garlic, herb")
    assert data["names"] == ["garlic", "herb"]


def test_what_a_run_has_too_much_of(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(explain_clip, "PICTURES", 3), monkeypatch.setattr(explain_clip, "NAMES", 5)
    monkeypatch.setattr(explain_clip, "FRAMES", 2)
    _, data = page_of(run)
    assert len(data["pictures"]) == 3 and len(data["names"]) == 5 and data["all_pictures"] == 8
    assert len(data["nearest_names"][0]) == 4                       # of all
    steps = [frame["step"] for frame in data["training"]["sides"][0]["frames"]]
    assert steps == [0, 6]


def test_another_clip_folder_works_with_pictures(tmp_path: Path, capsys) -> None:
    """A model of any CLIP in RUN/model: no run beside it, no captions; the page is of what there is."""
    tokenizer = CLIPTokenizer.of_captions(["red", "blue"], 600, 4)
    text = CLIPTextConfig.for_tokenizer(tokenizer, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                        num_attention_heads=1)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                  image_size=24, patch_size=12)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    ImageTextModel(model, tokenizer, CLIPImageProcessor(size=24, crop_size=24), []).save(tmp_path / "model")
    (tmp_path / "model" / "matcher.json").unlink()
    (tmp_path / "pictures").mkdir()
    for color in ("blue", "red"):
        Image.new("RGB", (20, 20), color).save(tmp_path / "pictures" / f"{color}.png")
    pictures = str(tmp_path / "pictures")
    _, data = page_of(tmp_path, pictures=pictures, names="red, blue")
    assert data["training"] is None and data["names"] == ["red", "blue"]
    assert len(data["pictures"]) == 2 and len(data["attention"][0][0]) == 5
    with pytest.raises(UserError, match="neither the model nor the index knows a name: give --names"):
        page_of(tmp_path, pictures=pictures)
    for color in ("blue", "red"):
        (tmp_path / "pictures" / f"{color}.png").unlink()
    with pytest.raises(DataError, match="none of the 2 pictures of the index can be read"):
        page_of(tmp_path, index=str(tmp_path / "index-pictures"), names="red")
    assert "left out: " in capsys.readouterr().out


def test_errors_are_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--explain .*: a folder; give the name of an HTML file"):
        search.main(SearchConfig(run=str(run), explain=str(tmp_path), device="cpu"))
    with pytest.raises(UserError, match="give either --text or --image, or neither, with --explain"):
        search.main(SearchConfig(run=str(run), text="薑", image="a.png", explain="page.html", device="cpu"))
    with pytest.raises(UserError, match="no run folder here"):
        search.main(SearchConfig(run=str(run / "model"), explain="page.html", device="cpu"))
    absent = str(tmp_path / "no.png")
    with pytest.raises(DataError, match="no.png"):
        search.main(SearchConfig(run=str(run), image=absent, explain="page.html", device="cpu"))
    (tmp_path / "metrics.jsonl").write_text('{"step": "one"}\n')
    with pytest.raises(WeightsError, match="metrics.jsonl, line 1: 'step' = 'one' is not a number"):
        explain_clip.training(tmp_path, ImageTextModel.load(run / "model"), Index.load(run / "index"))
    assert explain_clip.finite({"a": [1.0, float("nan")], "b": float("inf")}) == {"a": [1.0, None], "b": None}
