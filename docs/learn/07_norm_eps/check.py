"""Against the modules of a small UNet, and two norms at work."""

import torch
import torch.nn.functional as F
from compare import same
from torch import nn

from miniclip.weights import skip_init
from minidiff import UNet2DConditionModel


def check(answer) -> str:
    """Every norm of the UNet; variances from 1 to what is nearly flat."""
    with skip_init():
        unet = UNet2DConditionModel(block_out_channels=(8, 16), norm_num_groups=8, cross_attention_dim=8,
                                    attention_head_dim=2,
                                    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                                    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    for name, module in unet.named_modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            found = answer.eps_of(name)
            kind = type(module).__name__
            assert found == module.eps, f"eps_of({name!r}) is {found}, but that {kind} has another"
    for variance in (1.0, 1e-2, 1e-4, 1e-6):
        x = torch.randn(1, 1, 4096, dtype=torch.float64)
        x = (x - x.mean()) * (variance / x.var(correction=0)) ** 0.5
        outputs = [F.group_norm(x, 1, eps=eps) for eps in (1e-5, 1e-6)]
        wanted = (outputs[0].norm() / outputs[1].norm()).item()
        same(answer.ratio(variance), wanted, f"ratio({variance})", 1e-9, {
            "the larger eps makes the smaller output": 1 / wanted, "a deviation is a root": wanted**2,
            "eps is added to the variance, under the root":
                (variance**0.5 + 1e-6) / (variance**0.5 + 1e-5)})
    gaps = [1 - answer.ratio(variance) for variance in (1.0, 1e-4)]
    return f"at variance 1 the outputs differ by {gaps[0]:.1e}, at 1e-4 by {gaps[1]:.0%}"
