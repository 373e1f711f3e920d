"""Losses that bring images and texts together, and large batches in chunks.

Read after model.py; image_text.py uses it all, and retrieval.py measures what they achieve.
Papers: Radford et al. 2021, section 2.3 (InfoNCE, the clamped temperature); Zhai et al. 2023 (SigLIP,
algorithm 1); Gao et al. 2021 (gradient cache).
Mirrors: open_clip/loss.py, and its --accum-freq.
Shapes: B pairs, E shared width, Bi pictures, Bt texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_LOGIT_SCALE = math.log(100)  # Radford 2021: the temperature is kept from going below 0.01
COLLAPSED = 0.97        # of the loss of equal embeddings: a loss above it has not learned anything


def same_captions(input_ids: Tensor) -> Tensor:
    """[B, S] -> [B] labels; two rows of equal tokens share one. Pad all rows to one length with one id."""
    return torch.unique(input_ids, dim=0, return_inverse=True)[1]


def targets(labels: Tensor | None, size: int, device: torch.device) -> Tensor:
    """[B, B] rows that sum to 1, spread evenly over the pairs of the same label;
    without labels the identity."""
    if labels is None:
        return torch.eye(size, device=device)
    if labels.shape != (size,):
        raise ValueError(f"labels of shape {list(labels.shape)} for a batch of {size} pairs")
    positive = (labels[:, None] == labels[None]).float()                      # [B, B]
    return positive / positive.sum(dim=1, keepdim=True)


def contrastive_loss(logits_per_text: Tensor, labels: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE in which duplicate captions count as positives.

    logits_per_text: [B, B], scaled. labels: [B], e.g. same_captions(input_ids).
    With all labels different it is model.clip_loss.
    With duplicates the least value is not 0 but the entropy of the targets: see floor().
    """
    B = logits_per_text.shape[0]
    if logits_per_text.shape != (B, B):
        raise ValueError("the loss needs pairs, but the batch has logits of shape "
                         f"{list(logits_per_text.shape)}")
    wanted = targets(labels, B, logits_per_text.device).to(logits_per_text.dtype)
    return (F.cross_entropy(logits_per_text, wanted) + F.cross_entropy(logits_per_text.T, wanted)) / 2


def floor(labels: Tensor | None, size: int) -> float:
    """The least value that contrastive_loss can take on a batch; 0 without duplicates."""
    wanted = targets(labels.cpu() if labels is not None else None, size, torch.device("cpu")).double()
    return (-(wanted * wanted.clamp_min(1e-300).log()).sum() / size).item()


def siglip_loss(similarity: Tensor, logit_scale: Tensor, logit_bias: Tensor,
                labels: Tensor | None = None) -> Tensor:
    """Every pair for itself: is this text of this picture? similarity: [B, B] cosines.

    logit_scale: ln of the factor, ln 10 at the start; logit_bias: -10 at the start.
    Sum over pairs, divided by B.
    """
    logits = similarity * logit_scale.exp() + logit_bias                      # [B, B]
    sign = 2 * (targets(labels, len(logits), logits.device) > 0).to(logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def clamp_temperature(logit_scale: nn.Parameter) -> None:
    """To be called after each optimizer step: keeps the factor exp(logit_scale) in 1..100."""
    with torch.no_grad():
        logit_scale.clamp_(0, MAX_LOGIT_SCALE)


# ---------------------------------------------------------------------------------------------- large batches


def cached_backward(
    encoders: Sequence[Callable[..., Tensor]],
    inputs: Sequence[Sequence[Tensor]],
    loss_of: Callable[..., Tensor],
    chunk: int,
) -> Tensor:
    """Backward of a loss over one large batch, holding the activations of `chunk` items at a time.

    encoders: functions to [n, E], e.g. picture and text features.
    inputs: for each encoder its tensors [B, ...].
    loss_of: the whole batch's embeddings, one tensor an encoder -> scalar.
    Adds to .grad of all parameters exactly what loss.backward() would, at the price of a second forward pass;
    plain accumulation would not, since every pair is in the loss of every other. Random layers see the same
    numbers twice. Not for batch norm in training mode, whose statistics would be those of the chunk.
    Returns the loss, detached.
    """
    pieces = [list(zip(*(t.split(chunk) for t in tensors), strict=True)) for tensors in inputs]
    states, cached = [], []
    with torch.no_grad():
        for encode, chunks in zip(encoders, pieces, strict=True):
            states.append([])
            embeddings = []
            for piece in chunks:
                states[-1].append(_random_state(piece))
                embeddings.append(encode(*piece))
            cached.append(torch.cat(embeddings).requires_grad_())             # [B, E]
    loss = loss_of(*cached)
    loss.backward()                                                           # as far as the embeddings
    after = _random_state([t for tensors in inputs for t in tensors])
    for encode, chunks, embeddings, saved in zip(encoders, pieces, cached, states, strict=True):
        for piece, gradient, state in zip(chunks, embeddings.grad.split(chunk), saved, strict=True):
            _set_random_state(state)
            encode(*piece).backward(gradient)                                 # and on from there
    _set_random_state(after)
    return loss.detach()


def _random_state(tensors: Sequence[Tensor]) -> tuple:
    device = next((t.device for t in tensors if t.device.type == "cuda"), None)
    return torch.get_rng_state(), device, torch.cuda.get_rng_state(device) if device else None


def _set_random_state(state: tuple) -> None:
    cpu, device, cuda = state
    torch.set_rng_state(cpu)
    if device is not None:
        torch.cuda.set_rng_state(cuda, device)
