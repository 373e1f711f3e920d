"""Against contrastive_loss."""

import torch
import torch.nn.functional as F
from compare import same

from miniclip.loss import contrastive_loss, floor, targets


def check(answer) -> str:
    """With duplicates and without."""
    logits = 3 * torch.randn(5, 5, dtype=torch.float64)
    for labels in (torch.tensor([0, 1, 0, 2, 0]), torch.arange(5)):
        wanted = targets(labels, 5, logits.device).double()
        counts = (labels[:, None] == labels[None]).double()

        def both(target):
            return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        right = contrastive_loss(logits, labels)
        same(answer.loss(logits, labels), right, f"the loss with labels {labels.tolist()}", 1e-6, {
            "an equal caption counts as wrong: spread the target over them": both(torch.eye(5).double()),
            "each row of the target has to sum to 1": both(counts),
            "only texts ask; pictures do as well, along columns": F.cross_entropy(logits, wanted),
            "only pictures ask; texts do as well, along rows": F.cross_entropy(logits.T, wanted),
            "the mean of both directions, not their sum": 2 * right})
    least = floor(torch.tensor([0, 1, 0, 2, 0]), 5)
    return f"with three equal captions of five the least possible loss is {least:.2f}"
