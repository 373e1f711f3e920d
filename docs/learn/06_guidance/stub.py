"""What does guidance add to a prediction? docs/learn/06_guidance/page.md"""

from collections.abc import Callable

import torch


def guided(predict: Callable[..., torch.Tensor], x: torch.Tensor, t: float, free: torch.Tensor,
           text: torch.Tensor, s: float) -> torch.Tensor:
    """eps [B, L, h, w] with guidance s. predict(x, t, context) is the network; call it once."""
    raise NotImplementedError
