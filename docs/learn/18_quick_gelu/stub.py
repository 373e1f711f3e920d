"""How far is quick_gelu from GELU? docs/learn/18_quick_gelu/page.md"""

import torch


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """OpenAI's activation."""
    raise NotImplementedError


def largest_gap() -> tuple[float, float]:
    """(x, gap): where quick_gelu and the exact GELU are furthest apart for x > 0, and how far."""
    raise NotImplementedError
