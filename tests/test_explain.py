"""--explain of train.sample: one page that holds all it shows, maps that are attention's, switches that leave
the model as it was, errors of one line."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from minidiff import LCMScheduler
from minidiff.objective import straight_paths
from minidiff.schedule import Sampler
from minidiff.text_to_image import ImageFormat, Preset, TextToImage, build_text_to_image
from minidiff.upscaler import build_upscaler
from tests.test_train_diffusion import fails
from train import explain, sample
from train.explain import attention_weights, data_of, recorded, skips_of, switched, switches
from train.sample import SampleConfig
from train.strokes import Scaling, build_stroke_writer

PROMPT, CAPTIONS = "春 楷書", ["春 楷書", "春 草書"]
STEPS = 3


def model(scheduler: Sampler | None = None, upscaler: bool = False) -> TextToImage:
    """Random weights, of which each part has a say in what is drawn."""
    torch.manual_seed(0)
    made = build_text_to_image(Preset((8, 16), (False, True), 1, 32, 1), ImageFormat(16, 1, 2), CAPTIONS,
                               scheduler).eval()
    made.upscaler = build_upscaler(1).eval() if upscaler else None
    return made


def distilled() -> Sampler:
    return LCMScheduler(prediction_type="v_prediction", original_inference_steps=5)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model(upscaler=True).save(tmp_path / "run" / "model")
    return tmp_path / "run"


def picture(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))


def grey(uri: str) -> Tensor:
    """[S, S] in 0 .. 255."""
    image = picture(uri)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, -1).float()


def levels(image: Tensor) -> Tensor:
    """[1, C, S, S] in -1 .. 1 -> [S, S] in 0 .. 255."""
    return ((image[0, 0].clamp(-1, 1) + 1) * 127.5).round()


# ------------------------------------------------------------------------------------------------------- page


def test_the_page_holds_all_that_it_shows(run: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "deep" / "page.html"
    sample.main(SampleConfig(run=str(run), prompt="春楷書", seed=7, steps=STEPS, explain=str(path),
                             out=str(tmp_path / "out"), device="cpu"))
    assert f"open {path}" in capsys.readouterr().out and not (tmp_path / "out").exists()
    page = path.read_text(encoding="utf-8")
    assert "<title>How 春 楷書 is written</title>" in page and "{{" not in page
    rest = page.replace("http://www.w3.org/2000/svg", "")
    assert not [word for word in ("http:", "https:", "//cdn", "<link", "@import", " src=\"") if word in rest]
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    drawn = levels(TextToImage.load(run / "model").sample([PROMPT], 7, STEPS, 1.5))
    assert (grey(data["picture"]) - drawn).abs().max() <= 1         # the faster layers round differently
    assert data["tokens"] == ["[begin]", "春", "楷書", "[end]"]
    assert data["places"] == ["down 1", "mid", "up 0"] and not data["live"]
    assert [frame["step"] for frame in data["frames"]] == [1, 2, 3]
    assert [g["w"] for g in data["guidances"]] == [0, 1, 1.5, 3, 5]
    assert len(data["code"]) == 11 and all("def " in code["source"] for code in data["code"])


def test_text_of_a_prompt_cannot_leave_its_place(tmp_path: Path) -> None:
    prompt = "</script><b>{{data}}"
    explain.explain(model(), prompt, tmp_path / "page.html", 0, 1, 1.0)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("</script>") == 2 and "<b>{{" not in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["prompt"] == prompt


def test_the_code_is_where_the_page_says(run: Path) -> None:
    root = Path(__file__).parent.parent
    for code in explain.code_of(model()):
        name, line = code["where"].split(":")
        lines = (root / name).read_text(encoding="utf-8").splitlines()
        assert lines[int(line) - 1].strip() == code["source"].splitlines()[0]


def test_no_page_is_larger_than_five_megabytes() -> None:
    """Whatever the size of pictures, the count of steps and of switches: before compression, as base64."""
    for shape, count in (((1, 64, 64), 25), ((3, 512, 512), 60)):
        like = torch.zeros(shape)
        strip = explain.side_within(explain.STRIP_BYTES, 3 * explain.FRAMES, like)
        others = explain.side_within(explain.DRAWN_BYTES, count, like)
        assert strip <= shape[1] and (3 * explain.FRAMES * strip**2 + count * others**2) * shape[0] <= 2.4e6
    assert (2.4e6 + explain.FRAMES * explain.TOKENS * 7 * explain.MAP_SIDE**2) * 4 / 3 < 4.8e6


# ---------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("scheduler, guided", [(None, True), (straight_paths(), True), (distilled(), False)],
                         ids=["diffusion", "flow", "distilled"])
def test_what_a_step_predicts_leads_to_the_picture(scheduler: Sampler | None, guided: bool) -> None:
    """x_t = alpha x0 + sigma eps, and the last x0 is what is drawn."""
    own = model(scheduler)
    with recorded(own.unet) as walk:
        drawn = own.sample([PROMPT], 3, STEPS, 2.5)
    assert len(walk) == STEPS and all(len(step.output) == 1 + guided for step in walk)
    last = explain.frame_of(own, walk[-1], 2.5, 16)
    apart = (grey(last["x0"]) - levels(drawn)).abs().max()
    assert apart <= (1 if guided else 3)                # LCM's c_skip keeps a little of x_t
    for step in walk:
        frame = explain.frame_of(own, step, 2.5, 16)
        assert frame["norms"]["x"] == pytest.approx(step.x_t.square().mean().sqrt().item())
        assert (frame["norms"]["difference"] is not None) == guided
    data = data_of(own, PROMPT, 3, STEPS, 2.5)
    assert bool(data["guidances"]) == guided and (data["guidance"] is not None) == guided
    assert all(g["difference"] == 0 for g in data["guidances"] if g["w"] == 2.5)


def test_steps_that_are_many_are_shown_evenly() -> None:
    frames = data_of(model(), PROMPT, 0, 90, 1.0)["frames"]
    assert len(frames) == explain.FRAMES and frames[0]["step"] == 1 and frames[-1]["step"] == 90


@torch.no_grad()
def test_maps_are_those_of_attention() -> None:
    """Each row sums to 1; with the values they give what the module gives."""
    own, seen = model(), []
    attention = own.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    handle = attention.register_forward_hook(lambda m, args, output: seen.append((args, output)))
    own.sample([PROMPT], 0, 2, 3.0)
    handle.remove()
    for (x, context, mask), output in seen:
        weights = attention_weights(attention, x, context, mask)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        mixed = weights @ attention.split(attention.to_v(context))
        torch.testing.assert_close(attention.to_out(mixed.transpose(1, 2).flatten(2)), output)
    masked = torch.zeros(2, 1, context.shape[1])
    masked[..., 0] = -10000.0
    assert attention_weights(attention, x, context, masked)[..., 0].max() == 0


def test_maps_on_the_page_share_out_all_attention() -> None:
    frame = data_of(model(), PROMPT, 0, 2, 1.5)["frames"][0]
    for found in frame["maps"]:
        shares = torch.frombuffer(bytearray(base64.b64decode(found["bytes"])), dtype=torch.uint8) / 255
        values = shares.view(4, found["side"], found["side"]) * torch.tensor(found["most"])[:, None, None]
        assert (values.sum(0) - 1).abs().max() < 0.02 and sum(found["mean"]) == pytest.approx(1, abs=1e-5)


def test_tokens_beyond_the_prompt_are_one() -> None:
    weights = torch.rand(16, 9).softmax(-1)
    found = explain.map_of(weights, 4)
    shares = weights.mean(0)
    assert found["mean"] == pytest.approx([*shares[:3].tolist(), shares[3:].sum().item()])
    assert explain.tokens_of(model(), "春")[1:] == ["春", "[end]", "[padding]"]


# --------------------------------------------------------------------------------------------------- switches


def test_each_part_that_is_off_changes_the_picture_and_comes_back() -> None:
    own = model()
    before = own.sample([PROMPT], 1, STEPS, 2.0)
    named = [(switch.kind, switch.at) for switch in switches(own.unet)]
    assert [at for kind, at in named if kind == "skip"] == skips_of(own.unet) == [
        "conv_in", "down 0, resnet 0", "down 0, halved", "down 1, resnet 0"]
    assert [at for kind, at in named if kind == "level"] == ["down 0", "down 1", "mid", "up 0", "up 1"]
    assert [at for kind, at in named if kind == "cross-attention"] == ["all", "down 1", "mid", "up 0"]
    for switch in switches(own.unet):
        with switched(switch):
            assert not torch.equal(own.sample([PROMPT], 1, STEPS, 2.0), before), switch
        assert torch.equal(own.sample([PROMPT], 1, STEPS, 2.0), before), switch
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())


def test_hooks_go_when_something_fails() -> None:
    own = model()
    with pytest.raises(KeyboardInterrupt), recorded(own.unet), switched(switches(own.unet)[0]):
        raise KeyboardInterrupt
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in own.modules())


@torch.no_grad()
def test_what_is_off_is_off() -> None:
    """A zeroed skip is one that cannot be seen; without cross-attention all prompts are one; a middle that
    is off is the identity."""
    own = model()
    off = {(s.kind, s.at): s for s in switches(own.unet)}
    with switched(off["cross-attention", "all"]):
        assert torch.equal(own.sample([PROMPT], 1, STEPS), own.sample(["春 草書"], 1, STEPS))
    assert not torch.equal(own.sample([PROMPT], 1, STEPS), own.sample(["春 草書"], 1, STEPS))
    seen = []
    handle = own.unet.mid_block.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    with switched(off["level", "mid"]):
        own.sample([PROMPT], 1, 1)
    handle.remove()
    assert all(torch.equal(given, output) for given, output in seen)
    handle = own.unet.up_blocks[1].resnets[1].register_forward_pre_hook(
        lambda m, args: seen.append(args[0][:, -8:]))       # conv_in's map is the last that is concatenated
    with switched(off["skip", "conv_in"]):
        own.sample([PROMPT], 1, 1)
    handle.remove()
    assert seen[-1].abs().max() == 0


def test_the_u_names_every_switch_once() -> None:
    own = model()
    rows = explain.levels_of(own.unet, own.latent_shape[1])
    assert [row["side"] for row in rows] == [8, 4] and [row["up"] for row in rows] == ["up 1", "up 0"]
    assert [row["skips"] for row in rows] == [["conv_in", "down 0, resnet 0"],
                                              ["down 0, halved", "down 1, resnet 0"]]
    assert rows[1]["attends"] == [True, True] and rows[0]["attends"] == [False, False]


# ----------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_explained_is_one_line(run: Path, tmp_path: Path, capsys) -> None:
    cfg = SampleConfig(run=str(run), prompt=PROMPT, steps=1, explain=str(tmp_path), device="cpu")
    assert f"--explain {tmp_path}: is a folder" in fails(sample.main, cfg, capsys)
    scaling = Scaling(torch.zeros(31), torch.ones(31), 5)
    build_stroke_writer(scaling, ["春 楷書"]).save(tmp_path / "strokes" / "model")
    cfg = SampleConfig(run=str(tmp_path / "strokes"), prompt=PROMPT, explain=str(tmp_path / "page.html"),
                       device="cpu")
    assert "--explain: this run writes strokes" in fails(sample.main, cfg, capsys)
    assert not (tmp_path / "page.html").exists()
