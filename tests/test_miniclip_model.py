"""miniclip/model.py and config.py without transformers: golden numbers and keys, contracts, errors."""

import copy
import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

import miniclip
from miniclip import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConfigError,
    SimpleCLIPConfig,
)
from miniclip.bert import BertConfig, DistilBertConfig
from miniclip.config import CLIPResNetConfig
from miniclip.model import attention_fused, attention_written_out, causal_bias, clip_loss, normalize

torch.set_num_threads(1)
GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")
spec = importlib.util.spec_from_file_location("clip_make", os.path.join(GOLDEN, "clip_make.py"))
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def golden(name):
    with open(os.path.join(GOLDEN, name), encoding="utf-8") as file:
        return json.load(file)


def tiny(**text):
    torch.manual_seed(0)
    config = CLIPConfig(text_config={**make.TEXT, **text}, vision_config=make.VISION, projection_dim=16)
    return make.fill(CLIPModel(config)).float()


@pytest.mark.parametrize("name", make.PUBLISHED)
def test_keys_and_shapes_of_published_models(name):
    with torch.device("meta"):
        model = make.build(miniclip, *make.PUBLISHED[name])
    ours, theirs = make.packed(model.state_dict()), golden("clip_keys.json")[name]
    assert ours == theirs and list(ours) == list(theirs)


def test_parameter_counts():
    """Totals of open_clip's docs/model_profile.csv, in millions."""
    known = {"openai/clip-vit-base-patch32": 151.28, "openai/clip-vit-large-patch14": 427.62}
    for name, millions in known.items():
        with torch.device("meta"):
            assert abs(make.build(miniclip, *make.PUBLISHED[name]).num_parameters() / 1e6 - millions) < 0.006


def test_numbers_that_transformers_computed():
    config = CLIPConfig(text_config=make.TEXT, vision_config=make.VISION, projection_dim=16)
    ours = make.outputs(make.fill(CLIPModel(config)))
    for name, numbers in golden("clip_outputs.json").items():
        expected = torch.tensor(numbers, dtype=torch.float64)
        assert torch.allclose(ours[name].flatten(), expected, rtol=0, atol=2e-12), name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_is_the_one_written_out(causal, masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64, requires_grad=True)
    mask = (torch.arange(7) < torch.tensor([[7], [4]])) if masked else None
    bias = causal_bias(7, mask, q.dtype, q.device) if masked else None
    plain, weights = attention_written_out(q, k, v, bias, causal, 0.0)
    fused = attention_fused(q, k, v, bias, causal, 0.0)
    assert torch.allclose(plain, fused, rtol=0, atol=1e-13)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    assert (weights.triu(1).abs().max() == 0) == (causal or masked)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (plain, fused)),
                    strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_attention_half_precision_and_empty_rows():
    q = torch.randn(1, 1, 5, 4, dtype=torch.float16)
    left = torch.tensor([[0, 0, 1, 1, 1]])
    out, weights = attention_written_out(q, q, q, causal_bias(5, left, q.dtype, q.device), True, 0.0)
    assert out.isfinite().all() and weights.dtype == torch.float16


def test_output_reads_three_ways():
    model = tiny()
    out = model(input_ids=torch.tensor(make.IDS), pixel_values=make.pixels().float())
    assert out[0] is out.logits_per_image is out["logits_per_image"]
    assert out.loss is None and "loss" not in out and len(out) == len(out.to_tuple()) == 6
    assert list(out) == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds",
                         "text_model_output",
                         "vision_model_output"]  # fmt: skip
    with pytest.raises(KeyError):
        out["loss"]
    flat = model(input_ids=torch.tensor(make.IDS), pixel_values=make.pixels().float(), return_dict=False)
    assert isinstance(flat, tuple) and isinstance(flat[4], tuple) and torch.equal(flat[0], out[0])
    assert torch.allclose(out.text_embeds.norm(dim=1), torch.ones(3))
    assert {**out}.keys() == set(out)


