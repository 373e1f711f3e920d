"""Several processes that train as one: torchrun starts them, and each works on its rows of the same batch.

    torchrun --nproc-per-node 2 -m train.train_diffusion --data data/calligraphy --out out/calligraphy

Read after settings.py. Every process draws the random numbers of the whole batch and keeps its rows of them.
So the result does not depend on how many there are, but for rounding,
and a run may go on with another number of them.
Papers: Li 2020 (DDP); Zhao 2023 (FSDP). Both are PyTorch's own; what is ours is how a batch is divided.
Shapes: B rows of the whole batch, n processes, B/n rows of one of them; E width of an embedding.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError

TIMEOUT = timedelta(minutes=30)     # of a collective: the first process may encode or evaluate for long


class Ranks(NamedTuple):
    """This process's place among `size`; the one of rank 0 prints and writes files."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def print0(self, text: str) -> None:
        """Prints in the first process only."""
        if self.main:
            print(text, flush=True)

    def local_rows(self, batch: int) -> slice:
        """This process's rows of a batch."""
        rows = batch // self.size
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [B/n, ...] of all processes, in order: [B, ...], with gradient."""
        return rows if self.size == 1 else Gather.apply(rows)

    def mean(self, *values: float) -> list[float]:
        """The mean over all processes, on each of them."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64 if self.device.type == "cpu" else None,
                             device=self.device)
        dist.all_reduce(total)
        return (total / self.size).tolist()

    def check_same(self, **values: Any) -> None:
        """Ends all processes in one line where one of them was started with other flags,
        or sees other data."""
        lists: list[Any] = [values] * self.size
        if self.size > 1:
            dist.all_gather_object(lists, values)
        for name in values:
            found = list(dict.fromkeys(str(other.get(name)) for other in lists))
            if len(found) > 1:
                raise UserError(f"the processes differ in {name}: {' and '.join(found)}; start all of them "
                                "alike")

    def union(self, texts: Iterable[str]) -> list[str]:
        """The texts of all processes, each once, on each of them."""
        lists: list[Any] = [list(texts)]
        if self.size > 1:
            lists *= self.size
            dist.all_gather_object(lists, lists[0])
        return list(dict.fromkeys(text for some in lists for text in some))

    def wrap(self, model: nn.Module, shard: list[nn.Module], unused: bool = False) -> nn.Module:
        """The module to call for the loss: its backward pass leaves the mean of all processes' gradients.

        shard: modules whose weights FSDP2 shards, from the inside out; empty for DDP, or for a process alone.
        unused: some weights may have no part in the loss, as in a text tower whose pooler is not used.
        """
        if shard:
            shard_modules(shard, self)
            return model
        return model if self.size == 1 else DistributedDataParallel(model, find_unused_parameters=unused)


