"""docs/quirks.md: every file, name and test on the page exists, its figures are measured, and what no other
test pins is pinned here.

    python -m tests.test_quirks         # prints the table "What a mistake costs"
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import CLIPConfig, CLIPVisionConfig, CLIPVisionModel
from miniclip.model import quick_gelu
from minidiff import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from minidiff.attention import GEGLU, Attention, Transformer2DModel
from minidiff.embeddings import sinusoids
from minidiff.resnet import Downsample2D, ResnetBlock2D
from minidiff.unet import bias

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "quirks.md").read_text(encoding="utf-8")
SECTIONS = {text.split("\n")[0]: text for text in re.split(r"^### ", PAGE, flags=re.M)[1:]}
SMALL = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 24,
         "attention_head_dim": 2,
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1,
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# -------------------------------------------------------------------------------------------------- the page


def names_in(path: Path) -> set[str]:
    """Functions, classes, their methods and fields, and module variables of a file."""
    found = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, prefix + node.name + ".")
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Name):
                    found.add(prefix + target.id)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def missing(places: list[tuple[str, str]]) -> list[str]:
    """Those (file, name) that are not there."""
    known = {file: names_in(ROOT / file) if (ROOT / file).is_file() else set() for file, _ in places}
    return [f"{file}: {name}" for file, name in places if name not in known[file]]


@pytest.mark.parametrize("title", SECTIONS)
def test_a_quirk_names_upstream_our_place_a_reason_and_a_test(title: str) -> None:
    section = SECTIONS[title]
    for label in ("Upstream", "Here", "Stays because", "Pinned by"):
        assert f"\n- {label}" in section, label
    here = re.search(r"^- Here: (.*(?:\n  .*)*)", section, flags=re.M).group(1)
    places = re.findall(r"`([\w/]+\.py)`\s+`([\w.]+)`", here)
    assert places and not missing(places)
    pinned = re.search(r"^- Pinned by (.*(?:\n  .*)*)", section, flags=re.M).group(1)
    assert re.search(r"`tests/[\w/]+\.py::\w+`", pinned)


def test_every_test_and_file_of_the_page_exists() -> None:
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(SECTIONS) >= 25 and len(tests) >= 40 and not missing(tests)
    for file in re.findall(r"`((?:minidiff|miniclip|train|data|tests|docs)/[\w/.-]+)`", PAGE):
        assert (ROOT / file).exists(), file


def test_what_differs_on_purpose_is_held_by_a_test() -> None:
    rows = PAGE.split("## Where we differ from upstream on purpose")[1].split("\n|")[3:]
    assert len(rows) >= 11
    assert all(re.search(r"`tests/[\w/]+\.py::\w+` \|$", row.split("\n")[0]) for row in rows), rows


# ----------------------------------------------------------------------------------------------- the figures


@contextmanager
def swapped(owner: type, name: str, function: Callable) -> Iterator[None]:
    """An attribute, replaced for a while."""
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)


def gate_first(self: GEGLU, x: Tensor) -> Tensor:
    gate, value = self.proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate)


def gate_by_tanh(self: GEGLU, x: Tensor) -> Tensor:
    value, gate = self.proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate, approximate="tanh")


def mistakes() -> dict[str, float]:
    """The largest change of a small random UNet's output, as a share of its largest number, in float64."""
    torch.manual_seed(0)
    right = UNet2DConditionModel(**SMALL).double().eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64)
    text = torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)

    def run(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
        with torch.no_grad():
            return model.to(dtype)(x.to(dtype), torch.tensor([7, 700]), text.to(dtype)).sample.double()

    def changed(**fields) -> UNet2DConditionModel:
        model = UNet2DConditionModel(**{**SMALL, **fields}).eval()
        model.load_state_dict(right.state_dict())
        return model.double()

    wide = changed()
    for module in wide.modules():
        if isinstance(module, Transformer2DModel):
            module.norm.eps = 1e-5
    found = {"`downsample_padding` 0 in place of 1": run(changed(downsample_padding=0)),
             "sines before cosines": run(changed(flip_sin_to_cos=False)),
             "`freq_shift` 1 in place of 0": run(changed(freq_shift=1)),
             "twice as many heads": run(changed(attention_head_dim=4)),
             "resnets' eps 1e-6 in place of 1e-5": run(changed(norm_eps=1e-6)),
             "the transformer's GroupNorm eps 1e-5 in place of 1e-6": run(wide)}
    for name, forward in (("GEGLU's halves swapped", gate_first), ("GELU by tanh in GEGLU", gate_by_tanh)):
        with swapped(GEGLU, "forward", forward):
            found[name] = run(right)
    found["no mistake, float32"] = run(changed(), torch.float32)
    truth = run(right)
    return {name: ((y - truth).abs().max() / truth.abs().max()).item() for name, y in found.items()}


def table() -> str:
    """The table of the page, the worst first."""
    rows = sorted(mistakes().items(), key=lambda row: -row[1])
    return "\n".join(["| mistake | change of the output |", "|---|---|",
                      *(f"| {name} | {value:.1e} |" for name, value in rows)])


def test_what_a_mistake_costs() -> None:
    """The page's figures; float32's own error may differ by machine."""
    stated = {name: float(value) for name, value in re.findall(r"^\| (.+) \| (\d\.\de-\d\d) \|$", PAGE, re.M)}
    found = mistakes()
    assert stated.keys() == found.keys()
    noise = stated.pop("no mistake, float32")
    assert found["no mistake, float32"] < 5e-6 and noise < 5e-6
    for name, value in stated.items():
        assert value == pytest.approx(found[name], rel=0.1), name
    assert sum(value < 1e-4 for value in stated.values()) == 2      # as the page says


# ---------------------------------------------------------------------------------- quirks pinned here alone


def small(**more) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**SMALL, **more}).eval()


