"""Why does int8 need a factor for each channel? docs/learn/24_int8/page.md"""

import torch


def quantize(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W [K, ...] -> numbers of W's shape, int8, and factors [K, 1, ...]."""
    raise NotImplementedError
