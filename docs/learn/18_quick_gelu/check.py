"""Against quick_gelu of the towers and torch's GELU."""

import torch
import torch.nn.functional as F
from compare import same

from miniclip.model import quick_gelu


def check(answer) -> None:
    """The function, then its gap on a fine grid."""
    x = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    same(answer.quick_gelu(x), quick_gelu(x), "quick_gelu", 1e-9, {
        "that is the exact GELU": F.gelu(x), "that is the tanh form": F.gelu(x, approximate="tanh"),
        "that is SiLU: there is a factor of 1.702 inside": F.silu(x),
        "1.702 stands inside the sigmoid": 1.702 * F.silu(x)})
    grid = torch.linspace(0, 6, 60001, dtype=torch.float64)
    gaps = (quick_gelu(grid) - F.gelu(grid)).abs()
    where, gap = grid[gaps.argmax()].item(), gaps.max().item()
    found = answer.largest_gap()
    assert len(found) == 2, "largest_gap returns two numbers"
    same(found[1], gap, "the largest gap", 1e-4, {
        "that is the gap of the tanh form": (F.gelu(grid, approximate="tanh") - F.gelu(grid)).abs().max()})
    same(found[0], where, "the place of the largest gap", 0.005)
