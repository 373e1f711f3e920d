"""miniclip's models against transformers': same random weights, same inputs, same numbers and gradients.

Configurations are drawn at random from upstream's own config classes; nothing is downloaded.
Bar: relative error at most 1e-12 in float64 and 2e-6 in float32, features, hidden states, logits,
loss, gradients.
"""

import inspect
import json
import random

import pytest
import torch

import miniclip
from tests.parity.compare import keep, relative_error

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)



@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


BARS = {torch.float64: 1e-12, torch.float32: 2e-6}
VOCAB = 60


def error(ours, theirs):
    """Largest difference over the largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return relative_error(ours, theirs)


def tower(seed, vision):
    r = random.Random(seed)
    heads, hd = r.choice([1, 2, 3]), r.choice([4, 8])
    values = dict(
        hidden_size=heads * hd,
        num_attention_heads=heads,
        intermediate_size=r.choice([16, 24]),
        num_hidden_layers=r.choice([1, 2, 3]),
        hidden_act=r.choice(["quick_gelu", "gelu", "gelu_pytorch_tanh", "relu"]),
        layer_norm_eps=r.choice([1e-5, 1e-3]),
        projection_dim=12,
    )
    if vision:
        patch = r.choice([4, 5])
        return values | dict(patch_size=patch, image_size=patch * r.choice([2, 3]),
                             num_channels=r.choice([1, 3]))
    eos = r.choice([2, VOCAB - 1])
    return values | dict(vocab_size=VOCAB, max_position_embeddings=13, eos_token_id=eos,
                         bos_token_id=VOCAB - 2)


def randomized(model, seed):
    """Every parameter drawn anew: biases and norms too, which start at 0 and 1 and would hide a slip."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (p.ndim == 1) * 0.5)
    return model


