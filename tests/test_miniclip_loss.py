"""miniclip/loss.py: duplicates, SigLIP, the gradient cache, retrieval numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miniclip import CLIPConfig, CLIPModel
from miniclip.loss import (
    cached_backward,
    clamp_temperature,
    contrastive_loss,
    floor,
    same_captions,
    siglip_loss,
)
from miniclip.model import clip_loss, normalize
from miniclip.retrieval import chance, ranks, recall

torch.set_num_threads(1)


def test_without_duplicates_it_is_clips_loss():
    logits = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(contrastive_loss(logits), clip_loss(logits), rtol=0, atol=1e-15)
    labelled = contrastive_loss(logits, torch.tensor([4, 0, 2, 9, 1]))
    assert torch.allclose(labelled, clip_loss(logits), rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match=r"\[5, 4\]"):
        contrastive_loss(logits[:, :4])


def test_duplicates_are_not_wrong_answers():
    """Two pictures of one caption: the blind loss pushes them apart, ours is content with equal scores."""
    labels = same_captions(torch.tensor([[1, 5, 2], [1, 7, 2], [1, 5, 2]]))
    assert labels[0] == labels[2] != labels[1]
    perfect = torch.tensor([[50.0, 0, 50], [0, 50, 0], [50, 0, 50]], requires_grad=True)
    loss = contrastive_loss(perfect, labels)
    loss.backward()
    assert abs(loss.item() - floor(labels, 3)) < 1e-5 and floor(labels,
                                                                3) == pytest.approx(2 / 3 * math.log(2))
    assert perfect.grad.abs().max() < 1e-6
    blind = torch.autograd.grad(clip_loss(perfect), perfect)[0]
    assert blind.abs().max() > 0.1
    assert floor(None, 4) == 0


def test_siglip():
    s, scale, bias = torch.tensor([[0.9, -0.1], [0.2, 0.8]]), torch.tensor(10.0).log(), torch.tensor(-10.0)
    by_hand = 0.0
    for i in range(2):
        for j in range(2):
            z = (1 if i == j else -1) * (10 * s[i, j] - 10)
            by_hand += math.log(1 + math.exp(-z)) / 2
    assert siglip_loss(s, scale, bias).item() == pytest.approx(by_hand, rel=1e-5)
    both = siglip_loss(s, scale, bias, torch.tensor([3, 3]))
    assert both.item() == pytest.approx(-F.logsigmoid(10 * s - 10).sum().item() / 2, rel=1e-5)


def test_clamp():
    p = nn.Parameter(torch.tensor(9.0))
    clamp_temperature(p)
    assert p.item() == pytest.approx(math.log(100))


def tiny():
    torch.manual_seed(0)
    text = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32,
                vocab_size=40,
                max_position_embeddings=8, eos_token_id=39, attention_dropout=0.3)  # fmt: skip
    vision = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32,
                  image_size=8,
                  patch_size=4)  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).double()


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("training", [False, True])
def test_gradient_cache_equals_the_big_batch(chunk, training):
    """Same loss, same gradients, the temperature's too.
    With dropout, against the same masks drawn in chunks."""
    model = tiny().train(training)
    ids = torch.randint(0, 39, (7, 5), generator=torch.Generator().manual_seed(1))
    pixels = torch.randn(7, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    images = lambda x: normalize(model.get_image_features(x))  # noqa: E731
    texts = lambda x: normalize(model.get_text_features(x))  # noqa: E731
    loss_of = lambda i, t: contrastive_loss(t @ i.T * model.logit_scale.exp())  # noqa: E731

    torch.manual_seed(3)
    loss = cached_backward((images, texts), ((pixels,), (ids,)), loss_of, chunk)
    cached = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(3)
    whole = loss_of(*(torch.cat([f(p) for p in x.split(chunk)]) for f, x in ((images, pixels), (texts, ids))))
    whole.backward()
    assert torch.allclose(loss, whole, rtol=0, atol=1e-14)
    for (name, p), g in zip(model.named_parameters(), cached, strict=True):
        assert torch.allclose(p.grad, g, rtol=0, atol=1e-13), name


def test_plain_accumulation_would_differ():
    """The reason for the cache: the mean of two half batches' losses is another number."""
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    halves = (clip_loss(logits[:3, :3]) + clip_loss(logits[3:, 3:])) / 2
    assert abs(halves - clip_loss(logits)) > 0.1


def test_ranks():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [0.0, 5.0, 4.0]])
    pairs = torch.eye(3, dtype=torch.bool)
    assert ranks(scores, pairs).tolist() == [0, 2, 1]  # equal scores are no success
    assert recall(scores, pairs) == pytest.approx(1 / 3) and recall(scores, pairs, 2) == pytest.approx(2 / 3)
    double = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert ranks(scores, double).tolist() == [0, 1, 1]
    assert chance(pairs) == pytest.approx(1 / 3) and chance(pairs, 2) == pytest.approx(2 / 3)
    assert chance(double) == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    with pytest.raises(ValueError):
        ranks(scores, torch.zeros(3, 3, dtype=torch.bool))
