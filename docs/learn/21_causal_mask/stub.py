"""Why is a masked score not minus infinity? docs/learn/21_causal_mask/page.md"""

import torch


def causal_bias(S: int, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """mask [B, S], 1 = a real token -> what is added to the scores, [B, 1, S, S]."""
    raise NotImplementedError
