"""LoRA of every kind of CLIP: which layers learn, what is written,
and adapters of others put into a model folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from miniclip import (
    BertTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    SimpleCLIPConfig,
    SimpleCLIPModel,
)
from miniclip.bert import ChineseCLIPConfig, ChineseCLIPModel
from miniclip.config import CLIPResNetConfig
from miniclip.image_text import ImageTextModel
from miniclip.resnet import CLIPResNetModel
from miniclip.weights import WeightsError, load_file, read_json, save_file
from minidiff.lora import FILE, LoRALinear
from minidiff.pipeline import StableDiffusionPipeline
from tests.test_lora import predict, teach, unet
from tests.test_minidiff_pipeline import make
from train import train_clip
from train.errors import UserError
from train.lora import (
    CLIP_PROJECTIONS,
    PEFT,
    PEFT_CONFIG,
    PEFT_FILE,
    add_lora,
    merge_adapter,
    merged,
    save_adapter,
    save_lora,
)
from train.merge_lora import MergeConfig, main
from train.run.cli import start

ROOT = Path(__file__).parent.parent
SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 16}
TOKENIZER = CLIPTokenizer.train(["herb shop"] * 3, vocab_size=530)
WORDS = BertTokenizer({word: i for i, word in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] herb shop".split())})
TEXT = CLIPTextConfig.for_tokenizer(TOKENIZER, **SIZES)
BERT = {**SIZES, "vocab_size": 7, "max_position_embeddings": 12}
DISTIL = {"vocab_size": 7, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16,
          "max_position_embeddings": 12}
BUILDERS = {
    "clip": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=6)),
    "chinese": lambda: ChineseCLIPModel(ChineseCLIPConfig(text_config=BERT, vision_config=VISION,
                                                          projection_dim=6)),
    "distilbert": lambda: SimpleCLIPModel(SimpleCLIPConfig(
        text_encoder="distilbert", text_config=DISTIL, image_layers=(1, 1, 1, 1), image_width=2,
        projection_dim=6)),
    "resnet": lambda: CLIPResNetModel(CLIPResNetConfig(
        text_config=TEXT, vision_layers=(1, 1, 1, 1), vision_width=4, image_size=32, projection_dim=6)),
}
QKVO = [f"self_attn.{letter}_proj" for letter in ("k", "v", "q", "out")]
TEXT_LAYER, VISION_LAYER = "text_model.encoder.layers.0.", "vision_model.encoder.layers.0."
BERT_LAYER = "text_model.encoder.layer.0.attention."
DISTIL_LAYER = "text_encoder.model.transformer.layer.0.attention."
LEARNING = {
    "clip": [TEXT_LAYER + name for name in QKVO] + [VISION_LAYER + name for name in QKVO],
    "chinese": [BERT_LAYER + name for name in ("self.query", "self.key", "self.value", "output.dense")]
    + [VISION_LAYER + name for name in QKVO],
    "distilbert": [DISTIL_LAYER + name for name in ("q_lin", "k_lin", "v_lin", "out_lin")],
    "resnet": [TEXT_LAYER + name for name in QKVO] + [f"visual.attnpool.{letter}_proj" for letter in "kqvc"],
}


def tiny(kind: str, seed: int = 0) -> ImageTextModel:
    torch.manual_seed(seed)
    model = BUILDERS[kind]()
    for name, p in model.named_parameters():
        if p.ndim == 1 and name.endswith("bn3.weight"):
            nn.init.ones_(p)                    # a fresh ModifiedResNet multiplies its blocks by 0
    tokenizer = TOKENIZER if kind in ("clip", "resnet") else WORDS
    return ImageTextModel(model, tokenizer, CLIPImageProcessor(size=32, crop_size=32),
                          ["herb", "shop"]).eval()


def features(matcher: ImageTextModel) -> Tensor:
    """[4, E]: of two pictures and of two texts."""
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.cat([matcher.embed_images(pictures), matcher.embed_texts(["herb", "shop herb"])])


def learn(matcher: ImageTextModel, rank: int = 2, alpha: float = 6.0) -> ImageTextModel:
    """As if LoRA had learned something."""
    add_lora(matcher.model, rank, alpha, CLIP_PROJECTIONS)
    teach(matcher.model)
    return matcher


# ----------------------------------------------------------------------------------------- which layers learn


@pytest.mark.parametrize("kind", BUILDERS)
def test_attention_learns_and_nothing_else(kind: str) -> None:
    tuned, before = tiny(kind), features(tiny(kind))
    add_lora(tuned.model, 2, 2, CLIP_PROJECTIONS)
    assert torch.equal(features(tuned), before)
    layers = [name for name, module in tuned.model.named_modules() if isinstance(module, LoRALinear)]
    assert sorted(layers) == sorted(LEARNING[kind])
    learning = {name for name, p in tuned.model.named_parameters() if p.requires_grad}
    assert learning == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}


@pytest.mark.parametrize("kind", BUILDERS)
def test_each_layer_is_asked_and_gets_gradients(kind: str) -> None:
    """No forward pass goes around the module to the bare weight."""
    tuned = learn(tiny(kind))
    ids, mask = tuned.tokens(["herb", "shop herb"])
    pictures = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    both = torch.cat([tuned.encode_images(pictures), tuned.encode_tokens(ids, mask)])
    (both @ torch.randn(6, generator=torch.Generator().manual_seed(1))).sum().backward()
    for name in LEARNING[kind]:
        layer = tuned.model.get_submodule(name)
        assert layer.lora_B.weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", BUILDERS)
def test_merged_is_the_same_function_under_the_old_keys(kind: str) -> None:
    plain, tuned = tiny(kind), learn(tiny(kind))
    apart, untouched = features(tuned), plain.model.state_dict()
    assert not torch.allclose(apart, features(plain), atol=1e-3)
    with merged(tuned.model):
        assert torch.allclose(features(tuned), apart, atol=1e-5)
        state = tuned.model.state_dict()
        assert list(state) == list(untouched)
        changed = {name for name in state if not torch.equal(state[name], untouched[name])}
        assert changed == {f"{name}.weight" for name in LEARNING[kind]}
    assert torch.equal(features(tuned), apart)


def test_torch_2_4_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(nn.Module, "set_submodule", raising=False)              # came with torch 2.5
    tuned = learn(tiny("chinese"))
    with merged(tuned.model):
        assert list(tuned.model.state_dict()) == list(tiny("chinese").model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_lora_is_of_the_weight_s_dtype(dtype: torch.dtype) -> None:
    layer = LoRALinear(nn.Linear(4, 3, dtype=dtype), 2, 0.5)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(torch.ones(1, 4, dtype=dtype)).dtype == layer.merged().weight.dtype == dtype


# ------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """Of each kind a model folder, and the adapter of what LoRA learned on it."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in BUILDERS}
    for kind, folder in folders.items():
        tiny(kind).save(folder / "model")
        save_adapter(learn(tiny(kind)).model, folder / "lora", 2)
    return folders


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("file", ["", PEFT_FILE])
def test_an_adapter_goes_into_a_clip_folder(kind: str, file: str, written: dict, tmp_path: Path,
                                            capsys) -> None:
    model, lora = written[kind] / "model", written[kind] / "lora"
    main(MergeConfig(str(model), str(lora / file), 1.0, str(tmp_path / "out")))
    assert str(tmp_path / "out") in capsys.readouterr().out
    ready = ImageTextModel.load(tmp_path / "out")
    assert torch.allclose(features(ready), features(learn(tiny(kind))), atol=1e-5)
    assert ready.captions == ["herb", "shop"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in model.iterdir()}
    # tokenizer, processor, matcher.json, config
    for path in model.iterdir():
        same = path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
        assert same == (path.name != "model.safetensors")


