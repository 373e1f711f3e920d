"""What does a fused attention kernel compute? docs/learn/10_attention/page.md"""

import torch


def attend(x: torch.Tensor, context: torch.Tensor, Wq: torch.Tensor, Wk: torch.Tensor, Wv: torch.Tensor,
           nh: int) -> torch.Tensor:
    """x [B, T, C], context [B, S, D], Wq [C, C], Wk and Wv [C, D] -> [B, T, C], with nh heads."""
    raise NotImplementedError
