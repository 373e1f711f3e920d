"""train.judge and data.make_calligraphy without any font package: shapes, names, saving, rejects, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from data import make_calligraphy
from data.make_calligraphy import MakerError
from miniclip.files import WeightsError
from train import judge
from train.data.folder import CaptionedImages
from train.data.grid import save_image
from train.data.table import list_captioned
from train.errors import UserError

torch.set_num_threads(1)
CALLIGRAPHY = Path(__file__).parent.parent / "data" / "calligraphy"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def small():
    """A judge of the four characters, trained for a moment on the committed pictures."""
    torch.manual_seed(0)
    pictures = ((CaptionedImages(CALLIGRAPHY).images() + 1) * 127.5).byte()
    model = judge.GlyphClassifier(list("春滿乾坤"), width=8)
    judge.train(model, pictures, torch.arange(4).repeat_interleave(5), judge.JudgeConfig(steps=100, batch=32))
    return model


def test_268_characters_each_once():
    assert len(judge.CHARACTERS) == len(set(judge.CHARACTERS)) == 268
    assert judge.CHARACTERS.startswith("春滿乾坤")
    assert set("泰奏秦舂湖漢瞞朝幹韓乹神伸坡坦埋申土") < set(judge.CHARACTERS)


def test_a_judge_learns_names_and_nothing(small):
    names, probabilities = judge.classify_images(small, CaptionedImages(CALLIGRAPHY).images())
    assert sum(a == b for a, b in zip(names, "春春春春春滿滿滿滿滿乾乾乾乾乾坤坤坤坤坤", strict=True)) >= 17
    assert probabilities.shape == (20,) and (probabilities > 0.2).all() and (probabilities <= 1).all()
    noise = torch.randn(20, 1, 64, 64, generator=generator()).clamp(-1, 1)
    assert judge.classify_images(small, noise)[0].count("none") >= 18


def test_other_sizes_and_no_gradient(small):
    pictures = torch.ones(3, 1, 128, 96, requires_grad=True)
    names, probabilities = judge.classify_images(small, pictures)
    assert len(names) == 3 and not probabilities.requires_grad


def test_saved_and_loaded_alike(small, tmp_path):
    judge.save_judge(small, tmp_path, {"x": [0.5, 0.25]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge.json", "judge.pt"]
    again = judge.load_judge(tmp_path)
    x = torch.rand(4, 1, 64, 64, generator=generator()) * 2 - 1
    assert torch.equal(again(x), small.eval()(x)) and again.names == [*"春滿乾坤", "none"]


def test_a_broken_judge_is_one_clear_error(small, tmp_path):
    with pytest.raises(UserError, match=r"judge.json: .*No such file.*; train a judge with "):
        judge.load_judge(tmp_path)
    judge.save_judge(small, tmp_path, {})
    good = json.loads((tmp_path / "judge.json").read_text("utf-8"))
    for change in ({"names": ["春"]}, {"names": ["x"] * 90_000, "width": 512}, {"width": 9}):
        (tmp_path / "judge.json").write_text(json.dumps(good | change), encoding="utf-8")
        with pytest.raises(WeightsError, match=r"judge.pt: tensors do not fit GlyphClassifier"):
            judge.load_judge(tmp_path)                          # which is built only if they do
    for change in ({"names": "春"}, {"names": [1]}, {"width": 10**9}, {"width": "8"}, {"width": None},
                   {"width": True}, {"names": {"x" * 10_000: 1}}):
        (tmp_path / "judge.json").write_text(json.dumps(good | change), encoding="utf-8")
        with pytest.raises(UserError, match=r"judge.json: names = .*, width = ") as caught:
            judge.load_judge(tmp_path)
        assert len(str(caught.value)) < 700
    for text in ("[]", "{", '{"width": ' + "9" * 5000 + "}", "[" * 99_999):
        (tmp_path / "judge.json").write_text(text)
        with pytest.raises(WeightsError, match="judge.json: "):
            judge.load_judge(tmp_path)
    (tmp_path / "judge.json").write_text(json.dumps(good), encoding="utf-8")
    (tmp_path / "judge.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match="judge.pt: neither a zip archive nor a pickle"):
        judge.load_judge(tmp_path)
    torch.save({"body.0.weight": "x"}, tmp_path / "judge.pt")
    with pytest.raises(WeightsError, match="judge.pt: 'body.0.weight' is a str"):
        judge.load_judge(tmp_path)


def test_naming_a_folder(small, tmp_path, capsys):
    (tmp_path / "judge").mkdir()
    judge.save_judge(small, tmp_path / "judge", {})
    judge.main(judge.JudgeConfig(run=str(tmp_path / "judge"), pictures=str(CALLIGRAPHY)))
    by_caption = capsys.readouterr().out.splitlines()
    assert len(by_caption) == 21 and "of 20 =" in by_caption[-1]
    for i in range(3):
        save_image(torch.ones(1, 64, 64), tmp_path / "samples" / f"{i:04d}.png")
    save_image(torch.ones(1, 200, 200), tmp_path / "samples" / "grid.png")
    flags = {"run": str(tmp_path / "judge"), "pictures": str(tmp_path / "samples")}
    judge.main(judge.JudgeConfig(**flags, expect="春"))
    flat = capsys.readouterr().out.splitlines()
    assert len(flat) == 4 and flat[-1] == "named right: 0 of 3 = 0.0%"
    judge.main(judge.JudgeConfig(**flags))
    assert len(capsys.readouterr().out.splitlines()) == 3           # nothing expected, no share


def test_flags_that_make_no_sense(tmp_path):
    with pytest.raises(UserError, match="go together"):
        judge.main(judge.JudgeConfig(run="x"))
    with pytest.raises(UserError, match="--expect x"):
        judge.main(judge.JudgeConfig(run="x", pictures="y", expect="x"))
    with pytest.raises(UserError, match="kouzan-mouhitsu.ttf.*--fetch"):
        judge.main(judge.JudgeConfig(fonts=str(tmp_path / "none"), out=str(tmp_path / "out")))


def test_augment_changes_each_but_keeps_the_range():
    clean = CaptionedImages(CALLIGRAPHY).images()
    changed = judge.augment(clean, generator())
    assert changed.shape == clean.shape and changed.min() >= -1 and changed.max() <= 1
    assert torch.equal(changed, judge.augment(clean, generator()))
    twins = judge.augment(clean[:1].expand(5, -1, -1, -1), generator())
    assert len(twins.unique(dim=0)) == 5


def test_every_kind_of_nothing():
    clean = CaptionedImages(CALLIGRAPHY).images()[:16]
    made = judge.nothing(clean, clean.flip(0), generator())
    assert made.shape == clean.shape and made.min() >= -1 and made.max() <= 1
    assert made[3].std() < 1e-6                                                    # blank
    assert torch.allclose(made[4], (clean[4] + clean[11]) / 2)
    assert (made[5] <= clean[5]).all() and (made[6] >= clean[6]).all()           # overlaid; erased
    exact = judge.scramble(clean, 4, generator())
    assert torch.equal(exact.flatten(1).sort().values, clean.flatten(1).sort().values)      # the same pixels
    assert judge.scramble(clean, 3, generator()).shape == clean.shape


# -------------------------------------- the maker, with Pillow's own small Latin font in place of the brushes

@pytest.fixture
def latin(tmp_path):
    """A font file, and the same under another name: two names, one hand."""
    font = ImageFont.load_default(16)
    if not isinstance(font, ImageFont.FreeTypeFont):
        pytest.skip("this Pillow has no FreeType")
    for name in ("latin.ttf", "twin.ttf"):
        (tmp_path / name).write_bytes(font.path.getvalue())
    return tmp_path


def test_render_centres_the_ink_and_fits_it(latin):
    picture = make_calligraphy.render(latin / "latin.ttf", "A", 64)
    assert picture.shape == (64, 64) and picture.dtype == np.uint8 and picture[0, 0] == 255
    rows, columns = np.where(picture.min(1) < 128)[0], np.where(picture.min(0) < 128)[0]
    long_side = max(np.ptp(rows), np.ptp(columns)) + 1
    assert abs(long_side - 0.84 * 64) <= 2
    assert abs(rows[0] + rows[-1] - 63) <= 2 and abs(columns[0] + columns[-1] - 63) <= 2


def test_a_fixed_em_keeps_small_things_small(latin):
    ink = {c: (make_calligraphy.render(latin / "latin.ttf", c, 64, fixed_em=True) < 128).sum() for c in ".M"}
    assert 0 < ink["."] < ink["M"] / 5


def test_blank_and_missing_glyphs_are_not_drawn(latin):
    assert make_calligraphy.render(latin / "latin.ttf", " ") is None
    assert make_calligraphy.render(latin / "latin.ttf", "春") is None     # its box is ink, but no glyph


def test_one_hand_under_two_names_is_dropped(latin, capsys):
    hands = [f"a={latin / 'latin.ttf'}", f"b={latin / 'twin.ttf'}"]
    flags = ["--out", str(latin / "out"), "--characters", "AB春", "--size", "32", "--hands", *hands]
    assert make_calligraphy.main(flags) == 0
    said = capsys.readouterr().out
    assert "skipping b: draws the same glyphs as a" in said and "skipping 春: blank in a" in said
    assert [p.caption for p in list_captioned(latin / "out")] == ["A a", "B a"]
    assert Image.open(latin / "out" / "A" / "a.png").size == (32, 32)


@pytest.mark.parametrize("flags, words", [
    ([], "--out"),
    (["--out", "x", "--size", "4"], "--size 4"),
    (["--out", "x", "--common", "-1"], "--common -1"),
    (["--out", "x", "--characters", "../"], "--characters"),
    (["--out", "x", "--hands", "nobody"], "'nobody': not one of kouzan-kaisho"),
    (["--out", "x", "--fonts", "nowhere"], "kouzan-mouhitsu.ttf: not below nowhere.*--fetch"),
    (["--out", "x", "--fonts", "nowhere", "--common", "9"], "Unihan.*unicode-data"),
    (["--out", "x", "--hands", f"me={__file__}"], "not a font"),
])
def test_the_makers_errors(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MakerError, match=words):
        make_calligraphy.main(flags)
    assert not list(tmp_path.iterdir())                                           # and nothing was written


def test_the_committed_captions_are_the_makers():
    captions = [f"{c} {font.hand}" for c in make_calligraphy.CHARACTERS for font in make_calligraphy.FONTS]
    assert [picture.caption for picture in list_captioned(CALLIGRAPHY)] == captions
    hands = [font.hand for font in make_calligraphy.FONTS + make_calligraphy.MORE_FONTS]
    assert len(hands) == len(set(hands)) >= 13
