"""Why will this checkpoint not load? docs/learn/22_missing_key/page.md"""

import torch


def mend(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of CLIPVisionModel that somebody cleaned up -> one that loads."""
    raise NotImplementedError
