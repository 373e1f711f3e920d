"""shortcuts: exact where nothing is given up, else what the definition says; together; undone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.int8 import Int8
from miniclip.weights import WeightsError
from minidiff import UNet2DConditionModel, deep_cache, int8, merge_tokens, optimize
from minidiff.attention import Attention
from minidiff.embeddings import ACTIVATIONS
from minidiff.lora import FILE
from minidiff.shortcuts import TokenMerging
from minidiff.text_to_image import PRESETS, ImageFormat, build_text_to_image
from tests.test_lora import teach
from tests.test_minidiff_pipeline import draw, make
from tests.test_optimize import SMALLEST, UNETS, assert_close, code, inputs
from train.lora import add_lora, save_lora

TIMES = (900, 700, 500, 300, 100)
SKIPS = [("SD 1", 1), ("SD 1", 2), ("SD 2", 1), ("no text", 1), ("no text", 2), ("SDXL", 2),
         ("text alone", 1)]


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def unet(kind: str = "SD 1", **fields) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{**UNETS[kind], **fields}).eval()


def at(given: dict, t: int) -> dict:
    """The next step: another time, another map, the same text."""
    return {**given, "timestep": torch.tensor(t), "sample": given["sample"] + t / 1000}


# -------------------------------------------------------------------------------------------------- DeepCache


def naive(model: UNet2DConditionModel, given: dict, earlier: dict, skips: int) -> Tensor:
    """The outermost level written out, on what the last module before it said of `earlier`."""
    up, down, deep = model.up_blocks[-1], model.down_blocks[0], []
    n = len(up.resnets) - skips
    before = model.up_blocks[-2] if n == 0 else ([*up.attentions] or [*up.resnets])[n - 1]
    with before.register_forward_hook(lambda module, args, out: deep.append(out)):
        model(**earlier)
    x, text = given["sample"], (given["encoder_hidden_states"], None, None)
    temb = model.embed_time(x, given["timestep"], None, None, given.get("added_cond_kwargs"))
    maps = [model.conv_in(x)]
    for i in range(skips - 1):
        h = down.resnets[i](maps[-1], temb)
        maps.append(down.attentions[i](h, *text) if down.attentions else h)
    h = deep[0]
    for i in range(n, n + skips):
        h = up.resnets[i](torch.cat([h, maps.pop()], 1), temb)
        h = up.attentions[i](h, *text) if up.attentions else h
    return model.conv_out(ACTIVATIONS["silu"](model.conv_norm_out(h)))


@pytest.mark.parametrize(("kind", "skips"), SKIPS)
def test_deep_cache_is_the_outermost_level_on_old_features(kind: str, skips: int) -> None:
    model, given = unet(kind), inputs(unet(kind), size=(11, 16))
    walk = [at(given, t) for t in TIMES]
    plain = [model(**step).sample for step in walk]
    wanted = [naive(model, walk[i], walk[i // 3 * 3], skips) if i % 3 else plain[i] for i in range(5)]
    with deep_cache(model, every=3, skips=skips):
        found = [model(**step).sample for step in walk]
    for i in range(5):
        assert torch.equal(found[i], wanted[i]) and torch.equal(found[i], plain[i]) == (i % 3 == 0)
        assert float((found[i] - plain[i]).norm()) <= 0.5 * float(plain[i].norm())
    assert torch.equal(model(**walk[1]).sample, plain[1])          # as before


@pytest.mark.parametrize("kind", UNETS)
def test_deep_cache_of_every_step_is_exact(kind: str) -> None:
    model, given = unet(kind), inputs(unet(kind))
    for t in TIMES:
        plain = model(**at(given, t)).sample
        with deep_cache(model, every=1):
            assert torch.equal(model(**at(given, t)).sample, plain)


def test_a_cache_sees_that_a_picture_is_another() -> None:
    model, given = unet(), inputs(unet())
    first, second = at(given, 500), at(given, 400)
    text = given["encoder_hidden_states"]
    residuals = {"down_intrablock_additional_residuals": [torch.ones(2, 16, 16, 16), torch.ones(2, 32, 8, 8)]}
    others = [first, at(given, 600),                                            # not later
              {**second, "encoder_hidden_states": text + 1}, {**second, "sample": second["sample"][..., :8]},
              {**second, "sample": second["sample"][:1], "encoder_hidden_states": text[:1]},
              {**second, **residuals}]
    for other in others:
        plain = model(**other).sample
        with deep_cache(model):
            model(**first)
            assert torch.equal(model(**other).sample, plain)
    with deep_cache(model):
        model(**first)
        with torch.enable_grad():
            assert torch.equal(model(**second).sample, model(**second).sample)
        model(**first)
        text.mul_(2)                                                            # in place, unseen by identity
        assert torch.equal(model(**second).sample, copy.deepcopy(model)(**second).sample)


def test_a_broken_off_step_leaves_no_features() -> None:
    model, given = unet(), inputs(unet())
    plain = model(**at(given, 300)).sample

    def stop(*_) -> None:
        raise KeyboardInterrupt

    with deep_cache(model, every=2):
        model(**at(given, 500))
        with model.conv_out.register_forward_hook(stop), pytest.raises(KeyboardInterrupt):
            model(**at(given, 600))
        assert not torch.equal(model(**at(given, 300)).sample, plain)           # on the features of 600
        with model.conv_in.register_forward_hook(stop), pytest.raises(KeyboardInterrupt):
            model(**at(given, 600))
        assert torch.equal(model(**at(given, 300)).sample, plain)


def test_deep_cache_refuses() -> None:
    model = unet()
    for options in ({"every": 0}, {"skips": 0}, {"skips": 3}):
        with pytest.raises(ValueError, match="deep_cache: every = .*, skips = .* in 1 to 2"):
            deep_cache(model, **options)
    undo = deep_cache(model)
    with pytest.raises(ValueError, match="has one already"):
        deep_cache(model)
    undo.restore()
    deep_cache(model).restore()


# ---------------------------------------------------------------------------------------------- token merging


def naive_merged(attention: Attention, x: Tensor, size: tuple[int, int], ratio: float) -> Tensor:
    """One token after the other, by the definition."""
    out = torch.empty_like(x)
    for b, tokens in enumerate(x):
        stay = [i for i in range(len(tokens)) if i // size[1] % 2 == 0 and i % size[1] % 2 == 0]
        go = [i for i in range(len(tokens)) if i not in stay]
        likeness = {i: [float(F.cosine_similarity(tokens[i], tokens[j], dim=0)) for j in stay] for i in go}
        go.sort(key=lambda i: -max(likeness[i]))                                # noqa: B023
        merged = go[: int(ratio * len(tokens))]
        groups = [[j] for j in stay] + [[i] for i in go if i not in merged]
        for i in merged:
            groups[likeness[i].index(max(likeness[i]))].append(i)
        answers = attention(torch.stack([tokens[group].mean(0) for group in groups])[None])[0]
        for group, answer in zip(groups, answers, strict=True):
            out[b, group] = answer
    return out


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 9)])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75])
def test_merging_is_its_definition(size: tuple[int, int], ratio: float) -> None:
    attention, x = Attention(16, None, 4), torch.randn(2, size[0] * size[1], 16)
    plain, wanted = attention(x), naive_merged(attention, x, size, ratio)
    merging = TokenMerging(ratio)
    merging.see(None, (torch.empty(2, 16, *size),))
    args = merging.merge(attention, (x, None, None))
    squares = (size[0] + 1) // 2 * ((size[1] + 1) // 2)
    assert args[0].shape[1] == max(x.shape[1] - int(ratio * x.shape[1]), squares)
    found = merging.unmerge(attention, args, attention(*args))
    assert_close(found, wanted, 1e-6)
    assert not torch.allclose(found, plain, rtol=1e-3)


def test_masked_tokens_are_not_merged() -> None:
    x, mask = torch.randn(1, 16, 8), torch.zeros(1, 1, 16)
    merging = TokenMerging(0.5)
    merging.see(None, (torch.empty(1, 8, 4, 4),))
    merging.merge(None, (x, None, None))
    assert merging.merge(None, (x, None, mask)) is None and merging.unmerge(None, (), x) is x


def test_tokens_that_are_alike_lose_nothing() -> None:
    """A map of squares of 2 x 2 with one value each, of tokens that all count the same."""
    model, x = unet(), torch.randn(1, 4, 4, 16)
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    tokens = x.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)    # [1, 64, 16]
    merging = TokenMerging(0.75)
    merging.see(None, (torch.empty(1, 16, 8, 8),))
    args = merging.merge(attention, (tokens, None, None))
    assert_close(merging.unmerge(attention, args, attention(*args)), attention(tokens), 1e-6)


@pytest.mark.parametrize("kind", ["SD 1", "SD 2", "SDXL"])
@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
def test_merging_in_a_unet(kind: str, size: tuple[int, int]) -> None:
    model, given = unet(kind), inputs(unet(kind), size=size)
    plain, lengths = model(**given).sample, []
    block = model.up_blocks[-1].attentions[0].transformer_blocks[0]
    with merge_tokens(model, 0):
        assert torch.equal(model(**given).sample, plain)
    with merge_tokens(model, 0.5), block.attn1.to_q.register_forward_hook(
            lambda module, args, out: lengths.append(out.shape[1])):
        merged = model(**given).sample
    tokens = size[0] * size[1]
    assert lengths == [tokens - tokens // 2]
    assert 1e-6 < float((merged - plain).norm() / plain.norm()) < 0.2
    assert torch.equal(model(**given).sample, plain)


def test_merging_refuses() -> None:
    for ratio in (-0.1, 0.8, float("nan")):
        with pytest.raises(ValueError, match="merge_tokens: ratio = .* 0 to 0.75"):
            merge_tokens(unet(), ratio)
    for kind in ("no text", "text alone"):
        with pytest.raises(ValueError, match="no self-attention"):
            merge_tokens(unet(kind))
    model = unet()
    undo = merge_tokens(model)
    with pytest.raises(ValueError, match="merges tokens already"):
        merge_tokens(model)
    undo.restore()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------------- int8


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("optimized", [False, True])
def test_int8_is_a_model_of_rounded_weights(kind: str, optimized: bool) -> None:
    model, given = unet(kind), inputs(unet(kind))
    rounded, small = copy.deepcopy(model), copy.deepcopy(model)
    for layer in rounded.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            for row in layer.weight:                                            # one output channel
                step = row.abs().max() / 127
                row.copy_((row / step).round() * step)
    if optimized:
        optimize(small)(**given)
    assert int8(small) is small
    assert torch.equal(small(**given).sample, rounded(**given).sample)
    assert_close(small(**given).sample, model(**given).sample, 0.02)
    state, wanted = small.state_dict(), rounded.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)
    assert small.get_memory_footprint() < 0.3 * model.get_memory_footprint()
    assert not any(vars(module).get("made") for module in small.modules())


def test_int8_of_zeros_and_halves() -> None:
    layer = nn.Linear(8, 3)
    layer.weight[1] = 0
    assert torch.equal(int8(layer)(torch.ones(1, 8))[0, 1], layer.bias[1])
    assert layer.half().weight.dtype == torch.float16 and layer.numbers.dtype == torch.int8
    assert torch.isfinite(copy.deepcopy(layer).weight).all() and isinstance(layer, Int8)


def test_int8_is_saved_as_floats(tmp_path: Path) -> None:
    model, given = int8(unet()), inputs(unet())
    model.save_pretrained(tmp_path)
    assert torch.equal(UNet2DConditionModel.from_pretrained(tmp_path)(**given).sample, model(**given).sample)
    with pytest.raises(RuntimeError, match="conv_in.weight"):
        model.load_state_dict(unet().state_dict())


def test_lora_comes_before_int8(tmp_path: Path) -> None:
    pipe, other = make(), make()
    taught = make().unet
    add_lora(taught, rank=2, alpha=4)
    teach(taught)
    save_lora(taught, tmp_path / FILE)
    int8(other.unet)
    with pytest.raises(WeightsError, match="has weights of int8"):
        other.load_lora_weights(tmp_path)
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    whole = draw(pipe, output_type="latent")
    int8(pipe.unet)
    assert_close(draw(pipe, output_type="latent"), whole, 0.1)


# -------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("xl", [False, True])
def test_guidance_on_part_of_the_walk(xl: bool) -> None:
    pipe, batches = make(xl), []
    options = {"num_inference_steps": 4, "negative_prompt": "old"}
    whole, alone = draw(pipe, **options), draw(pipe, guidance_scale=1, **options)
    pipe.guidance_interval = (0, 1)
    assert torch.equal(draw(pipe, **options), whole)
    pipe.guidance_interval = (0.9999, 1)                                        # no timestep lies there
    assert torch.equal(draw(pipe, **options), alone)
    pipe.guidance_interval = (0.4, 0.6)
    with pipe.unet.register_forward_pre_hook(
            lambda module, args: batches.append((len(args[0]), int(args[1])))):
        part = draw(pipe, **options)
    assert batches == [(2 if 400 <= t <= 600 else 1, t) for _, t in batches]
    assert {n for n, _ in batches} == {1, 2}
    assert not torch.equal(part, whole) and not torch.equal(part, alone)
    pipe.guidance_interval = (0.6, 0.4)
    with pytest.raises(ValueError, match=r"guidance_interval = 0.6, 0.4: they must be in order"):
        draw(pipe, **options)


def test_the_end_of_guidance_is_what_a_callback_can_do() -> None:
    """As diffusers' documentation has it: the negative half is dropped, then only the text's is predicted."""
    pipe = make()

    def stop(p, i, t, values):
        rows = values["prompt_embeds"]
        return {"prompt_embeds": rows[-1:] if i == 1 else rows}

    wanted = draw(pipe, num_inference_steps=4, callback_on_step_end=stop,
                  callback_on_step_end_tensor_inputs=["prompt_embeds"])
    pipe.guidance_interval = (0, 0.5)
    times = pipe._timesteps(4, {}, None, None, None, None, None)
    assert sum(t >= 500 for t in times.tolist()) == 2
    assert torch.equal(draw(pipe, num_inference_steps=4), wanted)


def test_guidance_on_part_of_a_small_model() -> None:
    model = build_text_to_image(PRESETS["tiny"], ImageFormat(32, 1, 2), ["春 草書", "夏"]).eval()
    whole, alone = (model.sample(["春", "夏"], steps=4, guidance=g) for g in (3.0, 1.0))
    model.guidance_interval = 0.9999, 1.0
    assert torch.equal(model.sample(["春", "夏"], steps=4, guidance=3.0), alone)
    model.guidance_interval = 0.0, 0.5
    part = model.sample(["春", "夏"], steps=4, guidance=3.0)
    assert not torch.equal(part, whole) and not torch.equal(part, alone)


# -------------------------------------------------------------------------------------------------- together


@pytest.mark.parametrize("first", [True, False], ids=["optimized first", "optimized last"])
def test_all_together_and_with_optimize(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALLEST.items():
        monkeypatch.setattr(code, name, value)
    model, given = unet(), inputs(unet())
    walk = [at(given, t) for t in TIMES]
    with deep_cache(model), merge_tokens(model):
        wanted = [model(**step).sample for step in walk]
        rounded = int8(copy.deepcopy(model))
        wanted_int8 = [rounded(**step).sample for step in walk]
    fast = optimize(copy.deepcopy(model)) if first else copy.deepcopy(model)
    with deep_cache(fast), merge_tokens(fast):
        fast = fast if first else optimize(fast)
        for step, picture in zip(walk, wanted, strict=True):
            assert_close(fast(**step).sample, picture)
        fast = int8(fast)
        for step, picture in zip(walk, wanted_int8, strict=True):
            assert_close(fast(**step).sample, picture)


def test_a_whole_pipeline_with_everything() -> None:
    pipe = make()
    whole = draw(pipe, num_inference_steps=6, output_type="latent")
    pipe.optimize().guidance_interval = 0.2, 0.8
    with deep_cache(pipe.unet, 2), merge_tokens(pipe.unet, 0.25):
        part = draw(pipe, num_inference_steps=6, output_type="latent")
    assert torch.isfinite(part).all() and not torch.allclose(part, whole, rtol=1e-3)
    pipe.guidance_interval = 0, 1
    assert_close(draw(pipe, num_inference_steps=6, output_type="latent"), whole)