def test_features_serve_both_idioms():
    model = tiny()
    features = model.get_text_features(torch.tensor(make.IDS))
    assert isinstance(features, torch.Tensor) and features.shape == (3, 16)
    assert type(features / features.norm(dim=-1, keepdim=True)) is torch.Tensor
    assert type(features[0]) is torch.Tensor and features[0].shape == (16,)
    assert type(features.pooler_output) is torch.Tensor and torch.equal(features.pooler_output, features)
    assert features["last_hidden_state"].shape == (3, 6, 24) and features.attentions is None
    features.pooler_output.sum().backward()
    assert model.text_projection.weight.grad.abs().sum() > 0
    assert len(model.get_image_features(make.pixels().float(), return_dict=False)) == 2


def test_hidden_states_and_attentions():
    model = tiny()
    out = model.text_model(torch.tensor(make.IDS), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and [a.shape for a in out.attentions] == [(3, 3, 6, 6)] * 2
    assert torch.equal(model.text_model.final_layer_norm(out.hidden_states[-1]), out.last_hidden_state)
    plain = model.text_model(torch.tensor(make.IDS))
    assert plain.hidden_states is None and plain.attentions is None
    assert torch.allclose(plain.last_hidden_state, out.last_hidden_state, atol=1e-6)


def test_pooling_rules():
    """First end token; the old rule takes the largest id, and so is fooled by added tokens."""
    ids = torch.tensor([[48, 3, 49, 50, 49], [48, 3, 4, 5, 6]])
    new, old = tiny(vocab_size=51), tiny(vocab_size=51, eos_token_id=2)
    a, b = new.text_model(ids), old.text_model(ids)
    assert torch.equal(a.pooler_output[0], a.last_hidden_state[0, 2])
    assert torch.equal(b.pooler_output[0], b.last_hidden_state[0, 3])
    assert torch.equal(a.pooler_output[1], a.last_hidden_state[1, 0])  # no end token: position 0
    assert torch.equal(b.pooler_output[1], b.last_hidden_state[1, 0])


def test_causal_and_padding():
    """What follows a token changes nothing before it;
    padding on the right changes nothing up to the end token."""
    model = tiny()
    ids = torch.tensor([[48, 5, 9, 49, 0, 0]])
    a = model.text_model(ids)
    b = model.text_model(torch.tensor([[48, 5, 9, 49, 7, 8]]))
    assert torch.allclose(a.last_hidden_state[:, :4], b.last_hidden_state[:, :4], atol=1e-6)
    c = model.text_model(ids, torch.tensor([[1, 1, 1, 1, 0, 0]]))
    assert torch.allclose(a.pooler_output, c.pooler_output, atol=1e-6)
    assert (a.last_hidden_state[:, 4:] - c.last_hidden_state[:, 4:]).abs().max() > 1e-3


def test_dropout_only_in_training():
    model = tiny(attention_dropout=0.5)
    ids = torch.tensor(make.IDS)
    assert torch.equal(model.text_model(ids)[0], tiny().text_model(ids)[0])
    model.train()
    assert not torch.equal(model.text_model(ids)[0], model.text_model(ids)[0])


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for on in (False, True):
        model = tiny().train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert model.is_gradient_checkpointing == on
        out = model(input_ids=torch.tensor(make.IDS), pixel_values=make.pixels().float(), return_loss=True)
        out.loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


def test_loss():
    similarity = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    rows = torch.tensor([2.0, 3.0]) - similarity.logsumexp(1)
    columns = torch.tensor([2.0, 3.0]) - similarity.logsumexp(0)
    assert torch.allclose(clip_loss(similarity), -(rows.mean() + columns.mean()) / 2)
    assert torch.allclose(clip_loss(torch.zeros(4, 4)), torch.tensor(4.0).log())
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        clip_loss(torch.zeros(2, 3))


def test_normalize_zero_and_half():
    x = torch.zeros(1, 4, requires_grad=True)
    normalize(x).sum().backward()
    assert torch.equal(normalize(x), torch.zeros(1, 4)) and x.grad.isfinite().all()
    assert normalize(torch.full((1, 4), 300.0, dtype=torch.float16)).tolist() == [[0.5] * 4]


def test_folder_round_trip(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    back = CLIPModel.from_pretrained(tmp_path)
    assert back.config == model.config and list(back.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    ids = torch.tensor(make.IDS)
    tower = CLIPTextModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert tower.dtype == torch.float64
    assert torch.allclose(tower(ids)[0].float(), model.text_model(ids)[0], atol=1e-5)
    tower.save_pretrained(tmp_path / "tower")
    assert CLIPTextModel.from_pretrained(tmp_path / "tower").config == tower.config
    assert CLIPVisionModel.from_pretrained(tmp_path).num_parameters() > 0


def test_every_generation_of_keys():
    """5.6 and later: no prefix; before 4.31: position_ids stored."""
    model = CLIPTextModel(CLIPTextConfig(**make.TEXT))
    state = model.state_dict()
    flat = {k.removeprefix("text_model."): v for k, v in state.items()}
    old = {**state, "text_model.embeddings.position_ids": torch.arange(10)[None]}
    bare_old = {**flat, "embeddings.position_ids": torch.arange(10)[None]}
    for keys in (state, flat, old, bare_old):
        assert list(model.convert_keys(keys)) == list(state)


def test_resize_token_embeddings():
    model = CLIPTextModel(CLIPTextConfig(**make.TEXT))
    before = model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(53)
    assert model.config.vocab_size == model.text_model.config.vocab_size == 53
    assert torch.equal(model.get_input_embeddings().weight[:50], before)
    assert torch.allclose(model.get_input_embeddings().weight[50:], before.mean(0).expand(3, -1), atol=1e-4)
    assert model(torch.tensor([[48, 52, 49]])).pooler_output.isfinite().all()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.resize_token_embeddings(50, mean_resizing=False).weight.shape[0] == 50
    assert model.resize_token_embeddings(pad_to_multiple_of=64).weight.shape[0] == 64
    with pytest.raises(ValueError, match="pad_to_multiple_of = 1.3"):
        model.resize_token_embeddings(pad_to_multiple_of=1.3)


def test_what_a_forward_call_returns_may_be_set_in_the_config(tmp_path):
    model, ids = CLIPTextModel(CLIPTextConfig(**make.TEXT, output_attentions=True)), torch.tensor(make.IDS)
    out = model(ids)
    assert len(out.attentions) == 2 and out.hidden_states is None
    assert model(ids, output_attentions=False).attentions is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3
    model.config.return_dict = False
    assert len(model(ids)) == 4 and model(ids, return_dict=True).hidden_states is not None
    model.save_pretrained(tmp_path)
    assert isinstance(CLIPTextModel.from_pretrained(tmp_path)(ids), tuple)
    read = CLIPTextModel.from_pretrained(tmp_path, return_dict=True, output_attentions=False)(ids)
    assert read.attentions is None and len(read.hidden_states) == 3
    whole = tiny()
    whole.config.return_dict = whole.config.text_config.return_dict = False
    for out in (whole(ids, make.pixels().float()), whole.get_text_features(ids),
                whole.get_image_features(make.pixels().float())):
        assert isinstance(out, tuple)
    with pytest.raises(TypeError, match="output_atentions"):
        model(ids, output_atentions=True)


def test_gradients_of_states_and_attentions():
    out = tiny().text_model(torch.tensor(make.IDS), output_hidden_states=True, output_attentions=True)
    kept = out.hidden_states[0], out.attentions[0]
    for tensor in kept:
        tensor.retain_grad()
    out.last_hidden_state[:, -1].sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in kept)


def test_other_ways_to_load(tmp_path):
    model = CLIPTextModel(CLIPTextConfig(**make.TEXT)).half()
    model.save_pretrained(tmp_path)
    back, info = CLIPTextModel.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert back.dtype == torch.float16 and not any(info.values()) and not back.training
    state, config = model.state_dict(), model.config
    read = [CLIPTextModel.from_pretrained(tmp_path, config=config, torch_dtype="float16"),
            CLIPTextModel.from_pretrained(None, config=config, state_dict=state, dtype=torch.float16),
            CLIPTextModel.from_pretrained(None, config=str(tmp_path), state_dict=state, dtype="float16")]
    for other in read:
        assert all(map(torch.equal, state.values(), other.state_dict().values()))
    next(iter(read[1].parameters())).data.zero_()                             # a copy
    assert state["text_model.embeddings.token_embedding.weight"].abs().sum() > 0
    tiny().save_pretrained(tmp_path / "whole")
    whole = CLIPModel.from_pretrained(tmp_path / "whole", text_config={"attention_dropout": 0.5})
    assert whole.text_model.config == dataclasses.replace(tiny().config.text_config, attention_dropout=0.5)
    with pytest.raises(miniclip.WeightsError, match="missing"):
        CLIPTextModel.from_pretrained(None, config=config, state_dict={})
    for wrong in ("load", "int8", "float15"):
        with pytest.raises(miniclip.WeightsError, match=f"dtype = '{wrong}' is not a floating-point"):
            CLIPTextModel.from_pretrained(tmp_path, config=config, dtype=wrong)
    with pytest.raises(ValueError, match="ignore_mismatched_sizes is not supported"):
        CLIPTextModel.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    with pytest.raises(TypeError, match="revison"):
        CLIPTextModel.from_pretrained(tmp_path, revison="main")


def test_services_of_a_pretrained_model():
    model = tiny()
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - tables
    model.logit_scale.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == model.num_parameters() - 1
    assert model.get_memory_footprint() == 4 * model.num_parameters()
    assert not model.can_generate() and model.get_output_embeddings() is None and model.tie_weights() is None
    with pytest.raises(NotImplementedError, match="each tower has its own"):
        model.get_input_embeddings()
    with pytest.raises(AttributeError, match="CLIPModel.generate is left out: CLIP generates no text"):
        model.generate()
    tower = miniclip.CLIPVisionModelWithProjection(CLIPVisionConfig(**make.VISION))
    assert tower.base_model is tower.vision_model and model.base_model is model
    assert tower.main_input_name == "pixel_values" and not hasattr(tower, "resize_token_embeddings")
    before = tower.visual_projection.weight.clone()
    torch.manual_seed(3)
    tower.init_weights()
    torch.manual_seed(3)
    fresh = type(tower)(tower.config)
    assert not torch.equal(before, fresh.visual_projection.weight)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), tower.parameters(), strict=True))
    new = torch.nn.Conv2d(3, 20, 4)
    tower.set_input_embeddings(new)
    assert tower.get_input_embeddings() is new


