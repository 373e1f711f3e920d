"""Foreign checkpoints: random models of open_clip, of OpenAI's layout and of the tutorial, saved,
loaded, compared."""

import json
import os
import zipfile

import pytest
import torch
from torch import nn

from miniclip import CLIPModel, convert
from miniclip.bert import ChineseCLIPModel
from miniclip.weights import WeightsError, save_file

from .test_clip_model import error, randomized
from .test_clip_towers import shaken

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")
cfg = pytest.importorskip("open_clip.model")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


TEXT = dict(context_length=9, vocab_size=50, width=128, heads=2, layers=2)


def foreign(kind, quick=True, head_width=64, custom=False):
    """A small open_clip model, whose keys are OpenAI's."""
    if kind == "resnet":
        vision = cfg.CLIPVisionCfg(layers=(1, 2, 1, 1), width=64, image_size=64)
    else:
        vision = cfg.CLIPVisionCfg(layers=3, width=128, head_width=head_width, patch_size=8, image_size=32)
    build = cfg.CustomTextCLIP if custom else cfg.CLIP
    model = build(24, vision, cfg.CLIPTextCfg(**TEXT), quick_gelu=quick)
    return shaken(model)


def batch(size, dtype=torch.float32):
    ids = torch.randint(0, 48, (3, 9))
    ids[:, 0] = 48
    ids[0, 4:], ids[1, 7:], ids[2, 8:] = 0, 0, 0
    ids[0, 4], ids[1, 7], ids[2, 8] = 49, 49, 49
    return ids, torch.randn(3, 3, size, size, dtype=dtype)


def same(ours, theirs, size):
    for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        ours.to(dtype), theirs.to(dtype)
        for buffer in ("attn_mask",):
            for module in theirs.modules():
                if isinstance(getattr(module, buffer, None), torch.Tensor):
                    setattr(module, buffer, getattr(module, buffer).to(dtype))
        ids, pixels = batch(size, dtype)
        assert error(ours.get_text_features(ids).pooler_output, theirs.encode_text(ids)) <= bar
        assert error(ours.get_image_features(pixels).pooler_output, theirs.encode_image(pixels)) <= bar
        image, text, scale = theirs(pixels, ids)
        out = ours(input_ids=ids, pixel_values=pixels)
        assert error(out.logits_per_image, scale * image @ text.T) <= bar


class Archive(nn.Module):
    """Like OpenAI's published modules: the model and three constants, all as buffers."""

    def __init__(self, model):
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, p in model.named_parameters(recurse=False):
            self.register_parameter(name, p)
        for name, value in (("input_resolution", 32), ("context_length", 9), ("vocab_size", 50)):
            self.register_buffer(name, torch.tensor(value))
        self.inner = [model]

    def forward(self, image, text):
        return self.inner[0].encode_image(image), self.inner[0].encode_text(text)


