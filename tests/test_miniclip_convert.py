"""miniclip/convert.py without open_clip: archives, families, hostile files, errors of one line."""

import os
import pickle
import random
import zipfile

import pytest
import torch

from miniclip import CLIPConfig, CLIPModel, CLIPTextModel, convert
from miniclip.config import CLIPResNetConfig
from miniclip.resnet import CLIPResNetModel
from miniclip.weights import WeightsError, save_file, write_json
from tests.torchscript import archive

TEXT = dict(hidden_size=64, num_attention_heads=1, num_hidden_layers=2, intermediate_size=96, vocab_size=50,
            max_position_embeddings=9, eos_token_id=49, bos_token_id=48, projection_dim=16)  # fmt: skip
VISION = dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=1, intermediate_size=80,
              image_size=16,
              patch_size=8, projection_dim=16)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated; only the test writes with it
IDS = torch.tensor([[48, 3, 49, 0], [48, 4, 5, 49]])


def tiny():
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()


def check(model, reference):
    assert type(model) is CLIPModel and not model.training
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for a, b in ((model.get_text_features(IDS), reference.get_text_features(IDS)),
                 (model.get_image_features(pixels), reference.get_image_features(pixels))):  # fmt: skip
        assert torch.allclose(a, b, atol=1e-6)


def test_keys_there_and_back():
    state = tiny().state_dict()
    there = convert.to_openai(state)
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in there
    assert there["visual.proj"].shape == (128, 16)
    assert there["text_projection"].shape == (64, 16) and "transformer.resblocks.1.mlp.c_fc.bias" in there
    back = convert.from_openai(there)
    assert set(back) == set(state) and all(torch.equal(back[k], state[k]) for k in state)


def test_archive_of_openai(tmp_path):
    model = tiny()
    numbers = {"input_resolution": torch.tensor(16), "vocab_size": torch.tensor(50)}
    tensors = {**convert.to_openai(model.state_dict()), **numbers}
    tensors = {k: v.half() if v.ndim > 1 else v for k, v in tensors.items()}
    found = convert.read_archive(archive(tensors, tmp_path / "a.pt"))
    assert set(found) == set(tensors) and all(torch.equal(found[k], tensors[k]) for k in tensors)
    read = convert.load(tmp_path / "a.pt")
    for p in model.parameters():
        p.data = p.data.half().float() if p.ndim > 1 else p.data
    check(read, model)
    assert read.config.text_config.hidden_act == "quick_gelu" and read.config.text_config.eos_token_id == 49


def test_files_need_a_name(tmp_path, monkeypatch):
    model = tiny()
    save_file(convert.to_openai(model.state_dict()), tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match="m.safetensors: head count and activation are not in the "
                                           "file.*ViT-H-14"):
        convert.load(tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match="name 'ViT-Z' is not one of"):
        convert.load(tmp_path / "m.safetensors", "ViT-Z")
    with pytest.raises(WeightsError, match=r"ViT-B-32 has sizes \(512.*but the file's tensors have \(16"):
        convert.load(tmp_path / "m.safetensors", "ViT-B-32")
    monkeypatch.setitem(convert.VIT, "tiny", (16, (16, 8, 128, 1, 64), (64, 2, 1)))
    check(convert.load(tmp_path / "m.safetensors", "tiny-quickgelu"), model)
    assert convert.load(tmp_path / "m.safetensors", "tiny").config.vision_config.hidden_act == "gelu"
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    check(convert.load(tmp_path / "ours.safetensors", "tiny-quickgelu"), model)
    distributed = {"module." + k: v for k, v in convert.to_openai(model.state_dict()).items()}
    torch.save({"state_dict": distributed}, tmp_path / "e.pt")
    check(convert.load(tmp_path / "e.pt", "tiny-quickgelu"), model)