def pair(seed, dtype, attention="sdpa"):
    text, vision = tower(seed, False), tower(seed + 1, True)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    config._attn_implementation = attention
    theirs = randomized(transformers.CLIPModel(config), seed).to(dtype).eval()
    ours = miniclip.CLIPModel(miniclip.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.to(dtype).eval(), theirs


def inputs(config, seed, dtype, B=3, S=9):
    generator = torch.Generator().manual_seed(seed)
    v = config.vision_config
    pixels = torch.randn(B, v.num_channels, v.image_size, v.image_size, generator=generator).to(dtype)
    ids = torch.randint(0, VOCAB - 2, (B, S), generator=generator)
    lengths = torch.randint(2, S, (B,), generator=generator)
    for row, n in zip(ids, lengths, strict=True):
        row[0], row[n:] = VOCAB - 2, VOCAB - 1
    mask = (torch.arange(S) <= lengths[:, None]).long()
    return ids, pixels, mask


def compare(ours, theirs, bar, path=""):
    """Walks two outputs in order and names the first field that differs."""
    assert list(ours.keys()) == list(theirs.keys()), path
    for name in ours.keys():
        a, b = ours[name], theirs[name]
        if hasattr(a, "keys"):
            compare(a, b, bar, f"{path}{name}.")
            continue
        a, b = (a, b) if isinstance(a, tuple) else ((a,), (b,))
        assert len(a) == len(b), path + name
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert error(x, y) <= bar, f"{path}{name}[{i}]: {error(x, y):.1e}"


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("seed", range(8))
def test_whole_model(seed, dtype):
    ours, theirs = pair(10 * seed, dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ids, pixels, mask = inputs(ours.config, seed, dtype)
    for m in (None, mask):
        call = dict(input_ids=ids, pixel_values=pixels, attention_mask=m, output_hidden_states=True,
                    return_loss=True)
        a, b = ours(**call), theirs(**call)
        assert error(a.loss, b.loss) <= BARS[dtype]
        for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
            assert error(a[name], b[name]) <= BARS[dtype], name
        compare(a.text_model_output, b.text_model_output, BARS[dtype])
        compare(a.vision_model_output, b.vision_model_output, BARS[dtype])
        ours.zero_grad(), theirs.zero_grad()
        a.loss.backward(), b.loss.backward()
        scale = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            off = 0 if q.grad is None else ((p.grad - q.grad).abs().max() / scale).item()
            assert keep(off, dtype, "gradients") <= BARS[dtype], f"gradient of {name}: {off:.1e}"


@pytest.mark.parametrize("seed", range(4))
def test_tuples_attentions_and_features(seed):
    ours, theirs = pair(10 * seed, torch.float32, "eager")
    ids, pixels, mask = inputs(ours.config, seed, torch.float32)
    call = dict(input_ids=ids, pixel_values=pixels, attention_mask=mask)
    wanted = dict(output_hidden_states=True, output_attentions=True)
    compare(ours(**call, **wanted), theirs(**call, **wanted), 2e-6)
    flat = lambda t: [y for x in t for y in (flat(x) if isinstance(x, tuple) else [x])]  # noqa: E731
    a, b = flat(ours(**call, return_dict=False)), flat(theirs(**call, return_dict=False))
    assert len(a) == len(b) and all(error(x, y) <= 2e-6 for x, y in zip(a, b, strict=True))
    a, b = ours.get_text_features(ids), theirs.get_text_features(ids)
    assert error(a, b.pooler_output) <= 2e-6 and error(a.pooler_output, b.pooler_output) <= 2e-6
    assert error(a.last_hidden_state, b.last_hidden_state) <= 2e-6
    a, b = ours.get_image_features(pixels), theirs.get_image_features(pixels)
    assert error(a, b.pooler_output) <= 2e-6


def test_padding_on_the_left():
    """Rows of which no token is real: no NaN, and the same average over everything as upstream's plain
    attention."""
    ours, theirs = pair(0, torch.float32, "eager")
    ids, _, mask = inputs(ours.config, 0, torch.float32)
    mask = mask.flip(1)
    a, b = ours.text_model(ids, mask), theirs.text_model(ids, attention_mask=mask)
    assert a.last_hidden_state.isfinite().all()
    assert error(a.last_hidden_state, b.last_hidden_state) <= 2e-6


@pytest.mark.parametrize("size", [(8, 8), (24, 16), (13, 22)])
def test_other_picture_sizes(size):
    values = tower(3, True) | dict(patch_size=4, image_size=12, num_channels=3)
    theirs = randomized(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**values)),
                        0).double()
    ours = miniclip.CLIPVisionModelWithProjection(miniclip.CLIPVisionConfig(**values)).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    a = ours(x, interpolate_pos_encoding=True, output_hidden_states=True)
    compare(a, theirs.eval()(x, interpolate_pos_encoding=True, output_hidden_states=True), 1e-12)


def test_given_position_ids():
    ours, theirs = pair(20, torch.float64)
    ids, _, _ = inputs(ours.config, 0, torch.float64)
    positions = torch.arange(9).flip(0)[None]
    a, b = ours.text_model(ids, position_ids=positions), theirs.text_model(ids, position_ids=positions)
    assert error(a.pooler_output, b.pooler_output) <= 1e-12


TOWERS = ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModel", "CLIPVisionModelWithProjection"]
CLASSES = ["CLIPModel", *TOWERS]


def tiny(name, package):
    if name == "CLIPModel":
        config = package.CLIPConfig(text_config=tower(1, False), vision_config=tower(2, True),
                                    projection_dim=12)
    elif "Text" in name:
        config = package.CLIPTextConfig(**tower(1, False))
    else:
        config = package.CLIPVisionConfig(**tower(2, True))
    return randomized(getattr(package, name)(config), 5).eval()


def example(config, name):
    v = config.vision_config if name == "CLIPModel" else config
    ids = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    pixels = None if "Text" in name else torch.randn(2, v.num_channels, v.image_size, v.image_size)
    both = dict(input_ids=ids, pixel_values=pixels)
    return {k: v for k, v in both.items() if k not in (["input_ids"] if "Vision" in name else [])
            and v is not None}


