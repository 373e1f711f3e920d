import torch
import torch.nn.functional as F


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    equal = (labels[:, None] == labels[None]).to(logits)
    wanted = equal / equal.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2
