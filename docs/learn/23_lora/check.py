"""Against LoRALinear.merged, and LoRALinear at work."""

import torch
from compare import same
from torch import nn

from minidiff.lora import LoRALinear


@torch.no_grad()
def check(answer) -> None:
    """A square layer, in which some wrong orders fit, and one that is not."""
    for size, r, alpha in ((6, 3, 12.0), (6, 2, 1.0), (4, 3, 2.0)):
        base = nn.Linear(6, size, dtype=torch.float64)
        layer = LoRALinear(base, r, alpha / r)
        nn.init.normal_(layer.lora_B.weight)
        W, A, B = base.weight.clone(), layer.lora_A.weight, layer.lora_B.weight
        found = answer.merge(W.clone(), A, B, alpha)
        same(found, layer.merged().weight, f"the weight with r = {r}, alpha = {alpha}", 1e-9, {
            "alpha is divided by r, the rank": W + alpha * B @ A, "alpha / r is missing": W + B @ A,
            "alpha is divided by r, not multiplied": W + alpha * r * B @ A,
            "W itself is missing": alpha / r * B @ A,
            "first A, then B, so the weight is B A": W + alpha / r * (B @ A).T if size == 6 else W})
        x = torch.randn(3, 6, dtype=torch.float64)
        same(nn.functional.linear(x, found, base.bias), layer(x), "the merged layer's output", 1e-9)