def test_gradients_reach_the_input_of_frozen_embeddings():
    model, ids = CLIPTextModel(CLIPTextConfig(**make.TEXT)).requires_grad_(False), torch.tensor(make.IDS)
    assert not model(ids)[0].requires_grad
    model.enable_input_require_grads()
    model.enable_input_require_grads()
    assert model(ids)[0].requires_grad
    model.disable_input_require_grads()
    assert not model(ids)[0].requires_grad


def test_gradient_checkpointing_by_every_name():
    for enable in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
        model = tiny()
        assert not model.is_gradient_checkpointing and model.supports_gradient_checkpointing
        getattr(model, enable)({"use_reentrant": True})
        assert model.is_gradient_checkpointing and model.is_activation_checkpointing
        model.activation_checkpointing_disable()
        assert not model.is_gradient_checkpointing
        with pytest.raises(ValueError, match="offload is not supported"):
            getattr(model, enable)(offload=True)
    assert CLIPTextModel(CLIPTextConfig(**make.TEXT, gradient_checkpointing=True)).is_gradient_checkpointing
    assert CLIPModel(CLIPConfig(text_config=make.TEXT, vision_config=make.VISION,
                                gradient_checkpointing=True)).is_gradient_checkpointing


def test_errors_name_field_and_value():
    model = tiny()
    with pytest.raises(ValueError, match="11 tokens.*max_position_embeddings = 10"):
        model.text_model(torch.zeros(1, 11, dtype=torch.long))
    with pytest.raises(ValueError, match="input_ids is missing"):
        model.text_model()
    with pytest.raises(ValueError, match=r"Input image size \(12\*16\) doesn't match model \(12\*12\)"):
        model.vision_model(torch.zeros(1, 3, 12, 16))
    with pytest.raises(ValueError, match="attention_mask"):
        model.text_model(torch.tensor(make.IDS), torch.ones(3, 5))
    with pytest.raises(ConfigError, match="hidden_size = 10 is not a multiple of num_attention_heads = 4"):
        CLIPTextConfig(hidden_size=10, num_attention_heads=4)
    with pytest.raises(ConfigError, match="text_config: unknown field 'hiden_size'"):
        CLIPConfig(text_config={"hiden_size": 3})
    with pytest.raises(ConfigError, match="hidden_act = 'swish'"):
        CLIPVisionConfig(hidden_act="swish")
    with pytest.raises(ConfigError, match="model_type = 'bert'"):
        CLIPTextConfig.from_dict({"model_type": "bert"})
    with pytest.raises(ConfigError, match="patch_size = 99"):
        CLIPVisionConfig(patch_size=99, image_size=64)