def init(device: torch.device) -> Ranks:
    """Meets the other processes if torchrun started this one; otherwise a group of one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:         # how torchrun makes itself known
        return Ranks(0, 1, device)
    if not dist.is_available():
        raise UserError("torchrun: this build of PyTorch has no torch.distributed")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


@contextlib.contextmanager
def synchronized(loss_fn: nn.Module, now: bool) -> Iterator[None]:
    """Within, a backward pass exchanges gradients only if `now`: of several parts,
    the last one does it for all."""
    with contextlib.nullcontext() if now or not hasattr(loss_fn, "no_sync") else loss_fn.no_sync():
        yield


# -------------------------------------------------------------------------------------------- sharded weights


def shard_modules(modules: list[nn.Module], ranks: Ranks) -> None:
    """FSDP2: each process keeps 1/n of every parameter, gradient and optimizer state, and gathers a module's
    parameters only while it computes. Raises UserError before PyTorch 2.6."""
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise UserError(f"--shard: needs PyTorch 2.6 or newer, this is {torch.__version__}") from None
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for module in modules:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor, of which this process holds a part."""
    return hasattr(parameter, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """Of a sharded tensor (a DTensor) this process's part; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gather_full(value: Any) -> Any:
    """A nested state with every sharded tensor put together again, on the CPU: a GPU may not hold them all.

    All processes have to call it.
    """
    if isinstance(value, dict):
        return {k: gather_full(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(gather_full, value))
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def shard_like(value: Any, like: Tensor) -> Any:
    """The opposite of `gather_full`, for a tensor of the shape of `like`; anything else as it is."""
    if not hasattr(like, "device_mesh") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


class FullCopy:
    """The model as it is saved: itself, or with sharded weights a copy on the CPU of the first process."""

    def __init__(self, model: nn.Module, ranks: Ranks, sharded: bool):
        """To be made before the weights are sharded."""
        self.model, self.ranks, self.sharded = model, ranks, sharded
        self.full = copy.deepcopy(model).cpu() if sharded and ranks.main else model

    def gather(self) -> nn.Module:
        """The model with the weights of this moment. All processes have to call it; the first may save it."""
        if self.sharded:
            weights = gather_full(self.model.state_dict())
            if self.ranks.main:
                self.full.load_state_dict(weights)
        return self.full


# -------------------------------------------------------------------------------------------------- gradients


def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Leaves the mean of all processes' gradients, where neither DDP nor FSDP does it."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if ranks.size > 1 and gradients:
        together = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(together)
        parts = (together / ranks.size).split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """torch's clip_grad_norm_, also where some weights are sharded and others not.
    Returns the norm before."""
    parameters = [p for p in parameters if p.grad is not None]
    if not any(map(is_sharded, parameters)):
        return nn.utils.clip_grad_norm_(parameters, most).item()
    kinds = [[p.grad for p in parameters if is_sharded(p) == kind] for kind in (True, False)]
    norm = math.hypot(*(gather_full(nn.utils.get_total_norm(gradients)).item()
                        for gradients in kinds if gradients))
    torch._foreach_mul_([local_part(p.grad) for p in parameters], min(1.0, most / (norm + 1e-6)))
    return norm


# ------------------------------------------------------------------------------ what must see the whole batch


class Gather(torch.autograd.Function):
    """[B/n, E] of each of n processes -> [B, E] on all of them,
    and gradients back to where each row came from."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        """[B/n, E] -> [B, E], in the order of the ranks."""
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        context.own = slice(dist.get_rank() * len(rows), (dist.get_rank() + 1) * len(rows))
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        """[B, E] -> [B/n, E]: the gradient of this process's rows, summed over all processes' losses."""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)           # every process's loss looks at every row; DDP divides by n
        return gradient[context.own]


class WholeBatchNorm(nn.BatchNorm2d):
    """Batch norm by the mean and variance of the whole batch.
    (torch's SyncBatchNorm does that on GPUs alone.)"""

    def forward(self, x: Tensor) -> Tensor:                                   # [B/n, C, H, W]
        """Same shape. In training all processes have to call it: they exchange means."""
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
    """Draws for the whole batch, from random numbers that all processes have in common,
    and takes its rows."""

    def forward(self, x: Tensor) -> Tensor:                                   # [B/n, ...]
        """Same shape. In training torch's generator has to be in the same state in all processes."""
        if not self.training or self.p == 0:
            return x
        drawn = x.new_empty(len(x) * dist.get_world_size(),
                            *x.shape[1:]).bernoulli_(1 - self.p) / (1 - self.p)
        return x * drawn[dist.get_rank() * len(x):][:len(x)]


def mean_of_all(values: Tensor) -> Tensor:
    """The mean over all processes, with gradient."""
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(values) / dist.get_world_size()


def see_whole_batch(model: nn.Module, ranks: Ranks) -> None:
    """Batch norms and dropouts do in each of several processes what they would do in one;
    keys and weights stay."""
    replacements = {nn.BatchNorm2d: WholeBatchNorm, nn.Dropout: WholeBatchDropout}
    for module in model.modules() if ranks.size > 1 else ():
        module.__class__ = replacements.get(type(module), type(module))
