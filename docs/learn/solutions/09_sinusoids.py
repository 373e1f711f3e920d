import math

import torch


def sinusoids(t: torch.Tensor, D: int, flip: bool, shift: float) -> torch.Tensor:
    frequency = torch.exp(-math.log(10000) * torch.arange(D // 2) / (D // 2 - shift))
    angle = t[:, None] * frequency[None]
    halves = [angle.sin(), angle.cos()]
    return torch.cat(halves[::-1] if flip else halves, dim=-1)