def test_resnet_archive(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vision_layers=(1, 1, 1, 1), vision_width=8, image_size=32, projection_dim=16)
    config = CLIPResNetConfig(text_config=TEXT, **sizes)
    model = CLIPResNetModel(config).eval()
    visual = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    text = {k: v for k, v in model.state_dict().items() if k not in visual}
    tensors = {**convert.to_openai(text), **visual}
    read = convert.load(archive(tensors, tmp_path / "rn.pt"))
    pixels = torch.randn(2, 3, 32, 32)
    a, b = (m(input_ids=IDS, pixel_values=pixels, return_loss=True) for m in (read, model))
    assert torch.allclose(a.logits_per_image, b.logits_per_image, atol=1e-6)
    assert a.loss.isfinite() and read.config == config
    read.save_pretrained(tmp_path / "folder")
    again = convert.load(tmp_path / "folder")(IDS, pixels).logits_per_image
    assert torch.allclose(again, b.logits_per_image, atol=1e-6)
    with pytest.raises(ValueError, match="doesn't match model"):
        read.get_image_features(torch.zeros(1, 3, 64, 64))


def test_unknown_family_says_what_was_looked_for(tmp_path):
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="family not known; looked for visual.class_embedding .*begin "
                                           "encoder"):
        convert.load(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="no such file"):
        convert.load(tmp_path / "missing.pt")


