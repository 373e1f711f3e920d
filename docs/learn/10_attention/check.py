"""Against the module Attention, whose kernel is fused, in float64."""

import torch
from compare import same
from torch import nn

from minidiff.attention import Attention


@torch.no_grad()
def check(answer) -> None:
    """Cross-attention of 5 positions to 3 tokens, 2 heads of 4."""
    module = Attention(8, 6, 2).double()
    module.to_out = nn.Identity()
    x, context = (3 * torch.randn(2, *shape, dtype=torch.float64) for shape in ((5, 8), (3, 6)))
    weights = [layer.weight for layer in (module.to_q, module.to_k, module.to_v)]
    q, k, v = (module.split(a @ w.T) for a, w in zip((x, context, context), weights))

    def result(scores, v=v):
        return (scores @ v).transpose(1, 2).flatten(2)

    scores = q @ k.transpose(-1, -2)
    mixed = [y.transpose(1, 2).flatten(2).unflatten(-1, (-1, 2)).permute(0, 3, 1, 2) for y in (q, k, v)]
    same(answer.attend(x, context, *weights, 2), module(x, context), "the result", 1e-9, {
        "divide the scores by sqrt(hd)": result(scores.softmax(-1)),
        "hd is the width of one head, C / nh": result((scores / 8**0.5).softmax(-1)),
        "the root of hd, not hd": result((scores / 4).softmax(-1)),
        "the softmax runs over the tokens, the last dimension": result((scores / 2).softmax(-2)),
        "a head is hd neighbouring channels: unflatten(-1, (nh, -1))":
            result((mixed[0] @ mixed[1].transpose(-1, -2) / 2).softmax(-1), mixed[2])})