def output(model: UNet2DConditionModel, **more) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 24, generator=generator)
    with torch.no_grad():
        return model(x, 5, text, **more).sample


def test_attention_head_dim_counts_heads() -> None:
    attention = small(attention_head_dim=4).mid_block.attentions[0].transformer_blocks[0].attn1
    assert attention.heads == 4 and attention.split(torch.zeros(1, 6, 32)).shape == (1, 4, 6, 8)


def test_three_different_eps() -> None:
    unet = small(norm_eps=3e-4)
    kinds: dict[type, set[float]] = {nn.GroupNorm: set(), nn.LayerNorm: set()}
    inside = [m for t in unet.modules() if isinstance(t, Transformer2DModel) for m in t.modules()]
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm) and module not in inside:
            kinds[nn.GroupNorm].add(module.eps)
    assert kinds[nn.GroupNorm] == {3e-4}                                    # follows the config
    assert {m.eps for m in inside if isinstance(m, nn.GroupNorm)} == {1e-6}     # does not
    assert {m.eps for m in inside if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert small().conv_norm_out.eps == 1e-5
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                            up_block_types=("UpDecoderBlock2D",) * 2)
    assert {m.eps for m in vae.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}


def test_cosines_come_first_and_the_shift_moves_the_last_frequency() -> None:
    t = torch.tensor([0, 3])
    row = sinusoids(t, 8)
    assert row[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]                      # cos 0, then sin 0
    assert sinusoids(t, 8, flip_sin_to_cos=False)[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    slowest = torch.tensor([3 * 10000 ** -0.75, 3 * 10000 ** -1.0]).cos()   # i / half, and i / (half - 1)
    assert torch.allclose(torch.stack([row[1, 3], sinusoids(t, 8, freq_shift=1)[1, 3]]), slowest)
    assert sinusoids(t.double(), 8).dtype == torch.float32                  # whatever comes in


def test_the_second_half_of_geglu_is_the_gate() -> None:
    layer = GEGLU(2, 3).double()
    x = torch.randn(1, 5, 2, dtype=torch.float64)
    value, gate = layer.proj(x)[..., :3], layer.proj(x)[..., 3:]
    exact = value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    assert torch.allclose(layer(x), exact, atol=1e-15, rtol=0)


def test_the_time_embedding_passes_silu_twice() -> None:
    """Once inside its MLP, once more in each block; the sinusoids and the sum with labels do not."""
    block = ResnetBlock2D(8, 8, 16, groups=4)
    nn.init.zeros_(block.conv1.weight), nn.init.zeros_(block.conv1.bias)
    seen = []
    block.norm2.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    temb = torch.randn(1, 16)
    block(torch.zeros(1, 8, 2, 2), temb)
    assert torch.equal(seen[0][0, :, 0, 0], block.time_emb_proj(F.silu(temb))[0])


def test_the_vae_pads_below_and_to_the_right_only() -> None:
    x = torch.randn(1, 3, 6, 6)
    torch.manual_seed(0)
    vae, unet = Downsample2D(3, padding=0), Downsample2D(3, padding=1)
    unet.load_state_dict(vae.state_dict())
    grown = F.conv2d(F.pad(x, (0, 1, 0, 1)), vae.conv.weight, vae.conv.bias, stride=2)
    assert torch.equal(vae(x), grown) and vae(x).shape == unet(x).shape
    assert not torch.allclose(vae(x), unet(x), atol=1e-2)


def test_only_the_middle_is_scaled_and_only_resnets_drop_out() -> None:
    unet = small(mid_block_scale_factor=2.0, dropout=0.5)
    scales = {name: m.output_scale_factor for name, m in unet.named_modules() if isinstance(m, ResnetBlock2D)}
    assert {s for name, s in scales.items() if name.startswith("mid_block")} == {2.0}
    assert {s for name, s in scales.items() if not name.startswith("mid_block")} == {1.0}
    drops = {name: m.p for name, m in unet.named_modules() if isinstance(m, nn.Dropout)}
    assert {p for name, p in drops.items() if "transformer_blocks" in name} == {0.0}
    assert {p for name, p in drops.items() if "transformer_blocks" not in name} == {0.5}


def test_biases_of_attention() -> None:
    unet = small().mid_block.attentions[0].transformer_blocks[0].attn2
    assert unet.to_q.bias is unet.to_k.bias is unet.to_v.bias is None and unet.to_out[0].bias is not None
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",),
                            up_block_types=("UpDecoderBlock2D",))
    attention = vae.encoder.mid_block.attentions[0]
    assert all(getattr(attention, name).bias is not None for name in ("to_q", "to_k", "to_v"))


