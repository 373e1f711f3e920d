"""Remove the skips: what happens to the loss? docs/learn/12_no_skips/page.md"""

import torch

PREDICTION = "?"        # "lower", "about equal" or "higher"


def up_without_skips(block: torch.nn.Module, h: torch.Tensor, skips: list[torch.Tensor],
                     temb: torch.Tensor) -> torch.Tensor:
    """UpBlock.forward without attention, zeros in place of skips. block: has .resnets and .upsamplers."""
    raise NotImplementedError
