"""optimize: the same answers, whatever the shape; the plain path where it has to be; nothing stale."""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import CLIPModel, CLIPTextModel, CLIPVisionModel
from miniclip.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from minidiff import AutoencoderKL, UNet2DConditionModel, optimize
from minidiff.lora import FILE, LoRALinear
from minidiff.optimize import Faster, PackedConv2d, PackedLinear, TextLinear, operators_work
from minidiff.resnet import Upsample2D
from minidiff.text_to_image import PRESETS, ImageFormat, build_text_to_image
from tests.test_lora import teach
from tests.test_minidiff_pipeline import draw, make
from train.lora import add_lora, save_lora

code = sys.modules["minidiff.optimize"]             # the name of the module is the function's as well
SMALL = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 24,
         "attention_head_dim": 4, "layers_per_block": 1}
CROSS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
UNETS = {
    "SD 1": {**SMALL, **CROSS},
    "SD 2": {**SMALL, **CROSS, "use_linear_projection": True, "transformer_layers_per_block": (1, 2)},
    "text alone": {**SMALL, **CROSS, "only_cross_attention": (True, True)},
    "no text": {**SMALL, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
                "mid_block_type": "UNetMidBlock2D"},
    "SDXL": {**SMALL, **CROSS, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
             "projection_class_embeddings_input_dim": 64},
}
SMALLEST = {"CHANNELS": 10, "CHANNELS_DOUBLED": 10, "SQUARES": 4, "BAND": 12, "ROWS": 2, "WORK": 1}
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def every_layer_its_fast_path(monkeypatch: pytest.MonkeyPatch):
    """Small models are below the sizes from which on it pays."""
    for name, value in SMALLEST.items():
        monkeypatch.setattr(code, name, value)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def pair(model: nn.Module, **options) -> tuple[nn.Module, nn.Module]:
    """A model, and an optimized copy of it."""
    model = model.eval()
    return model, optimize(copy.deepcopy(model), **options)


def assert_close(mine: Tensor, plain: Tensor, most: float = 1e-5) -> None:
    assert mine.shape == plain.shape and mine.dtype == plain.dtype
    assert float((mine - plain).norm()) <= most * float(plain.norm())


def inputs(unet: UNet2DConditionModel, batch: int = 2, size: tuple[int, int] = (16, 16),
           dtype: torch.dtype = torch.float32) -> dict:
    c = unet.config
    found = {"sample": torch.randn(batch, 4, *size), "timestep": torch.arange(batch) * 300,
             "encoder_hidden_states": torch.randn(batch, 7, 24)}
    if c.addition_embed_type == "text_time":
        found["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 16).to(dtype),
                                      "time_ids": torch.rand(batch, 6)}
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in found.items()}


def vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
                         down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2)


def text_config() -> CLIPTextConfig:
    return CLIPTextConfig(**TOWER, vocab_size=50, max_position_embeddings=8, eos_token_id=49)


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(**TOWER, image_size=32, patch_size=8)


# ------------------------------------------------------------------------------------------- the same answers


@pytest.mark.parametrize("winograd", [True, False])
@pytest.mark.parametrize("batch, size", [(1, (16, 16)), (2, (17, 13)), (3, (9, 22))])
@pytest.mark.parametrize("kind", UNETS)
def test_unet(kind: str, batch: int, size: tuple[int, int], winograd: bool) -> None:
    plain, fast = pair(UNet2DConditionModel(**UNETS[kind]), winograd=winograd)
    given = inputs(plain, batch, size)
    for _ in range(2):                              # the second time from what was kept
        out = fast(**given).sample
        assert_close(out, plain(**given).sample)
    assert out.is_contiguous()                      # as users' .view() wants it
    made = [set(m.made) for m in fast.modules() if isinstance(m, PackedConv2d)]
    assert any("winograd" in names for names in made) == winograd