def test_command_line(tmp_path, capsys):
    """A folder, or one line that says what is wrong with the file."""
    path = archive(convert.to_openai(tiny().state_dict()), tmp_path / "openai.pt")
    assert convert.main([str(path), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("CLIPModel, 0.") and CLIPModel.from_pretrained(tmp_path / "out")
    assert convert.main([str(tmp_path / "none.pt"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("convert: ") and said.count("\n") == 1 and "none.pt: no such file" in said


def test_folders(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    check(convert.load(tmp_path), model)
    CLIPTextModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "text")
    assert type(convert.load(tmp_path / "text")) is CLIPTextModel
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(WeightsError, match="model_type 'gpt2'.*known are clip"):
        convert.load(tmp_path)


def rewritten(source, target, **changes):
    """A copy of an archive with members replaced; None drops one."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = changes.get(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_hostile_archives(tmp_path):
    """No code runs, nothing but WeightsError comes out, and the line names the file."""
    good = archive(convert.to_openai(tiny().state_dict()), tmp_path / "good.pt")
    cases = {
        "evil": {"data.pkl": pickle.dumps(Evil(tmp_path / "ran"), 2)},
        "builtin": {"data.pkl": b"cbuiltins\neval\n(S'1'\ntR."},
        "torchload": {"data.pkl": b"ctorch\nload\n(S'x'\ntR."},
        "garbage": {"data.pkl": b"\x80\x02nonsense"},
        "empty": {"data.pkl": b""},
        "number": {"data.pkl": pickle.dumps(3, 2)},
        "short": {"data/0": b"\0"},
        "missing": {"data/0": None},
    }
    for name, changes in cases.items():
        path = rewritten(good, tmp_path / f"{name}.pt", **changes)
        with pytest.raises(WeightsError, match=f"{name}.pt: not a readable TorchScript archive") as caught:
            convert.load(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    raw = good.read_bytes()
    for cut in (10, len(raw) // 2, len(raw) - 30):
        (tmp_path / "cut.pt").write_bytes(raw[:cut])
        with pytest.raises(WeightsError):
            convert.load(tmp_path / "cut.pt")


def test_a_missing_tensor_is_named(tmp_path):
    tensors = convert.to_openai(tiny().state_dict())
    del tensors["ln_final.weight"]
    with pytest.raises(WeightsError, match="1 missing: text_model.final_layer_norm.weight"):
        convert.load(archive(tensors, tmp_path / "m.pt"))
    del tensors["text_projection"]
    with pytest.raises(WeightsError, match="tensor text_projection is missing"):
        convert.load(archive(tensors, tmp_path / "m.pt"))


@pytest.mark.parametrize("change, words", [
    (lambda t: t.update({"visual.conv1.weight": torch.zeros(3)}), "visual.conv1.weight has the shape"),
    (lambda t: t.update({"visual.proj": torch.zeros(3)}), "visual.proj has the shape"),
    (lambda t: t.update({"token_embedding.weight": torch.zeros(0, 64)}), "embedding.weight has the shape"),
    (lambda t: t.update({"token_embedding.weight": torch.zeros(50, 70_000)}), "hidden_size = 70000 must lie"),
    (lambda t: t.update({"transformer.resblocks.0.attn.in_proj_weight": torch.zeros(4, 2)}), "cannot be cut"),
    (lambda t: t.update({"text_projection": torch.zeros(64, 16, 1)}), "text_projection .* is no matrix"),
    (lambda t: [t.pop(k) for k in list(t) if "resblocks" in k], "resblocks.0.mlp.c_fc.weight is missing"),
    (lambda t: t.update({f"transformer.resblocks.{i}.x": torch.zeros(1) for i in range(999)}),
     "num_hidden_layers = 999 must lie"),
])  # fmt: skip
def test_odd_tensors_in_the_original_layout(change, words, tmp_path, monkeypatch):
    monkeypatch.setitem(convert.VIT, "tiny", None)
    tensors = convert.to_openai(tiny().state_dict())
    change(tensors)
    torch.save(tensors, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=f"m.pt: .*{words}") as caught:
        convert.load(tmp_path / "m.pt", "tiny")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_resnet_without_blocks(tmp_path, monkeypatch):
    monkeypatch.setitem(convert.RESNET, "tiny", None)
    tensors = convert.to_openai(tiny().state_dict())
    tensors |= {"visual.layer1.0.conv1.weight": torch.zeros(8, 1),
                "visual.attnpool.positional_embedding": torch.zeros(2, 2)}
    torch.save(tensors, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m.pt: vision_layers = \(1, 0, 0, 0\) must lie in 1 .. 64"):
        convert.load(tmp_path / "m.pt", "tiny")


def test_a_tree_that_a_few_bytes_make_endless(tmp_path):
    """Modules that stand in their parent twice: 2^20 names. And a 'put' at 2^32, for which C takes 64 GB."""
    good = archive(convert.to_openai(tiny().state_dict()), tmp_path / "good.pt")
    module = b"c__torch__\nM\n)\x81"
    tree = module + b"}b"
    for _ in range(19):     # {"a": tree, "b": the same}
        tree = module + b"}(X\x01\x00\x00\x00a" + tree + b"q\x01X\x01\x00\x00\x00bh\x01ub"
    path = rewritten(good, tmp_path / "wide.pt", **{"data.pkl": b"\x80\x02" + tree + b"."})
    with pytest.raises(WeightsError, match="wide.pt: .* more than 50000 tensors and modules"):
        convert.load(path)
    path = rewritten(good, tmp_path / "put.pt", **{"data.pkl": b"\x80\x02)r\xff\xff\xff\xff."})
    with pytest.raises(WeightsError, match="put.pt: .*no tree of modules"):
        convert.load(path)


def test_broken_archives_are_one_line(tmp_path):
    """Zips whose directory or end lies."""
    whole = archive(convert.to_openai(tiny().state_dict()), tmp_path / "whole.pt").read_bytes()
    rng, path = random.Random(1), tmp_path / "broken.pt"
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            broken[rng.randrange(len(whole) - 9000, len(whole))] = rng.choice((0, 1, 64, 255))
        path.write_bytes(broken)
        try:
            convert.load(path)
        except ValueError as error:
            assert "\n" not in str(error) and "broken.pt" in str(error) and len(str(error)) < 900


@pytest.mark.parametrize("values", [
    {"architectures": 3}, {"architectures": [[]]}, {"architectures": {"a": 1}}, {"model_type": []},
    {"model_type": {}}, {"architectures": ["x" * 10**6]},
])  # fmt: skip
def test_folders_that_name_no_class(tmp_path, values):
    write_json(tmp_path / "config.json", values)
    with pytest.raises(WeightsError, match="known are clip") as caught:
        convert.load(tmp_path)
    assert len(str(caught.value)) < 900
