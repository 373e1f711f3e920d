"""The optimizer: Muon for the weight matrices, AdamW for everything else,
and the schedule of the learning rate.

On a few pictures and a few hundred steps Muon learns about twice as fast per step as AdamW
(docs/experiments.md).
Sources: Jordan 2024, "Muon: an optimizer for hidden layers in neural networks" (the method and the
polynomial); Loshchilov 2019 (AdamW's decoupled weight decay).
torch.optim.Muon takes matrices only; ours takes convolutions too.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from .errors import UserError

QUINTIC = (3.4445, -4.7750, 2.0315)     # Jordan 2024: steep at 0, and near 1 for singular values from 0 to 1
BETAS = (0.9, 0.99)         # AdamW's; torch's 0.999 remembers longer than a run of a few hundred steps lasts
WEIGHT_DECAY = 0.01         # of matrices, in Muon and AdamW alike: torch's default
LAST_RATE = 0.01            # of the peak learning rate, at the end


def orthogonalize(matrices: Tensor, steps: int = 3) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: all singular values are pushed towards 1.

    matrices [N, rows, columns] of any scale; a quintic polynomial in the matrix, applied a few times.
    """
    a, b, c = QUINTIC
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.transpose(1, 2)
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)                                        # [N, rows, rows], the small side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices else x.transpose(1, 2)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for weights of two or more dimensions (a convolution is a matrix out x
    rest)."""

    def __init__(self, params: list[Tensor], lr: float = 0.02, momentum: float = 0.95,
                 weight_decay: float = WEIGHT_DECAY):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient; the rest do not even decay."""
        for group in self.param_groups:
            # equal shapes share one batched product: fewer, larger operations
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.flatten(1).shape].append(p)
            for params in by_shape.values():
                self._update(params, group)

    def _update(self, params: list[Tensor], group: dict) -> None:
        rows, columns = params[0].flatten(1).shape
        buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
        updates = orthogonalize(torch.stack([u.flatten(1) for u in nesterov]))
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, [u.reshape(p.shape) for u, p in zip(updates, params, strict=True)],
                            alpha=-lr)


def build_optimizers(model: nn.Module, name: str, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (embedding tables apart) and AdamW for the rest, or AdamW for all."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    params = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in params if p.ndim >= 2 and id(p) not in tables] if name == "muon" else []
    chosen = {id(p) for p in matrices}
    decayed = [p for p in params if id(p) not in chosen and p.ndim >= 2]
    plain = [p for p in params if id(p) not in chosen and p.ndim == 1]      # norms and biases: no decay
    # apart: FSDP shards all else and leaves them whole
    scalars = [p for p in params if p.ndim == 0]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    groups += [{"params": scalars, "weight_decay": 0.0}] if scalars else []
    adamw = torch.optim.AdamW(groups, lr=lr, betas=BETAS)
    optimizers = [Muon(matrices, lr=muon_lr), adamw] if matrices else [adamw]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


def descend(loss: Tensor, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """One step of all optimizers down this loss, its gradients clipped to a norm of 1.

    Raises UserError for a loss that is not finite: the weights are then worth nothing.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    if not torch.isfinite(loss):
        raise UserError(f"the loss is {loss.item()}; nothing saved: try a lower --muon-lr")


def parameter_count(model: nn.Module) -> int:
    """How many numbers learn; frozen ones are not counted."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to LAST_RATE at the end: the fall is what cleans the strokes.

    Returns the factor on every group's peak rate.
    """
    falling = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
    factor = min(1.0, (step + 1) / max(warmup, 1)) * falling
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak_lr"] * factor
    return factor
