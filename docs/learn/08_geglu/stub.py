"""Which half of GEGLU is the gate? docs/learn/08_geglu/page.md"""

import torch


def geglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x [..., C], weight [2 I, C], bias [2 I] -> [..., I]."""
    raise NotImplementedError
