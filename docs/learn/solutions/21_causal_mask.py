import torch


def causal_bias(S: int, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    allowed = torch.ones(S, S, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