def test_a_mask_subtracts_ten_thousand() -> None:
    assert bias(torch.tensor([[1, 0]]), torch.zeros(1)).tolist() == [[[0.0, -10000.0]]]
    # so a text of which nothing may be seen is one of which all is seen, and not NaN
    torch.manual_seed(0)
    layer, x, text = Attention(8, 4, heads=2).double(), torch.randn(1, 3, 8), torch.randn(1, 5, 4)
    x, text = x.double(), text.double()
    assert torch.allclose(layer(x, text, bias(torch.zeros(1, 5), x)), layer(x, text), atol=1e-10)


def test_what_is_accepted_and_changes_nothing() -> None:
    plain = output(small())
    assert torch.equal(plain, output(small(upcast_attention=True)))
    assert torch.equal(plain, output(small(), class_labels=torch.tensor([1, 2])))


def test_the_depth_of_a_level_that_does_not_attend_is_not_read() -> None:
    """SDXL's config says [1, 2, 10], its paper [0, 2, 10]: the first level has no transformer."""
    one, nine = (small(transformer_layers_per_block=(n, 1)) for n in (1, 9))
    assert list(one.state_dict()) == list(nine.state_dict()) and torch.equal(output(one), output(nine))


def test_stable_diffusions_schedule_never_reaches_noise() -> None:
    def left(**fields) -> float:
        return DDPMScheduler(**fields).alphas_cumprod[-1].sqrt().item()

    assert left(**STABLE_DIFFUSION) == pytest.approx(0.0683, abs=5e-5)
    assert left() == pytest.approx(0.0064, abs=5e-5)
    assert left(**STABLE_DIFFUSION, rescale_betas_zero_snr=True) == 0