def test_a_folder_may_be_merged_in_place(written: dict, tmp_path: Path) -> None:
    tiny("clip").save(tmp_path)
    main(MergeConfig(str(tmp_path), str(written["clip"] / "lora"), 1.0, str(tmp_path)))
    assert torch.allclose(features(ImageTextModel.load(tmp_path)), features(learn(tiny("clip"))), atol=1e-5)


@pytest.mark.parametrize("file", ["", FILE])
def test_a_stable_diffusion_folder(file: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "sd")
    tuned = unet()
    add_lora(tuned, 2, 6)
    teach(tuned)
    save_lora(tuned, tmp_path / "lora" / FILE)
    main(MergeConfig(str(tmp_path / "sd"), str(tmp_path / "lora" / file), 1.0, str(tmp_path / "out")))
    ready = StableDiffusionPipeline.from_pretrained(tmp_path / "out").unet
    assert torch.allclose(predict(ready), predict(tuned), atol=1e-5)
    assert not torch.allclose(predict(ready), predict(unet()), atol=1e-4)


def test_the_scale_is_alpha_over_r_times_ours(written: dict, tmp_path: Path) -> None:
    """A stranger's adapter: the same A and B beside other numbers."""
    change_config(written["clip"] / "lora", tmp_path, lora_alpha=5, lora_dropout=0.1, task_type=None,
                  rank_pattern={}, use_dora=False, init_lora_weights="gaussian", modules_to_save=None)
    plain, once, scaled = (tiny("clip").model for _ in range(3))
    merge_adapter(once, written["clip"] / "lora" / PEFT_FILE)                   # there alpha is r
    merge_adapter(scaled, tmp_path / PEFT_FILE, scale=0.5)                      # 5 / 2 * 0.5
    for name in LEARNING["clip"]:
        base, one, other = (model.get_submodule(name).weight for model in (plain, once, scaled))
        assert torch.allclose(other - base, 1.25 * (one - base), atol=1e-6)
        assert not torch.allclose(one, base, atol=1e-3)
    untouched = tiny("clip").model
    merge_adapter(untouched, tmp_path / PEFT_FILE, scale=0)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in untouched.state_dict().items())


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_training_run(kind: str, written: dict, tmp_path: Path) -> None:
    """--init with lora/ merged by the script is model/ of the run."""
    init, run = str(written[kind] / "model"), tmp_path / "run"
    train_clip.main(train_clip.TrainConfig(
        data=str(ROOT / "data" / "herbs"), out=str(run), size=32, steps=3, batch=4, warmup=0, checks=0,
        init=init, lora=2, lora_alpha=6.0, optimizer="adamw", lr=0.01, device="cpu", threads=1))
    main(MergeConfig(init, str(run / "lora"), 1.0, str(tmp_path / "out")))
    before, ready, ours = (ImageTextModel.load(path).model
                           for path in (init, run / "model", tmp_path / "out"))
    for name in LEARNING[kind]:
        old, weight, merged_weight = (model.get_submodule(name).weight for model in (before, ready, ours))
        assert torch.allclose(weight, merged_weight, atol=1e-6), name
        assert not torch.allclose(weight, old, atol=1e-6), name


