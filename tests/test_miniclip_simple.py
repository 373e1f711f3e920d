"""The tutorial's path: the model builds, one batch passes, one round trains, the loss falls and R@1 rises."""

import math

import pytest
import torch
import torch.nn.functional as F

from miniclip import CLIPTextConfig, CLIPTokenizer, ConfigError
from miniclip.loss import contrastive_loss
from miniclip.model import normalize
from miniclip.retrieval import recall
from miniclip.simple import ProjectionHead, SimpleCLIPConfig, SimpleCLIPModel

HERBS = ["人蔘", "韓國人蔘", "枸杞", "銀川枸杞"]


def small():
    """A ResNet of four blocks and a text transformer of two; four pictures of coloured noise."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.train(HERBS * 2, vocab_size=540, model_max_length=16)
    text = CLIPTextConfig.for_tokenizer(
        tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    sizes = dict(image_layers=(1, 1, 1, 1), image_width=8, projection_dim=32)
    model = SimpleCLIPModel(SimpleCLIPConfig(text_config=text, **sizes))
    batch = dict(tokenizer(HERBS, padding=True, return_tensors="pt"))
    batch["image"] = torch.rand(4, 3, 1, 1) + 0.3 * torch.randn(4, 3, 64, 64)
    return model, batch


def test_the_four_gates():
    model, batch = small()
    first = model(batch)
    assert first.ndim == 0 and first.isfinite()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.1 < losses[0]
    model.eval()
    with torch.no_grad():
        scores = model.encode_text(batch["input_ids"],
                                   batch["attention_mask"]) @ model.encode_image(batch["image"]).T
    pairs = torch.eye(4, dtype=torch.bool)
    assert recall(scores, pairs) == recall(scores.T, pairs) == 1.0


def tutorials_loss(images, texts):
    """The loss of the tutorial: no normalisation, targets that the model makes itself,
    and may agree with itself on."""
    logits = texts @ images.T
    wanted = ((images @ images.T + texts @ texts.T) / 2).softmax(dim=-1)
    by_text = -(wanted * logits.log_softmax(dim=-1)).sum(1)
    by_image = -(wanted.T * logits.T.log_softmax(dim=-1)).sum(1)
    return ((by_text + by_image) / 2).mean()


def test_the_tutorials_loss_falls_without_learning():
    """Heads on fixed random features of 4 pairs: its loss ends near ln 4 and R@1 at chance,
    ours at 0 and 1."""
    results = {}
    for ours in (False, True):
        scores = []
        for seed in range(3):
            torch.manual_seed(seed)
            pictures = torch.randn(4, 64) * 0.05 + torch.randn(64)
            captions = torch.randn(4, 32) * 0.05 + torch.randn(32)
            heads = ProjectionHead(64, 32, 0.1), ProjectionHead(32, 32, 0.1)
            optimizer = torch.optim.AdamW([p for h in heads for p in h.parameters()], lr=1e-3,
                                          weight_decay=1e-3)
            for _ in range(150):
                images, texts = heads[0](pictures), heads[1](captions)
                if ours:
                    loss = contrastive_loss(normalize(texts) @ normalize(images).T / 0.07)
                else:
                    loss = tutorials_loss(images, texts)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                images, texts = normalize(heads[0].eval()(pictures)), normalize(heads[1].eval()(captions))
                likeness = F.cosine_similarity(images[:, None], images[None],
                                               dim=-1).fill_diagonal_(0).sum() / 12
                found = recall(texts @ images.T, torch.eye(4, dtype=torch.bool))
            scores.append((loss.item(), found, likeness.item()))
        results[ours] = [sum(x) / 3 for x in zip(*scores, strict=True)]
    blind, ours = results[False], results[True]
    assert abs(blind[0] - math.log(4)) < 0.3 and blind[1] <= 0.6 and blind[2] > 0.95, blind
    assert ours[0] < 0.2 and ours[1] == 1.0 and ours[2] < 0.8, ours


def test_duplicate_captions_and_given_ids():
    """Equal captions are found. Ids go before captions: equal ones of different captions are no wrong answers
    either."""
    model, batch = small()
    model.eval().logit_scale.data.fill_(4.0)        # far from equal logits, whatever the first weights are
    twice = {k: torch.cat([v, v]) for k, v in batch.items()}
    twice["image"] = torch.rand(8, 3, 64, 64)
    found, given = model(twice), model({**twice, "id": torch.arange(4).repeat(2)})
    pairs = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    logits = model.encode_text(twice["input_ids"],
                               twice["attention_mask"]) @ model.encode_image(twice["image"]).T
    wanted = contrastive_loss(logits * model.logit_scale.exp(), pairs)
    # (all ids different would give the same sum: equal logits)
    assert torch.equal(found, given)
    assert model({**twice, "id": pairs}).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (wanted - found).abs() > 0.01


def test_folder(tmp_path):
    model, batch = small()
    model.eval().save_pretrained(tmp_path)
    back = SimpleCLIPModel.from_pretrained(tmp_path)
    assert back.config == model.config and torch.equal(back(batch), model(batch))


def test_distilbert_and_default():
    text = dict(vocab_size=30, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=8)
    model = SimpleCLIPModel(
        SimpleCLIPConfig(text_encoder="distilbert", text_config=text, image_layers=(1, 1, 1, 1),
                         image_width=8)
    )
    loss = model({"image": torch.rand(2, 3, 32, 32), "input_ids": torch.tensor([[1, 2], [3, 4]])})
    assert loss.isfinite()
    with torch.device("meta"):
        assert SimpleCLIPModel().num_parameters() > 20e6
    with pytest.raises(ConfigError, match="text_encoder = 'word2vec'"):
        SimpleCLIPConfig(text_encoder="word2vec")