def trace(model, size, path):
    ids, pixels = batch(size)
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(Archive(model), (pixels, ids), check_trace=False), str(path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, size", [("vit", 32), ("resnet", 64)])
def test_openai_archives(kind, size, tmp_path):
    model = foreign(kind)
    trace(model, size, tmp_path / "model.pt")
    found = convert.read_archive(tmp_path / "model.pt")
    reference = torch.jit.load(str(tmp_path / "model.pt")).state_dict()
    assert set(reference) <= set(found) and all(torch.equal(found[k], v) for k, v in reference.items())
    ours = convert.load(tmp_path / "model.pt")
    same(ours, model, size)
    ours.float().save_pretrained(tmp_path / "folder")
    same(convert.load(tmp_path / "folder"), model, size)


@pytest.mark.filterwarnings("ignore")
def test_half_precision_archives(tmp_path):
    """OpenAI publishes float16; it comes back as float32 of the same values."""
    model = foreign("vit")
    halves = {k: v.half() for k, v in model.state_dict().items()}
    trace(model, 32, tmp_path / "a.pt")
    model.half()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        names = archive.namelist()
    assert any(n.endswith("constants.pkl") for n in names)
    torch.save(halves, tmp_path / "state.pt")
    state, archive = convert.read_any(tmp_path / "state.pt")
    assert not archive and state["visual.proj"].dtype == torch.float16


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("custom", [True, False])
@pytest.mark.parametrize("head_width", [64, 32])
def test_openclip_files(quick, custom, head_width, tmp_path, monkeypatch):
    """Head width and activation come from the name; the same file under another name gives other numbers."""
    model = foreign("vit", quick, head_width, custom)
    monkeypatch.setitem(convert.VIT, "tiny", (24, (32, 8, 128, 3, head_width), (128, 2, 2)))
    monkeypatch.setitem(convert.VIT, "other", (24, (32, 8, 128, 3, 96 - head_width), (128, 2, 2)))
    name = "tiny-quickgelu" if quick else "tiny"
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    same(convert.load(tmp_path / "m.safetensors", name), model, 32)
    model.float()
    wrapped = {"epoch": 3, "state_dict": {"module." + k: v for k, v in model.state_dict().items()}}
    torch.save(wrapped, tmp_path / "epoch_3.pt")
    same(convert.load(tmp_path / "epoch_3.pt", name), model, 32)
    model.float()
    ids, pixels = batch(32)
    for wrong in ("tiny" if quick else "tiny-quickgelu", "other-quickgelu" if quick else "other"):
        bad = convert.load(tmp_path / "epoch_3.pt", wrong).get_image_features(pixels).pooler_output
        assert error(bad, model.encode_image(pixels)) > 1e-4


def test_names_agree_with_open_clip():
    """Our table of named models against open_clip's own configs."""
    folder = os.path.join(os.path.dirname(open_clip.__file__), "model_configs")
    for name, (E, vision, text) in {**convert.VIT, **convert.RESNET}.items():
        with open(os.path.join(folder, name + ".json"), encoding="utf-8") as file:
            c = json.load(file)
        v, t = c["vision_cfg"], c["text_cfg"]
        assert (E, text) == (c["embed_dim"], (t["width"], t["layers"], t["heads"])), name
        if name in convert.VIT:
            read = (v["image_size"], v["patch_size"], v["width"], v["layers"], v.get("head_width", 64))
        else:
            read = (v["image_size"], v["width"], tuple(v["layers"]))
        assert vision == read, name


def test_back_to_openai():
    model = foreign("vit")
    there = convert.from_openai(model.state_dict())
    back = convert.to_openai(there)
    assert set(back) == set(model.state_dict())
    assert all(torch.equal(back[k], v) for k, v in model.state_dict().items())


class Tutorial(nn.Module):
    """The tutorial's model, put together from its parts: timm's ResNet-50 is torchvision's without fc."""

    def __init__(self):
        super().__init__()
        torchvision = pytest.importorskip("torchvision")
        small = dict(vocab_size=40, dim=64, n_layers=2, n_heads=1, hidden_dim=96, max_position_embeddings=12)
        self.image_encoder, self.text_encoder = nn.Module(), nn.Module()
        self.image_encoder.model = torchvision.models.resnet50(num_classes=2)
        self.image_encoder.model.fc = nn.Identity()
        self.text_encoder.model = transformers.DistilBertModel(transformers.DistilBertConfig(**small))
        for name, width in (("image_projection", 2048), ("text_projection", 64)):
            head = nn.Module()
            head.projection, head.fc = nn.Linear(width, 48), nn.Linear(48, 48)
            head.layer_norm = nn.LayerNorm(48)
            setattr(self, name, head)

    def features(self, name, x):
        head = getattr(self, name)
        y = head.projection(x)
        z = head.layer_norm(head.fc(nn.functional.gelu(y)) + y)
        return nn.functional.normalize(z, dim=-1)


def test_the_tutorials_checkpoint(tmp_path):
    model = Tutorial()
    shaken(model.image_encoder), randomized(model.text_encoder, 1), randomized(model.image_projection, 2)
    randomized(model.text_projection, 3)
    model.eval()
    torch.save(model.state_dict(), tmp_path / "best.pt")
    ours = convert.load(tmp_path / "best.pt")
    ids, pixels = torch.randint(1, 40, (2, 7)), torch.randn(2, 3, 64, 64)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    text = model.text_encoder.model(ids, attention_mask=mask).last_hidden_state[:, 0]
    assert error(ours.encode_text(ids, mask), model.features("text_projection", text)) <= 2e-6
    image = model.image_encoder.model(pixels)
    assert error(ours.encode_image(pixels), model.features("image_projection", image)) <= 2e-6
    assert ours.logit_scale.item() == 0


def test_folders_by_their_config(tmp_path):
    text = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=16)
    vision = {k: v for k, v in text.items() if k != "vocab_size"} | dict(image_size=8, patch_size=4)
    both = dict(text_config=text, vision_config=vision, projection_dim=6)
    transformers.CLIPModel(transformers.CLIPConfig(**both)).save_pretrained(tmp_path / "clip")
    theirs = transformers.ChineseCLIPModel(transformers.ChineseCLIPConfig(**both))
    theirs.save_pretrained(tmp_path / "chinese")
    assert type(convert.load(tmp_path / "clip")) is CLIPModel
    assert type(convert.load(tmp_path / "chinese")) is ChineseCLIPModel
    transformers.BertModel(transformers.BertConfig(**text)).save_pretrained(tmp_path / "bert")
    with pytest.raises(WeightsError, match="model_type 'bert'"):
        convert.load(tmp_path / "bert")