@pytest.mark.parametrize("batch, size", [(1, (16, 16)), (2, (18, 10)), (3, (13, 7))])
def test_vae(batch: int, size: tuple[int, int]) -> None:
    plain, fast = pair(vae())
    picture, latents = torch.randn(batch, 3, *size), torch.randn(batch, 4, *size)
    mine, wanted = fast.encode(picture).latent_dist, plain.encode(picture).latent_dist
    assert_close(mine.parameters, wanted.parameters)
    assert mine.parameters.is_contiguous()
    assert_close(fast.decode(latents).sample, plain.decode(latents).sample)
    for model in (plain, fast):
        model.enable_tiling()
        model.enable_slicing()
    assert_close(fast.decode(latents).sample, plain.decode(latents).sample)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_clip(batch: int) -> None:
    config = CLIPConfig(text_config=text_config().to_dict(), vision_config=vision_config().to_dict(),
                        projection_dim=16)
    ids, pictures = torch.randint(49, (batch, 7)), torch.randn(batch, 3, 32, 32)
    plain, fast = pair(CLIPModel(config))
    mine, wanted = fast(ids, pictures), plain(ids, pictures)
    assert_close(mine.logits_per_image, wanted.logits_per_image)
    mine, wanted = (m.get_text_features(ids, output_attentions=True) for m in (fast, plain))
    assert_close(mine.pooler_output, wanted.pooler_output)
    assert_close(mine.attentions[1], wanted.attentions[1])
    for model, given in ((CLIPTextModel(text_config()), ids), (CLIPVisionModel(vision_config()), pictures)):
        plain, fast = pair(model)
        assert_close(fast(given).last_hidden_state, plain(given).last_hidden_state)


def test_text_to_image() -> None:
    plain, fast = pair(build_text_to_image(PRESETS["tiny"], ImageFormat(32, 1, 2), ["春 草書", "夏"]))
    assert_close(fast.sample(["春", "夏"], steps=3), plain.sample(["春", "夏"], steps=3))


