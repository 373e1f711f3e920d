"""What if two pictures of a batch have the same caption? docs/learn/17_infonce/page.md"""

import torch


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits [B, B], scaled similarities; labels [B], equal for equal captions -> a scalar."""
    raise NotImplementedError