def test_configs_of_real_files():
    """Old files carry every setting of text generation, and both spellings of a tower."""
    values = {
        "_commit_hash": None, "architectures": ["CLIPModel"], "initializer_factor": 1.0, "model_type": "clip",
        "logit_scale_init_value": 2.6592, "projection_dim": 768, "torch_dtype": "float32",
        "transformers_version": None,
        "text_config": {"add_cross_attention": False, "bos_token_id": 0, "eos_token_id": 2, "dropout": 0.0,
                        "diversity_penalty": 0.0, "id2label": {"0": "LABEL_0"}, "pruned_heads": {},
                        "hidden_size": 768,
                        "num_attention_heads": 12, "model_type": "clip_text_model", "use_bfloat16": False},
        "text_config_dict": {"hidden_size": 768, "num_attention_heads": 12, "projection_dim": 768},
        "vision_config": {"hidden_size": 1024, "num_attention_heads": 16, "dropout": 0.0,
                          "pad_token_id": None},
        "vision_config_dict": None,
    }  # fmt: skip
    config = CLIPConfig.from_dict(values)
    assert config.text_config.hidden_size == 768 and config.vision_config.hidden_size == 1024
    assert config.text_config.eos_token_id == 49407  # the legacy dict wins with its defaults, as upstream
    assert CLIPTextConfig.from_dict(values) == config.text_config
    assert CLIPVisionConfig.from_dict(values) == config.vision_config
    assert CLIPConfig.from_dict(config.to_dict()) == config
    assert CLIPConfig(**values) == config
    with pytest.raises(ConfigError, match="is_decoder = True"):
        CLIPTextConfig.from_dict({"is_decoder": True})