@pytest.mark.parametrize("options", [{"bias": False}, {"stride": 2}, {"padding": 0}, {"padding": (0, 1)},
                                     {"dilation": 2}, {"groups": 4}, {"padding": "same"},
                                     {"padding_mode": "reflect"}])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolution(options: dict, kernel: int) -> None:
    plain, fast = pair(nn.Conv2d(24, 40, kernel, **{"padding": kernel // 2, **options}))
    for x in (torch.randn(2, 24, 11, 9), torch.randn(1, 24, 8, 8).to(memory_format=torch.channels_last),
              torch.randn(2, 8, 8, 24).permute(0, 3, 2, 1), torch.randn(24, 8, 8),
              torch.randn(0, 24, 8, 8)):
        assert_close(fast(x), plain(x), 2e-6)
    with pytest.raises(RuntimeError, match="channels"):
        fast(torch.randn(1, 23, 8, 8))


@pytest.mark.parametrize("size", [None, (12, 10), (11, 10), (5, 6)])
def test_upsampling(size: tuple[int, int] | None) -> None:
    plain, fast = pair(Upsample2D(24))
    x = torch.randn(2, 24, 6, 5)
    assert_close(fast(x, size), plain(x, size), 2e-6)
    assert list(fast.conv.made) == (["doubled"] if size in (None, (12, 10)) else ["winograd"])


@pytest.mark.parametrize("shape", [(3, 24), (2, 7, 24), (2, 3, 5, 24), (24,), (1, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    plain, fast = pair(nn.Linear(24, 40, bias))
    for x in (torch.randn(shape), torch.randn(*shape[:-1], 48)[..., ::2], torch.randn(24, *shape[:-1]).T
              if len(shape) == 2 else torch.randn(shape)):
        assert_close(fast(x), plain(x), 2e-6)


def test_shapes_that_do_not_fit_raise_as_before() -> None:
    for layer, x in ((nn.Linear(8, 8), torch.randn(4, 7)), (nn.Conv2d(8, 8, 1), torch.randn(1, 7, 8, 8)),
                     (Upsample2D(24), torch.randn(1, 23, 8, 8))):
        plain, fast = pair(layer)
        messages = []
        for model in (plain, fast):
            with pytest.raises(RuntimeError) as raised:
                model(x)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


def test_a_hook_on_a_convolution_is_called() -> None:
    fast, seen = optimize(Upsample2D(24)), []
    fast.conv.register_forward_hook(lambda *_: seen.append(1))
    fast(torch.randn(1, 24, 4, 4))
    assert seen


@pytest.mark.parametrize("size", [64, 256])
def test_norms_of_large_maps_stay_exact(size: int) -> None:
    norm = optimize(nn.GroupNorm(2, 32))
    x = torch.randn(1, 32, size, size).to(memory_format=torch.channels_last) + 1
    assert_close(norm(x), F.group_norm(x.double(), 2).float(), 1e-6)


def test_winograd_is_as_exact_as_the_definition() -> None:
    """Beside float64, on the channel counts where it runs."""
    conv, x = nn.Conv2d(320, 320, 3, padding=1), torch.randn(1, 320, 16, 16)
    wanted = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1).float()
    error = [float((y - wanted).norm()) for y in (optimize(copy.deepcopy(conv))(x), conv(x))]
    assert error[0] < 2 * error[1]


# -------------------------------------------------------------------------------------------- same interface


def test_the_state_dict_is_the_same_object_for_object() -> None:
    model = UNet2DConditionModel(**UNETS["SD 1"])
    before, modules = model.state_dict(keep_vars=True), dict(model.named_modules())
    assert optimize(model) is model
    model(**inputs(model))
    after = model.state_dict(keep_vars=True)
    assert list(before) == list(after) and all(before[key] is after[key] for key in before)
    assert list(modules) == [name for name, _ in model.named_modules()]
    assert all(model.get_submodule(name) is module for name, module in modules.items())


@pytest.mark.parametrize("assign", [True, False])
def test_new_weights_are_used(assign: bool) -> None:
    plain, fast = pair(UNet2DConditionModel(**UNETS["SD 1"]))
    given = inputs(plain)
    fast(**given)
    plain = UNet2DConditionModel(**UNETS["SD 1"]).eval()
    fast.load_state_dict(copy.deepcopy(plain.state_dict()), assign=assign)
    assert_close(fast(**given).sample, plain(**given).sample)
    for model in (plain, fast):
        model.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v.weight.mul_(3)
        model.up_blocks[0].upsamplers[0].conv.weight.mul_(2)
        model.conv_in.weight.data = model.conv_in.weight.data * 0.5
        model.conv_out.bias.add_(1)
    assert_close(fast(**given).sample, plain(**given).sample)


def test_another_weight_at_the_same_address() -> None:
    plain, fast = pair(nn.Linear(24, 24))
    x = torch.randn(5, 24)
    fast(x)
    fast.weight = nn.Parameter(fast.weight.detach().T)
    assert_close(fast(x), F.linear(x, plain.weight.T, plain.bias), 2e-6)


def test_moved_and_back() -> None:
    plain, fast = pair(UNet2DConditionModel(**UNETS["SD 2"]))
    given = inputs(plain)
    fast(**given)
    plain, fast = plain.double(), fast.double()
    assert not any(m.made for m in fast.modules() if isinstance(m, Faster))
    given64 = inputs(plain, dtype=torch.float64)
    assert torch.equal(fast(**given64).sample, plain(**given64).sample)         # the plain path itself
    plain, fast = plain.float(), fast.float()
    assert_close(fast(**given).sample, plain(**given).sample)
    assert torch.equal(fast.bfloat16()(**inputs(fast, dtype=torch.bfloat16)).sample.isfinite(),
                       torch.ones(2, 4, 16, 16, dtype=torch.bool))


def test_copied_and_pickled() -> None:
    plain, fast = pair(UNet2DConditionModel(**UNETS["SD 1"]))
    given = inputs(plain)
    fast(**given)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for twin in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert not any(m.made for m in twin.modules() if isinstance(m, Faster))
        assert all(m.text.known is None for m in twin.modules() if isinstance(m, TextLinear))
        assert_close(twin(**given).sample, plain(**given).sample)
        texts = {id(m.text) for m in twin.modules() if isinstance(m, TextLinear)}
        assert len(texts) == 1 and texts.isdisjoint(id(m.text) for m in fast.modules()
                                                    if isinstance(m, TextLinear))


def test_it_trains_as_before() -> None:
    plain, fast = pair(UNet2DConditionModel(**UNETS["SD 1"]))
    given = inputs(plain)
    fast(**given)
    for model in (plain.train(), fast.train()):
        with torch.enable_grad():
            model(**given).sample.square().mean().backward()
            torch.optim.SGD(model.parameters(), 0.1).step()
    for mine, wanted in zip(fast.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, wanted)
    assert_close(fast(**given).sample, plain(**given).sample)       # with the new weights


def test_inputs_get_gradients_of_a_frozen_model() -> None:
    _, fast = pair(UNet2DConditionModel(**UNETS["SD 1"]))
    fast.requires_grad_(False)
    given = inputs(fast)
    with torch.enable_grad():
        given["encoder_hidden_states"].requires_grad_()
        fast(**given).sample.sum().backward()
    assert given["encoder_hidden_states"].grad.abs().sum() > 0


def test_inference_mode_and_autocast() -> None:
    plain, fast = pair(UNet2DConditionModel(**UNETS["SD 1"]))
    given = inputs(plain)
    with torch.inference_mode():
        here = inputs(plain)
        assert_close(fast(**here).sample, plain(**here).sample)
        here["encoder_hidden_states"].mul_(2)                       # which no version counts
        assert_close(fast(**here).sample, plain(**here).sample)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(**given).sample, plain(**given).sample)


def test_lora_in_an_optimized_model() -> None:
    plain, fast = pair(UNet2DConditionModel(**UNETS["SD 1"]))
    given = inputs(plain)
    fast(**given)
    for model in (plain, fast):
        attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2
        torch.manual_seed(1)
        layer = attention.to_k = LoRALinear(attention.to_k, 2, 1.0)
        nn.init.normal_(layer.lora_B.weight)
    assert_close(fast(**given).sample, plain(**given).sample)


def test_twice_is_once_and_forgets() -> None:
    plain, fast = pair(UNet2DConditionModel(**UNETS["SD 1"]))
    given = inputs(plain)
    fast(**given)
    for model in (plain, fast):
        model.conv_in.weight.data.mul_(2)                           # unseen, as the docstring says
    assert_close(optimize(fast)(**given).sample, plain(**given).sample)


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="optimize takes a model, not dict: of a pipeline, its parts"):
        optimize({})


# -------------------------------------------------------------------------------------------------- fallbacks


PACK, RUN = (torch._C._nn, "mkldnn_reorder_conv2d_weight"), (torch.ops.mkldnn, "_convolution_pointwise")


@pytest.mark.parametrize("owner, name, how", [(*PACK, "absent"), (*PACK, "fails"), (*RUN, "absent"),
                                              (*RUN, "fails"), (*RUN, "wrong")])
def test_without_the_operators(owner: object, name: str, how: str,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators_work()

    def fails(*args):
        raise RuntimeError("not on this CPU")

    if how == "absent":
        monkeypatch.setattr(code.torch, "ops", Without(torch.ops, name))
        monkeypatch.setattr(code.torch, "_C", Without(torch._C, name))
    else:
        monkeypatch.setattr(owner, name, fails if how == "fails" else lambda x, *args: x)
    plain, fast = pair(UNet2DConditionModel(**UNETS["SD 1"]), winograd=False)
    given = inputs(plain)
    assert not any(m.packs for m in fast.modules() if isinstance(m, Faster))
    assert torch.equal(fast(**given).sample, plain(**given).sample)
    fast = optimize(copy.deepcopy(plain))
    assert_close(fast(**given).sample, plain(**given).sample)       # Winograd needs none of them


class Without:
    """An object, at any depth, that lacks a name."""

    def __init__(self, inner: object, name: str):
        self.inner, self.name = inner, name

    def __getattr__(self, key: str):
        if key == self.name:
            raise AttributeError(key)
        found = getattr(self.inner, key)
        return Without(found, self.name) if key in ("mkldnn", "_nn") else found


def test_switched_off() -> None:
    plain, fast = pair(vae())
    z = torch.randn(1, 4, 8, 8)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(fast.decode(z).sample, plain.decode(z).sample)


# ------------------------------------------------------------------------------------------- keys and values


def count_text_products(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each projection of a text."""
    calls, plain = [], PackedLinear.forward

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self, TextLinear):
            calls.append(1)
        return plain(self, x)

    monkeypatch.setattr(PackedLinear, "forward", forward)
    return calls


@pytest.mark.parametrize("kind", ["SD 1", "SD 2", "text alone"])
def test_a_text_is_projected_once_and_never_stale(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pair(UNet2DConditionModel(**UNETS[kind]))
    calls, given = count_text_products(fast, monkeypatch), inputs(plain)
    text = given["encoder_hidden_states"]
    layers = sum(isinstance(m, TextLinear) for m in fast.modules())

    def projections() -> int:
        calls.clear()
        assert_close(fast(**given).sample, plain(**given).sample)
        return len(calls)

    assert layers > 0 and projections() == layers and projections() == 0
    given["encoder_hidden_states"] = text.clone()                   # another object, the same text
    assert projections() == 0
    given["encoder_hidden_states"] = torch.randn_like(text)         # another text
    assert projections() == layers
    given["encoder_hidden_states"][1, 6, 23] += 1                   # one number, in place
    assert projections() == layers
    given["encoder_hidden_states"].data[0, 0, 0] += 1               # behind autograd's back
    assert projections() == layers
    given = inputs(plain, batch=1)
    assert projections() == layers


def test_two_models_do_not_share_a_text() -> None:
    (plain, fast), other = pair(UNet2DConditionModel(**UNETS["SD 1"])), UNet2DConditionModel(**UNETS["SD 1"])
    given = inputs(plain)
    optimize(other)(**given)
    assert_close(fast(**given).sample, plain(**given).sample)


# ------------------------------------------------------------------------------------------ a whole pipeline


@pytest.mark.parametrize("xl", [False, True])
def test_the_pictures_of_an_optimized_pipeline_are_the_same(xl: bool) -> None:
    plain, fast = make(xl), make(xl)
    assert fast.optimize() is fast
    for model, other in zip(plain.models(), fast.models(), strict=True):
        state, wanted = other.state_dict(), model.state_dict()
        assert list(state) == list(wanted) and all(map(torch.equal, state.values(), wanted.values()))
        assert any(isinstance(module, Faster) for module in other.modules())
    for kwargs in ({}, {"image": draw(plain), "strength": 0.5}, {"prompt": "春 滿"}, {}):
        assert_close(draw(fast, **kwargs), draw(plain, **kwargs))
    fast.to(torch.float64).to(torch.float32)
    fast.enable_model_cpu_offload(device="cpu")
    assert_close(draw(fast), draw(plain))


def copies_of(model: nn.Module) -> list[dict]:
    return [module.made for module in model.modules() if isinstance(module, Faster) and module.made]


def test_the_next_picture_needs_no_new_copies() -> None:
    pipe = make().optimize()
    draw(pipe)
    before = [copies_of(model) for model in pipe.models()]
    draw(pipe)
    for model, kept in zip(pipe.models(), before, strict=True):
        assert kept and all(map(lambda a, b: a is b, copies_of(model), kept))


@pytest.mark.parametrize("before", [True, False], ids=["before LoRA", "after it"])
def test_lora_in_an_optimized_pipeline(before: bool, tmp_path: Path) -> None:
    plain, fast, taught = make(), make(), make().unet
    add_lora(taught, rank=2, alpha=4)
    teach(taught)
    save_lora(taught, tmp_path / FILE)
    if before:
        fast.optimize()
        draw(fast)                                      # copies of the weights as they are now
    for pipe in (plain, fast):
        pipe.load_lora_weights(tmp_path)
    if not before:
        fast.optimize()
    for change in (lambda p: None, lambda p: p.set_adapters("default_0", 0.3), lambda p: p.fuse_lora(),
                   lambda p: p.unfuse_lora(), lambda p: p.unload_lora_weights()):
        change(plain)
        change(fast)
        assert_close(draw(fast), draw(plain))
        assert_close(draw(fast.optimize()), draw(plain))
