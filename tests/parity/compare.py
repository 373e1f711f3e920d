"""How two implementations of a model are compared: same keys, numbers, gradients;
the first divergence named."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BAR = {torch.float64: 1e-12, torch.float32: 2e-6}
LARGEST: dict[tuple[str, str, torch.dtype], float] = defaultdict(float)    # (test, of what, dtype)


def relative_error(ours: Tensor, theirs: Tensor, least: float = 1e-30) -> float:
    """max |difference| / max |theirs|, counted as `least` at least; infinite if shapes differ or anything is
    not finite."""
    if ours.shape != theirs.shape or not torch.isfinite(ours).all():
        return float("inf")
    return keep(((ours - theirs).abs().max() / theirs.abs().max().clamp(min=least)).item(), theirs.dtype)


def keep(error: float, dtype: torch.dtype, of: str = "numbers") -> float:
    """The error as it is; the largest of each test is noted for the table that closes the run."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split("[")[0].split(" ")[0]
    LARGEST[test, of, dtype] = max(LARGEST[test, of, dtype], error)
    return error


def assert_same_keys(ours: nn.Module, theirs: nn.Module) -> None:
    """The same names and shapes in the same order."""
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert [v.shape for v in mine.values()] == [v.shape for v in other.values()]


def assert_same_function(ours: nn.Module, theirs: nn.Module, call: Callable[[nn.Module], Tensor],
                         dtype: torch.dtype = torch.float64) -> None:
    """`call(model)` gives equal outputs and equal gradients of all parameters;
    weights are copied from theirs."""
    assert_same_keys(ours, theirs)
    theirs.to(dtype)
    ours.to(dtype).load_state_dict(theirs.state_dict())
    mine, my_stages = _recorded(ours, call)
    other, their_stages = _recorded(theirs, call)
    error = relative_error(mine, other)
    if error > BAR[dtype]:
        where = _first_divergence(my_stages, their_stages, dtype)
        raise AssertionError(f"output differs by {error:.1e}; {where}")
    weight = torch.randn(other.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    (mine * weight).sum().backward()
    (other * weight).sum().backward()
    scale = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), f"gradient of {name} exists on one side only"
        if p.grad is not None:
            error = ((p.grad - q.grad).abs().max() / torch.maximum(q.grad.abs().max(), 1e-3 * scale)).item()
            keep(error, dtype, "gradients")
            assert error <= 50 * BAR[dtype], f"gradient of {name} differs by {error:.1e}"


def _recorded(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    stages: dict[str, Tensor] = {}

    def note(name: str) -> Callable:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            if isinstance(output, Tensor) and name not in stages:
                stages[name] = output.detach().clone()
        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    output = call(model)
    for hook in hooks:
        hook.remove()
    return output, stages


def _first_divergence(mine: dict[str, Tensor], other: dict[str, Tensor], dtype: torch.dtype) -> str:
    """The first stage, in the order of execution, that both have under one name and that differs."""
    for name, value in other.items():
        if name in mine and relative_error(mine[name], value) > BAR[dtype]:
            return f"first at {name} ({relative_error(mine[name], value):.1e})"
    return "no single stage differs"
