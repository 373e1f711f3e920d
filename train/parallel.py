"""Several processes that train as one: torchrun starts them, and each works on its rows of the same batch.

    torchrun --nproc-per-node 2 -m train.train_diffusion --data data/calligraphy --out out/calligraphy

Read after common.py. Every process draws the random numbers of the whole batch and keeps its share of the rows. So the
result does not depend on how many there are, but for rounding, and a run may go on with another number of them.
Papers: Li 2020 (DDP); Zhao 2023 (FSDP). Both are PyTorch's own; what is ours is how a batch is shared.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.common import UserError, local, whole


class Group(NamedTuple):
    """This process's place among `size`; the one of rank 0 prints and writes files."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)

    def shares(self, batch: int, pieces: int) -> list[slice]:
        """This process's rows of a batch, in `pieces` equal parts: what it holds in memory at a time."""
        rows = batch // (self.size * pieces)
        first = self.rank * rows * pieces
        return [slice(first + i * rows, first + (i + 1) * rows) for i in range(pieces)]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [B/n, E] of all processes, in order: [B, E], with gradient."""
        return rows if self.size == 1 else Gather.apply(rows)

    def mean(self, *values: float) -> list[float]:
        """The mean over all processes, on each of them."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64 if self.device.type == "cpu" else None, device=self.device)
        dist.all_reduce(total)
        return (total / self.size).tolist()

    def must_agree(self, **values: Any) -> None:
        """Ends all processes in one line where one of them was started with other flags, or sees other data."""
        lists: list[Any] = [values] * self.size
        if self.size > 1:
            dist.all_gather_object(lists, values)
        for name in values:
            found = list(dict.fromkeys(str(other.get(name)) for other in lists))
            if len(found) > 1:
                raise UserError(f"the processes differ in {name}: {' and '.join(found)}; start all of them alike")

    def union(self, texts: Iterable[str]) -> list[str]:
        """The texts of all processes, each once, on each of them."""
        lists: list[Any] = [list(texts)]
        if self.size > 1:
            lists *= self.size
            dist.all_gather_object(lists, lists[0])
        return list(dict.fromkeys(text for some in lists for text in some))


def join(device: torch.device) -> Group:
    """Meets the other processes if torchrun started this one; otherwise a group of one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:         # how torchrun makes itself known
        return Group(0, 1, device)
    if not dist.is_available():
        raise UserError("torchrun: this build of PyTorch has no torch.distributed")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return Group(dist.get_rank(), dist.get_world_size(), device)


class Loss(nn.Module):
    """A loss function of a model, as a module: DDP averages the gradients of what went through a forward pass."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any) -> Tensor:
        return self.function(self.model, *args)


def replicate(loss: Loss, group: Group, unused: bool = False) -> nn.Module:
    """The same loss, whose backward pass leaves the mean of all processes' gradients.

    `unused`: some weights may have no part in the loss, as in a text tower whose pooler nobody asks.
    """
    return loss if group.size == 1 else DistributedDataParallel(loss, find_unused_parameters=unused)


def check_shard(cfg: Any, processes: int | None = None) -> None:
    """Refuses what --shard of either script cannot go with; the number of processes is known later than the flags."""
    if cfg.shard and (cfg.optimizer == "muon" or cfg.lora or cfg.compile or cfg.precision == "fp16"):
        raise UserError("--shard: not with --lora, --compile or fp16, and with --optimizer adamw, as Muon needs whole matrices")
    if cfg.shard and processes == 1:
        raise UserError("--shard: there is one process only; start several with torchrun")


def gather_into(twin: nn.Module, model: nn.Module, group: Group) -> None:
    """The weights that --shard has shared out, put together in the first process's twin of the model."""
    weights = whole(model.state_dict())
    if group.main:
        twin.load_state_dict(weights)


def shard(parts: list[nn.Module], group: Group) -> None:
    """FSDP2: each process keeps 1/n of every weight, gradient and optimizer state; blocks meet only while they compute.

    parts: modules from the inside out, e.g. a UNet's blocks, then the UNet.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise UserError(f"--shard: needs PyTorch 2.6 or newer, this is {torch.__version__}") from None
    mesh = init_device_mesh(group.device.type, (group.size,))
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


@contextlib.contextmanager
def synchronized(loss: nn.Module, now: bool) -> Iterator[None]:
    """Within, a backward pass exchanges gradients only if `now`: of several pieces, the last one does it for all."""
    with contextlib.nullcontext() if now or not hasattr(loss, "no_sync") else loss.no_sync():
        yield


def average_gradients(parameters: Iterable[nn.Parameter], group: Group) -> None:
    """Leaves the mean of all processes' gradients, where neither DDP nor FSDP looks after it."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if group.size > 1 and gradients:
        together = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(together)
        parts = (together / group.size).split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def is_shared(parameter: Tensor) -> bool:
    """Whether FSDP shares it out."""
    return hasattr(parameter, "device_mesh")


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """torch's clip_grad_norm_, also where FSDP shares out some weights and leaves others whole. Returns the norm before."""
    parameters = [p for p in parameters if p.grad is not None]
    if not any(map(is_shared, parameters)):
        return nn.utils.clip_grad_norm_(parameters, most).item()
    kinds = [[p.grad for p in parameters if is_shared(p) == kind] for kind in (True, False)]
    norm = math.hypot(*(whole(nn.utils.get_total_norm(gradients)).item() for gradients in kinds if gradients))
    torch._foreach_mul_([local(p.grad) for p in parameters], min(1.0, most / (norm + 1e-6)))
    return norm


# ---- what must see the whole batch


class Gather(torch.autograd.Function):
    """[B/n, E] of each of n processes -> [B, E] on all of them, and gradients back to where each row came from."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        context.own = slice(dist.get_rank() * len(rows), (dist.get_rank() + 1) * len(rows))
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)           # every process's loss looks at every row; DDP divides by n
        return gradient[context.own]


class WholeBatchNorm(nn.BatchNorm2d):
    """Batch norm by the mean and variance of the whole batch. (torch's SyncBatchNorm does that on GPUs alone.)"""

    def forward(self, x: Tensor) -> Tensor:                                   # [B/n, C, H, W]
        if not self.training:
            return super().forward(x)
        wide = x.to(self.weight.dtype)
        mean = mean_of_all(wide.mean(dim=(0, 2, 3)))                          # [C]
        centred = wide - mean[:, None, None]
        variance = mean_of_all(centred.square().mean(dim=(0, 2, 3)))
        self._remember(mean.detach(), variance.detach(), x.numel() // x.shape[1] * dist.get_world_size())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)


class WholeBatchDropout(nn.Dropout):
    """Draws for the whole batch, from random numbers that all processes have in common, and takes its rows."""

    def forward(self, x: Tensor) -> Tensor:                                   # [B/n, ...]
        if not self.training or self.p == 0:
            return x
        drawn = x.new_empty(len(x) * dist.get_world_size(), *x.shape[1:]).bernoulli_(1 - self.p) / (1 - self.p)
        return x * drawn[dist.get_rank() * len(x):][:len(x)]


def mean_of_all(values: Tensor) -> Tensor:
    """The mean over all processes, with gradient."""
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(values) / dist.get_world_size()


def see_whole_batch(model: nn.Module, group: Group) -> None:
    """Batch norms and dropouts do in each of several processes what they would do in one; keys and weights stay."""
    for module in model.modules() if group.size > 1 else ():
        module.__class__ = {nn.BatchNorm2d: WholeBatchNorm, nn.Dropout: WholeBatchDropout}.get(type(module), type(module))