# ---------------------------------------------------------------------------------------------------- refused


def change_config(lora: Path, folder: Path, drop: str = "", **changes) -> Path:
    """A copy of an adapter with other fields in its adapter_config.json; returns that file."""
    (folder / PEFT_FILE).write_bytes((lora / PEFT_FILE).read_bytes())
    values = {key: value for key, value in {**read_json(lora / PEFT_CONFIG), **changes}.items()
              if key != drop}
    (folder / PEFT_CONFIG).write_text(json.dumps(values), encoding="utf-8")
    return folder / PEFT_CONFIG


def check_refused(tmp_path: Path, model: Path, lora: Path, *words: str) -> None:
    """One line that holds all the words, and nothing written."""
    out = tmp_path / "never"
    with pytest.raises((WeightsError, UserError)) as caught:
        main(MergeConfig(str(model), str(lora), 1.0, str(out)))
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400 and not out.exists()
    assert all(word in line for word in words), line


@pytest.mark.parametrize("name, value", [
    ("peft_type", "IA3"), ("peft_type", None), ("peft_type", ["LORA"]), ("use_rslora", True),
    ("use_dora", True),
    ("bias", "all"), ("bias", "lora_only"), ("lora_bias", True), ("rank_pattern", {"q_proj": 8}),
    ("alpha_pattern", {"q_proj": 8}), ("fan_in_fan_out", True), ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"),
    ("layer_replication", [[0, 1], [0, 1]]),
    ("alora_invocation_tokens", [1, 2]), ("use_qalora", True), ("target_parameters", ["weight"]),
    *((name, {"x": 1}) for name in ("use_bdlora", "arrow_config", "kasa_config", "monteclora_config")),
    ("r", 0), ("r", -2), ("r", 2.0), ("r", True), ("r", "2"), ("r", None), ("r", [2]),
    ("lora_alpha", 0), ("lora_alpha", -1), ("lora_alpha", "4"), ("lora_alpha", None), ("lora_alpha", True),
    ("lora_alpha", float("nan")), ("lora_alpha", float("inf")), ("bias", "x\n" * 500),
])  # fmt: skip
def test_other_kinds_of_lora(name: str, value: object, written: dict, tmp_path: Path) -> None:
    config = change_config(written["clip"] / "lora", tmp_path, **{name: value})
    shown = f"{name} = {value!r}" if len(repr(value)) < 30 else f"{name} = "
    check_refused(tmp_path, written["clip"] / "model", tmp_path, f"{config}: {shown}")