@pytest.mark.parametrize("name", CLASSES)
def test_folders_both_ways(name, tmp_path):
    """What upstream saves we read, what we save upstream reads, and nothing changes on the way."""
    theirs = tiny(name, transformers)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = getattr(miniclip, name).from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    call = example(ours.config, name)
    for out in (ours(**call), back(**call)):
        for key, value in theirs(**call).items():
            if isinstance(value, torch.Tensor):
                assert error(out[key], value) <= 2e-6, key
    for old, new in zip(theirs.state_dict().values(), back.state_dict().values(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("name", TOWERS)
def test_towers_out_of_a_whole_model(name, tmp_path):
    whole = tiny("CLIPModel", transformers)
    whole.save_pretrained(tmp_path)
    ours, theirs = (getattr(p, name).from_pretrained(tmp_path) for p in (miniclip, transformers))
    call = example(ours.config, name)
    compare(ours(**call), theirs(**call), 2e-6)


def test_initial_weights():
    """Same standard deviations as upstream's; the seed is not shared, so by statistics of large matrices."""
    torch.manual_seed(0)
    text = dict(hidden_size=256, num_attention_heads=4, intermediate_size=512, num_hidden_layers=2,
                vocab_size=500)
    vision = dict(hidden_size=192, num_attention_heads=4, intermediate_size=512, num_hidden_layers=3,
                  image_size=64)
    both = [
        p.CLIPModel(p.CLIPConfig(text_config=text, vision_config=vision, initializer_factor=1.0,
                                 projection_dim=128))
        for p in (miniclip, transformers)
    ]
    for (name, a), b in zip(both[0].named_parameters(), both[1].parameters(), strict=True):
        if a.ndim < 2:
            assert "class_embedding" in name or torch.equal(a, b), name
        else:
            close = abs(a.std() / b.std() - 1) < 5 / a.numel() ** 0.5
            assert close, f"{name}: {a.std():.4f}, upstream {b.std():.4f}"


@pytest.mark.parametrize("name", TOWERS[:2])
@pytest.mark.parametrize("options", [{}, {"mean_resizing": False}, {"pad_to_multiple_of": 16}])
@pytest.mark.parametrize("rows", [None, VOCAB + 9, VOCAB - 9])
def test_resized_token_tables(name, options, rows):
    ours, theirs = tiny(name, miniclip), tiny(name, transformers)
    tables = []
    for model in (ours, theirs):
        torch.manual_seed(7)
        tables.append(model.resize_token_embeddings(rows, **options).weight)
    assert tables[0].shape == tables[1].shape and ours.config.vocab_size == theirs.config.vocab_size
    assert (tables[0] - tables[1]).abs().max() <= 2e-6


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_name_is_here_or_left_out_with_a_reason(name):
    theirs, ours = getattr(transformers, name), tiny(name, miniclip)
    for there, here in ((theirs, ours), (theirs.config_class, ours.config)):
        left_out = {n for kind in type(here).__mro__ for n in vars(kind).get("left_out", ())}
        names = {n for n in dir(there) if not n.startswith("_")}
        kept = getattr(here, "metadata", frozenset())
        assert not [n for n in names if not hasattr(here, n) and n not in left_out and n not in kept]
        assert not [n for n in left_out if hasattr(here, n)]


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_stand_in_upstreams_order(name):
    for method in ("forward", "get_text_features", "get_image_features"):
        if hasattr(getattr(transformers, name), method):
            theirs, ours = (inspect.signature(getattr(getattr(p, name), method)).parameters.values()
                            for p in (transformers, miniclip))
            theirs, ours = ([(p.name, p.default) for p in places if p.kind == p.POSITIONAL_OR_KEYWORD]
                            for places in (theirs, ours))
            assert ours == theirs


@pytest.mark.parametrize("name", CLASSES)
def test_counts_and_config_strings(name):
    ours, theirs = tiny(name, miniclip), tiny(name, transformers)
    for option in ({}, {"exclude_embeddings": True}):
        assert ours.num_parameters(**option) == theirs.num_parameters(**option)
    assert ours.get_memory_footprint(False) == theirs.get_memory_footprint(False)
    values = json.loads(ours.config.to_json_string())
    assert theirs.config_class(**values).to_dict() == theirs.config_class(**theirs.config.to_dict()).to_dict()
    assert ours.config_class(**theirs.config.to_dict()) == ours.config