def test_configs_are_frozen_but_for_what_shapes_no_weight():
    config = CLIPConfig(architectures=["CLIPModel"], text_config={"dropout": 0.1})
    assert config.architectures == ["CLIPModel"] and config.text_config.dropout == 0.1
    assert config.model_type == CLIPConfig.model_type == "clip" and config.is_encoder_decoder is False
    assert config == CLIPConfig() and "architectures" not in config.to_dict()
    config.output_attentions, config.chunk_size_feed_forward, config._attn_implementation = True, 1, "eager"
    assert config["output_attentions"] and config.to_dict()["output_attentions"] and config != CLIPConfig()
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config and copied.chunk_size_feed_forward == 1
    with pytest.raises(dataclasses.FrozenInstanceError, match="'projection_dim'.*dataclasses.replace"):
        config.projection_dim = 3
    for name, value in {"hidden_sise": 3, "output_attentions": "yes"}.items():
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            setattr(config, name, value)
    with pytest.raises(ConfigError, match="CLIPTextConfig: unknown field 'hidden_sise'"):
        CLIPTextConfig(hidden_sise=3)
    assert CLIPTextConfig(50, dropout=0.1).vocab_size == 50
    with pytest.raises(AttributeError, match="push_to_hub is left out: save_pretrained"):
        config.push_to_hub("me/mine")


