"""What is left of a LoRA once it is merged? docs/learn/23_lora/page.md"""

import torch


def merge(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, alpha: float) -> torch.Tensor:
    """W [out, in], A [r, in], B [out, r] -> the weight [out, in] of a plain layer that computes the same."""
    raise NotImplementedError
