"""ResNets against torchvision and open_clip, BERT towers and Chinese-CLIP against transformers."""

import pytest
import torch

from miniclip.bert import (
    BertConfig,
    BertTower,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    DistilBertConfig,
    DistilBertTower,
)
from miniclip.resnet import ModifiedResNet, ResNet

from .test_clip_model import BARS, error, randomized, tower

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def shaken(model, seed=0):
    """Random parameters and batch statistics: the defaults (0, 1) would hide a slip."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.is_floating_point() and t.ndim:
                fan = t[0].numel() if t.ndim > 1 else 1
                t.copy_(torch.randn(t.shape, generator=generator) / fan**0.5)
                if t.ndim == 1:
                    t.mul_(0.2).add_(1.0 if "weight" in name or "var" in name else 0.0).abs_()
    return model.eval()


def gradients_agree(ours, theirs, a, b, bar):
    a.square().sum().backward(), b.square().sum().backward()
    scale = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
    known = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert ((p.grad - known[name].grad).abs().max() / scale).item() <= bar, name


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("training", [False, True])
def test_resnet50_as_torchvision(dtype, training):
    torchvision = pytest.importorskip("torchvision")
    theirs = shaken(torchvision.models.resnet50(num_classes=2)).to(dtype)
    theirs.fc = torch.nn.Identity()
    ours = ResNet().to(dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    ours.train(training), theirs.train(training)
    x = torch.randn(3, 3, 64, 48, dtype=dtype)
    a, b = ours(x), theirs(x)
    assert a.shape == (3, 2048) and error(a, b) <= BARS[dtype]
    if not training:
        gradients_agree(ours, theirs, a, b, BARS[dtype])


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("layers, width, size", [((1, 1, 1, 1), 8, 64), ((2, 1, 2, 1), 16, 96)])
def test_modified_resnet_as_open_clip(dtype, layers, width, size):
    module = pytest.importorskip("open_clip.modified_resnet")
    heads = width * 32 // 64
    theirs = shaken(module.ModifiedResNet(layers, 24, heads, image_size=size, width=width)).to(dtype)
    ours = ModifiedResNet(layers, 24, heads, size, width).to(dtype).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, size, size, dtype=dtype)
    a, b = ours(x), theirs(x)
    assert error(a, b) <= BARS[dtype]
    gradients_agree(ours, theirs, a, b, 4 * BARS[dtype] if dtype == torch.float32 else BARS[dtype])


def bert_values(seed):
    return dict(vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                intermediate_size=32,
                max_position_embeddings=12, hidden_act=["gelu", "gelu_pytorch_tanh"][seed % 2])  # fmt: skip


def tokens():
    ids = torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
    return ids * mask, mask


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("seed", [0, 1])
def test_chinese_clip(dtype, seed, tmp_path):
    text, vision = bert_values(seed), tower(seed, True)
    theirs = transformers.ChineseCLIPModel(
        transformers.ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
    )
    randomized(theirs, seed).to(dtype).eval()
    ours = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=vision,
                                              projection_dim=10)).to(dtype)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    ours.eval()
    ids, mask = tokens()
    pixels = torch.randn(3, vision["num_channels"], vision["image_size"], vision["image_size"], dtype=dtype)
    call = dict(input_ids=ids, pixel_values=pixels, attention_mask=mask, return_loss=True)
    call["token_type_ids"] = torch.zeros_like(ids)
    a, b = ours(**call), theirs(**call)
    for name in ("loss", "logits_per_image", "text_embeds", "image_embeds"):
        assert error(a[name], b[name]) <= BARS[dtype], name
    a.loss.backward(), b.loss.backward()
    scale = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if q.grad is not None:
            assert ((p.grad - q.grad).abs().max() / scale).item() <= BARS[dtype], name
    a, b = (m.text_model(ids, mask, output_hidden_states=True).hidden_states for m in (ours, theirs))
    for x, y in zip(a, b, strict=True):
        assert error(x, y) <= BARS[dtype]
    theirs.float().save_pretrained(tmp_path / "theirs")
    read = ChineseCLIPModel.from_pretrained(tmp_path / "theirs", torch_dtype=dtype)
    read.save_pretrained(tmp_path / "ours")
    back = transformers.ChineseCLIPModel.from_pretrained(tmp_path / "ours", dtype=dtype)
    theirs.to(dtype)
    assert error(back(**call).loss, theirs(**call).loss) <= 1e-6


@pytest.mark.parametrize("dtype", BARS)
def test_bert_and_distilbert(dtype):
    ids, mask = tokens()
    values = bert_values(0)
    theirs = transformers.BertModel(transformers.BertConfig(**values), add_pooling_layer=False)
    ours = BertTower(BertConfig(**values))
    small = dict(vocab_size=40, dim=24, n_layers=2, n_heads=3, hidden_dim=32, max_position_embeddings=12)
    theirs_too = transformers.DistilBertModel(transformers.DistilBertConfig(**small))
    ours_too = DistilBertTower(DistilBertConfig(**small))
    for a, b in ((ours, theirs), (ours_too, theirs_too)):
        randomized(b, 1).to(dtype).eval()
        assert list(a.state_dict()) == list(b.state_dict())
        a.load_state_dict(b.state_dict())
        a.to(dtype).eval()
        for m in (None, mask):
            x, y = a(ids, m).last_hidden_state, b(ids, m).last_hidden_state
            assert error(x, y) <= BARS[dtype]
        gradients_agree(a, b, x, y, BARS[dtype])
        plain = a(ids, mask, output_attentions=True)
        assert error(plain.last_hidden_state, x) <= 2e-6 and plain.attentions[0].shape == (3, 3, 9, 9)