def test_the_last_step_of_ddim_leaves_a_little_noise() -> None:
    """Stable Diffusion's set_alpha_to_one = False, steps_offset = 1: t = 1 steps below 0, to alpha_bar_0."""
    given = {**STABLE_DIFFUSION, "clip_sample": False, "steps_offset": 1}
    kept, gone = (DDIMScheduler(**given, set_alpha_to_one=one) for one in (False, True))
    x, eps = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = []
    for ddim in (kept, gone):
        ddim.set_timesteps(50)
        assert ddim.timesteps[-1] == 1
        out = ddim.step(eps, 1, x)
        ends.append((out.prev_sample, out.pred_original_sample))
    a = kept.alphas_cumprod[0].double()
    assert torch.allclose(ends[0][0], a.sqrt() * ends[0][1] + (1 - a).sqrt() * eps, atol=1e-6)
    assert torch.allclose(ends[1][0], ends[1][1], atol=1e-12)
    assert (1 - a).sqrt().item() == pytest.approx(0.029, abs=5e-4)


def test_ddim_clips_x0_and_keeps_the_noise_of_the_unclipped_one() -> None:
    ddim = DDIMScheduler()
    ddim.set_timesteps(10)
    x, eps = torch.full((1, 1, 1, 1), 3.0), torch.zeros(1, 1, 1, 1)
    before = ddim.alphas_cumprod[400]
    as_upstream, consistent = (ddim.step(eps, 500, x, use_clipped_model_output=on).prev_sample
                               for on in (False, True))
    assert torch.allclose(as_upstream, before.sqrt() * torch.ones(1))       # x0 = 1, eps = 0
    a = ddim.alphas_cumprod[500]
    assert torch.allclose(consistent, before.sqrt() + (1 - before).sqrt() * (3 - a.sqrt()) / (1 - a).sqrt())


def test_noise_levels_are_rounded_before_the_root() -> None:
    scheduler = DDPMScheduler(**STABLE_DIFFUSION)
    one, t = torch.ones(1, 1, 1, 1, dtype=torch.float16), torch.tensor([0])
    noised = scheduler.add_noise(0 * one, one, t).item()
    alpha_bar = scheduler.alphas_cumprod[0]
    assert noised == (1 - alpha_bar.half()).sqrt().item() != (1 - alpha_bar).sqrt().half().item()


def test_an_unknown_variance_is_the_small_one() -> None:
    known, unknown = (DDPMScheduler(variance_type=name) for name in ("fixed_small", "anything"))
    assert known._get_variance(500) == unknown._get_variance(500)


def test_quick_gelu_is_not_gelu() -> None:
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    assert (quick_gelu(x) - F.gelu(x)).abs().max().item() == pytest.approx(0.0203, abs=5e-5)
    assert (F.gelu(x, approximate="tanh") - F.gelu(x)).abs().max().item() == pytest.approx(4.7e-4, abs=5e-6)
    assert CLIPVisionConfig().hidden_act == "quick_gelu"


def test_a_norm_before_and_one_for_the_class_token_alone() -> None:
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                             num_attention_heads=2, image_size=8, patch_size=4)).vision_model
    out = tower(torch.randn(1, 3, 8, 8), output_hidden_states=True)
    assert "pre_layrnorm.weight" in tower.state_dict() and "pre_layernorm.weight" not in tower.state_dict()
    assert torch.allclose(out.hidden_states[0].mean(-1), torch.zeros(1, 5), atol=1e-5)      # normed before
    assert torch.equal(out.pooler_output, tower.post_layernorm(out.last_hidden_state[:, 0]))
    assert not torch.allclose(out.last_hidden_state[:, 0], out.pooler_output, atol=1e-3)    # but not after


def test_the_first_temperature_is_rounded() -> None:
    scale = CLIPConfig().logit_scale_init_value
    exact = torch.tensor(1 / 0.07, dtype=torch.float64).log().item()
    assert scale == 2.6592 and 5e-5 < exact - scale < 7e-5


if __name__ == "__main__":
    print(table())
