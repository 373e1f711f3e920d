"""Which token speaks for the whole text? docs/learn/19_end_of_text/page.md"""

import torch


def pool(hidden: torch.Tensor, ids: torch.Tensor, eos: int) -> torch.Tensor:
    """hidden [B, S, D], ids [B, S], eos the config's eos_token_id -> [B, D]."""
    raise NotImplementedError
