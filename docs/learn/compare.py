"""What the checks share: one sentence for what is not as it should be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def same(found: Any, wanted: Any, what: str, tolerance: float = 1e-6,
         mistakes: dict[str, Any] | None = None) -> None:
    """Raises AssertionError unless `found` is `wanted`: numbers, lists of them or tensors.

    tolerance: of the largest number, or of 1. mistakes: sentence -> what one finds who made it.
    """
    wanted = numbers(wanted, what)
    assert found is not None, f"{what} is None: is a return missing?"
    found = numbers(found, what)
    assert found.shape == wanted.shape, f"{what} has shape {list(found.shape)}, not {list(wanted.shape)}"
    if close(found, wanted, tolerance):
        return
    for sentence, mistaken in (mistakes or {}).items():
        assert not close(found, numbers(mistaken, what), tolerance), f"{what}: {sentence}"
    raise AssertionError(f"{what} is off by up to {(found - wanted).abs().max():.2g}")


def numbers(value: Any, what: str) -> Tensor:
    """As a tensor of float64."""
    try:
        return torch.as_tensor(value).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise AssertionError(f"{what} is a {type(value).__name__}, not numbers") from None


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Of one shape, and nowhere further apart. NaN is close to nothing."""
    if a.shape != b.shape:
        return False
    if not a.numel():
        return True
    return bool((a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()))
