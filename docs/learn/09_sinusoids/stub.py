"""What does flip_sin_to_cos flip? docs/learn/09_sinusoids/page.md"""

import torch


def sinusoids(t: torch.Tensor, D: int, flip: bool, shift: float) -> torch.Tensor:
    """t [B] -> [B, D]; sines first, cosines first with flip. shift: freq_shift, 0 or 1."""
    raise NotImplementedError
