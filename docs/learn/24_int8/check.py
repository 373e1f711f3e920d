"""Against quantized()."""

import torch
from compare import same

from miniclip.int8 import quantized


def check(answer) -> str:
    """A linear layer's weight and a convolution's, with channels of very different widths."""
    for shape in ((4, 16), (4, 3, 3, 3)):
        W = torch.randn(shape) * torch.tensor([1.0, 10.0, 0.01, 0.1]).reshape(-1, *[1] * (len(shape) - 1))
        numbers, scale = quantized(W)
        found = answer.quantize(W)
        assert len(found) == 2, "quantize returns two tensors: the numbers and the factors"
        assert getattr(found[1], "ndim", 0), "one factor for all: each output channel needs its own"
        same(found[1], scale, "the factors", 1e-7, {
            "the numbers go to 127, not 128": scale * 127 / 128,
            "these are the maxima, not yet divided by 127": scale * 127,
            "the widest number counts, whatever its sign": W.flatten(1).amax(1).view_as(scale) / 127})
        assert found[0].dtype == torch.int8, f"the numbers are {found[0].dtype}, not torch.int8"
        same(found[0], numbers, "the numbers", 0.0, {
            "they have to be rounded before they are cut to int8": (W / scale).to(torch.int8)})
    one = W.abs().max() / 127
    kept = numbers * scale, (W / one).round() * one
    off = [((each - W)[2].norm() / W[2].norm()).item() for each in kept]
    return f"the narrowest channel is off by {off[0]:.1%}, with one factor for all by {off[1]:.0%}"