@pytest.mark.parametrize("name", ["peft_type", "r", "lora_alpha"])
def test_fields_that_are_needed(name: str, written: dict, tmp_path: Path) -> None:
    config = change_config(written["clip"] / "lora", tmp_path, drop=name)
    check_refused(tmp_path, written["clip"] / "model", tmp_path, f"{config}: {name} = None")


@pytest.mark.parametrize("text, words", [
    (None, "is missing"), ("[]", "expected a JSON object"), ("{", "not JSON"),
    ('{"r": 2, "r": 4}', "'r' appears twice"), ('{"r": ' + "9" * 50 + "}", "too large"),
])  # fmt: skip
def test_a_broken_or_missing_config(text: str | None, words: str, written: dict, tmp_path: Path) -> None:
    change_config(written["clip"] / "lora", tmp_path)
    if text is None:
        (tmp_path / PEFT_CONFIG).unlink()
    else:
        (tmp_path / PEFT_CONFIG).write_text(text, encoding="utf-8")
    check_refused(tmp_path, written["clip"] / "model", tmp_path, str(tmp_path / PEFT_CONFIG), words)


LAYER = f"{PEFT}.{LEARNING['clip'][0]}"


@pytest.mark.parametrize("changes, words", [
    ({f"{LAYER}.lora_A.weight": torch.zeros(3, 8), f"{LAYER}.lora_B.weight": torch.zeros(8, 3)},
     "of rank 3, but"),
    ({f"{LAYER}.lora_magnitude_vector": torch.ones(8)}, "lora_magnitude_vector"),
    ({f"{LAYER}.lora_B.bias": torch.ones(8)}, "lora_B.bias"),
    # modules_to_save
    ({f"{PEFT}.visual_projection.weight": torch.ones(6, 8)}, "visual_projection.weight"),
    ({f"{PEFT}.text_model.embeddings.token_embedding.lora_embedding_A": torch.ones(2, 8)}, "token_embedding"),
    ({f"{LAYER}.lora_B.weight": torch.zeros(9, 2)}, "[9, 2] times [2, 8]"),
])  # fmt: skip
def test_tensors_that_do_not_fit(changes: dict, words: str, written: dict, tmp_path: Path) -> None:
    change_config(written["clip"] / "lora", tmp_path)
    save_file({**load_file(tmp_path / PEFT_FILE, mmap=False), **changes}, tmp_path / PEFT_FILE)
    check_refused(tmp_path, written["clip"] / "model", tmp_path, str(tmp_path / PEFT_FILE), words)


def test_files_of_the_wrong_kind(written: dict, tmp_path: Path) -> None:
    clip, lora = written["clip"] / "model", written["clip"] / "lora"
    check_refused(tmp_path, clip, tmp_path, f"--lora {tmp_path}: no {PEFT_FILE} in this folder")
    check_refused(tmp_path, clip, tmp_path / "none", "no such file")
    # of another model
    check_refused(tmp_path, clip, written["resnet"] / "lora" / PEFT_FILE, PEFT_FILE, "attnpool")
    check_refused(tmp_path, tmp_path / "nothing", lora, "nothing")
    change_config(lora, tmp_path)
    save_file({}, tmp_path / PEFT_FILE)
    check_refused(tmp_path, clip, tmp_path, "holds no tensors")
    make().save_pretrained(tmp_path / "sd")
    check_refused(tmp_path, tmp_path / "sd", lora, f"no {FILE} in this folder")
    check_refused(tmp_path, tmp_path / "sd", lora / PEFT_FILE, PEFT, "nothing that LoRA knows here")


@pytest.mark.parametrize("changes, words", [
    ({"model": ""}, "--model: is needed"), ({"lora": ""}, "--lora: is needed"),
    ({"out": ""}, "--out: is needed"),
    ({"scale": float("nan")}, "--scale nan"), ({"scale": float("inf")}, "--scale inf"),
])  # fmt: skip
def test_flags(changes: dict, words: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        start(lambda: main(dataclasses.replace(MergeConfig("a", "b", 1.0, "c"), **changes)))
    assert caught.value.code == 2 and words in capsys.readouterr().err