def test_configs_as_files_and_strings(tmp_path):
    config = tiny().config
    config.save_pretrained(tmp_path / "sub")
    assert CLIPConfig.from_pretrained(tmp_path, subfolder="sub") == config
    assert CLIPTextConfig.from_pretrained(tmp_path / "sub") == config.text_config
    changed = CLIPConfig.from_pretrained(tmp_path / "sub", text_config={"vocab_size": 20}, return_dict=False)
    assert changed.text_config == dataclasses.replace(config.text_config, vocab_size=20)
    assert changed.return_dict is False and changed.vision_config == config.vision_config
    config.to_json_file(tmp_path / "diff.json")
    assert CLIPConfig.from_json_file(tmp_path / "diff.json") == config
    text = config.get_text_config()
    assert json.loads(text.to_json_string()) == text.to_diff_dict() == {
        "model_type": "clip_text_model", **{k: v for k, v in make.TEXT.items()
                                            if v != getattr(CLIPTextConfig(), k)}}
    assert json.loads(text.to_json_string(use_diff=False)) == text.to_dict()
    whole = CLIPConfig.from_text_vision_configs(text, config.vision_config, projection_dim=16)
    assert whole == config and text.get_text_config() is text
    with pytest.raises(TypeError, match="vocab_sise"):
        CLIPTextConfig.from_pretrained(tmp_path / "sub", vocab_sise=3)


def test_import_needs_torch_alone():
    """`import miniclip` loads no package besides torch that torch had not loaded itself."""
    code = (                                                                  # torch 2.4 loads sympy late
        "import sys, torch, sympy, mpmath; before = set(sys.modules); import miniclip;"
        "names = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(names - set(sys.stdlib_module_names) - {'miniclip', 'torch'}))"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(miniclip.__file__)))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root,
                           check=True).stdout
    assert found.strip() == "[]"


@pytest.mark.parametrize("kind, fields", [
    (CLIPTextConfig, {"num_hidden_layers": 10**6}), (CLIPTextConfig, {"num_hidden_layers": 2**63}),
    (CLIPTextConfig, {"num_hidden_layers": "9" * 5002}), (CLIPTextConfig, {"hidden_size": 0}),
    (CLIPTextConfig, {"hidden_size": 2**40}), (CLIPTextConfig, {"num_attention_heads": 0}),
    (CLIPTextConfig, {"vocab_size": -1}), (CLIPTextConfig, {"layer_norm_eps": float("nan")}),
    (CLIPTextConfig, {"attention_dropout": 7}), (CLIPTextConfig, {"hidden_act": "x" * 10**6}),
    (CLIPVisionConfig, {"image_size": 10**9}), (CLIPVisionConfig, {"patch_size": 0}),
    (CLIPConfig, {"projection_dim": 2**63}), (CLIPConfig, {"text_config": ["x"] * 10**6}),
    (CLIPResNetConfig, {"vision_layers": [1, 1, 1, 10**6]}), (CLIPResNetConfig, {"vision_layers": []}),
    (CLIPResNetConfig, {"vision_width": 0}), (BertConfig, {"num_hidden_layers": 10**6}),
    (DistilBertConfig, {"n_layers": 10**6}), (DistilBertConfig, {"n_heads": 0}),
    (DistilBertConfig, {"pad_token_id": 40_000}), (SimpleCLIPConfig, {"image_layers": [3]}),
    (SimpleCLIPConfig, {"text_config": 3}),
])  # fmt: skip
def test_a_config_that_asks_for_too_much_or_nothing(kind, fields):
    with pytest.raises(ConfigError) as caught:
        kind.from_dict(fields, "config.json")
    assert len(str(caught.value)) < 500 and next(iter(fields)) in str(caught.value)
