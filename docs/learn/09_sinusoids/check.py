"""Against sinusoids() of the UNet."""

import torch
from compare import same

from minidiff.embeddings import sinusoids


def check(answer) -> None:
    """Both orders, both shifts; float32 rounds angles of up to 999."""
    t, D = torch.tensor([0, 1, 500, 999]), 32
    for flip in (True, False):
        for shift in (0, 1):
            wanted = sinusoids(t, D, flip, shift)
            halves = torch.stack(wanted.chunk(2, dim=-1), dim=-1)
            same(answer.sinusoids(t, D, flip, shift), wanted, f"flip = {flip}, shift = {shift}", 1e-3, {
                "sines and cosines changed places": sinusoids(t, D, not flip, shift),
                "sines and cosines are joined, not interleaved": halves.flatten(1),
                "there is a shift in the exponent's denominator": sinusoids(t, D, flip, 1 - shift)})
