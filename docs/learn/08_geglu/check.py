"""Against the module GEGLU in float64."""

import torch
import torch.nn.functional as F
from compare import same

from minidiff.attention import GEGLU


@torch.no_grad()
def check(answer) -> None:
    """A batch of tokens, wide enough that the tanh form shows."""
    module = GEGLU(6, 8).double()
    x, weight, bias = 4 * torch.randn(2, 5, 6, dtype=torch.float64), module.proj.weight, module.proj.bias
    first, second = F.linear(x, weight, bias).chunk(2, dim=-1)
    same(answer.geglu(x, weight, bias), module(x), "y", 1e-9, {
        "the first half is the value, the second one the gate": second * F.gelu(first),
        "the GELU is the exact one, with erf, not its tanh form": first * F.gelu(second, approximate="tanh"),
        "that is SwiGLU: the gate goes through a GELU, not a SiLU": first * F.silu(second),
        "the gate goes through a GELU, not a sigmoid": first * second.sigmoid()})
