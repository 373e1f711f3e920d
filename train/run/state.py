"""All that a run is at the start of a step: model, EMA, optimizers, random numbers. What a checkpoint holds.

Read after distributed.py. Papers: Polyak 1992 (averaged weights); Micikevicius 2018 (loss scaling).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.files import WeightsError, reason, shown

from ..errors import UserError
from .cli import MANY, START_ONLY
from .distributed import clip_gradients, gather_full, local_part, shard_like

# What checkpoints of earlier versions called parts of the model, and what these are called now
RENAMED = (("matcher.", ""), ("bias.0", "criterion.logit_bias"))
# What optimizers keep of each parameter
KEPT = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum"}}


class EMA:
    """An exponential moving average of the weights, for sampling.
    Parameters only: no table or buffer is touched.

    The decay grows as (1 + s) / (10 + s) up to `decay`,
    so that a run of a few hundred steps is not mostly its start.
    With decay 0 nothing is kept, and `with ema:` changes nothing.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.decay = decay
        self.parameters = list(parameters) if decay else []
        self.mean = [p.detach().clone() for p in self.parameters]

    def update(self, step: int) -> None:
        """To be called after each optimizer step."""
        if self.parameters:
            keep = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_([*map(local_part, self.mean)],
                                 [local_part(p.detach()) for p in self.parameters], 1 - keep)

    def load(self, mean: list[Tensor]) -> None:
        """Takes the means of a checkpoint."""
        for mine, saved in zip(self.mean, mean if self.decay else [], strict=True):
            mine.copy_(shard_like(saved, mine))

    def __enter__(self) -> None:
        """Within `with ema:` the model holds the means."""
        self.live = [p.detach().clone() for p in self.parameters]
        self._fill(self.mean)

    def __exit__(self, *_: Any) -> None:
        self._fill(self.live)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)


@dataclasses.dataclass
class TrainState:
    """config: the settings; data: the fingerprint of the data; best: the lowest validation error so far.

    generator: one stream for all random numbers of training, drawn on the CPU in a fixed order.
    """

    config: dict[str, Any]
    data: dict[str, int]
    model: nn.Module
    ema: EMA
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    generator: torch.Generator
    step: int = 0
    best: float = math.inf

    @classmethod
    def begin(cls, cfg: Any, data: dict[str, int], model: nn.Module, optimizers: list[torch.optim.Optimizer],
              device: torch.device) -> TrainState:
        """The state of a run that has not trained yet."""
        ema = EMA((p for p in model.parameters() if p.requires_grad), cfg.ema)
        scaler = torch.amp.GradScaler(device.type, enabled=cfg.precision == "fp16")
        return cls(dataclasses.asdict(cfg), data, model, ema, optimizers, scaler,
                   torch.Generator().manual_seed(cfg.seed))

    # ---- a step

    def zero_grad(self) -> None:
        """Drops the gradients: None, not zeros."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, scaled up where float16 would lose the small ones."""
        self.scaler.scale(loss).backward()

    def clip_gradients(self, most: float) -> float:
        """Unscales and clips; returns the norm before."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        return clip_gradients(self.model.parameters(), most)

    def update(self, norm: float) -> None:
        """One step of the optimizers, from clipped gradients of this norm.

        Where it is not finite float16 overflowed: the step is left out and the scaler lowers its factor.
        """
        for optimizer in self.optimizers if math.isfinite(norm) else ():
            self.scaler.step(optimizer)
        self.scaler.update()

    # ---- checkpoints

    def capture(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors and plain values.
        All processes have to call it if weights are sharded."""
        frozen = self._frozen()
        weights = {k: v for k, v in self.model.state_dict().items() if k not in frozen}
        return {
            "config": {k: v for k, v in self.config.items() if k not in START_ONLY}, "data": self.data,
            "step": self.step,
            "best": self.best, "model": gather_full(weights), "ema": gather_full(self.ema.mean),
            "optimizers": [gather_full(o.state_dict()) for o in self.optimizers],
            "scaler": self.scaler.state_dict(), "dice": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }

    def check(self, saved: dict[str, Any], may_change: Iterable[str]) -> None:
        """Raises WeightsError for a checkpoint with parts that `restore` could not put back,
        before anything is touched; UserError for one of another run. saved: of `load_checkpoint`."""
        self._check_same_run(saved, set(may_change))
        try:
            problem = next(self._problems(saved), "")
        except Exception as error:  # noqa: BLE001  what is of a wrong type inside
            problem = f"{type(error).__name__}: {reason(error)}"
        if problem:
            raise WeightsError(f"damaged: {' '.join(problem.split())}")

    def _problems(self, saved: dict[str, Any]) -> Iterator[str]:
        """What is wrong with the parts of a checkpoint, in words."""
        planned = saved["config"].get("steps", MANY)
        if type(planned) is not int or not 0 <= saved["step"] <= planned <= MANY:
            yield f"step {saved['step']} of {shown(planned)}"
        own = self.model.state_dict()
        weights = current_names(saved["model"])
        yield from misfits("model", weights, own)
        if missing := [name for name in own if name not in weights and name not in self._frozen()]:
            yield f"model has no {missing[0]}"
        if self.ema.decay:
            yield from misfits("ema", dict(enumerate(saved["ema"])), dict(enumerate(self.ema.mean)))
            if len(saved["ema"]) != len(self.ema.mean):
                yield f"ema has {len(saved['ema'])} tensors, not {len(self.ema.mean)}"
        if len(saved["optimizers"]) != len(self.optimizers):
            yield f"{len(saved['optimizers'])} optimizers, not {len(self.optimizers)}"
        for optimizer, values in zip(self.optimizers, saved["optimizers"]):
            yield from optimizer_problems(optimizer, values)
        if self.scaler.is_enabled():
            yield from unlike("scaler", saved.get("scaler", {}), self.scaler.state_dict())
        for name in ("dice", "rng"):
            torch.Generator().set_state(saved[name])                    # raises for what is no state of one
        if isinstance(saved.get("cuda_rng"), Tensor) and torch.cuda.is_initialized():
            torch.Generator("cuda").set_state(saved["cuda_rng"])

    def restore(self, saved: dict[str, Any], may_change: Iterable[str]) -> None:
        """Puts a checkpoint back. Raises UserError for settings and data that shape training and are not
        those of it."""
        self._check_same_run(saved, set(may_change))
        self._restore_weights(saved["model"])
        self.ema.load(saved["ema"])
        for optimizer, values in zip(self.optimizers, saved["optimizers"], strict=True):
            restore_optimizer(optimizer, values)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved.get("scaler", {}))
        self.generator.set_state(saved["dice"])         # the name that files have
        torch.set_rng_state(saved["rng"])
        if saved.get("cuda_rng") is not None and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(saved["cuda_rng"])
        self.step, self.best = saved["step"], saved.get("best", math.inf)

    def _check_same_run(self, saved: dict[str, Any], may_change: set[str]) -> None:
        for name, value in self.config.items():
            if name not in may_change and saved["config"].get(name, value) != value:
                was = saved["config"][name]
                raise UserError(f"--resume: this run was trained with {name} = {shown(was)}, not "
                                f"{shown(value)}")
        if saved.get("data", self.data) != self.data:
            raise UserError(f"--resume: the data is not what this run was trained on "
                            f"({shown(saved['data'])}, now {self.data})")

    def _restore_weights(self, saved: dict[str, Tensor]) -> None:
        saved = current_names(saved)
        mine = self.model.state_dict()
        weights = {name: shard_like(value, mine[name]) if name in mine else value
                   for name, value in saved.items()}
        wrong = self.model.load_state_dict(weights, strict=False)
        if wrong.unexpected_keys or set(wrong.missing_keys) - self._frozen():
            raise UserError(f"--resume: the checkpoint holds another model ({str(wrong)[:200]})")

    def _frozen(self) -> set[str]:
        return {name for name, p in self.model.named_parameters() if not p.requires_grad}


def current_names(saved: dict[str, Any]) -> dict[str, Any]:
    """The weights of a model by the names of today, those of older checkpoints translated."""
    for old, new in RENAMED:
        saved = {new + name[len(old):] if name.startswith(old) else name: value
                 for name, value in saved.items()}
    return saved


def misfits(what: str, saved: dict[Any, Any], own: dict[Any, Tensor]) -> Iterator[str]:
    """Which of the saved values are no dense tensors of the shape and kind of ours."""
    for name, value in saved.items():
        plain = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"
        if not plain or value.is_quantized:
            yield f"{what} {shown(name)} is a {type(value).__name__}, not a dense tensor"
        elif name not in own:
            yield f"{what} has {shown(name)}, which this model has not"
        elif value.shape != own[name].shape or value.is_complex() != own[name].is_complex():
            yield f"{what} {shown(name)} is {list(value.shape)}, not {list(own[name].shape)}"


def optimizer_problems(optimizer: torch.optim.Optimizer, saved: Any) -> Iterator[str]:
    """What keeps a saved state from being loaded into an optimizer, in words."""
    kind, own = type(optimizer).__name__, optimizer.state_dict()["param_groups"]
    groups = [dict(group) for group in dict(saved)["param_groups"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if [group["params"] for group in groups] != [group["params"] for group in own]:
        yield f"the parameters of {kind} are others"
    for mine, theirs in zip(own, groups):
        yield from unlike(f"{kind}'s", theirs, {k: v for k, v in mine.items() if k != "params"})
    for i, values in saved["state"].items():
        if type(i) is not int or not 0 <= i < len(parameters) or not KEPT.get(kind, set()) <= values.keys():
            yield f"the state of {kind}'s parameter {shown(i)} is not whole"
            return
        tensors = {name: value for name, value in values.items() if name != "step"}
        yield from misfits(f"{kind}'s {i}", tensors, dict.fromkeys(tensors, parameters[i]))
        if not is_amount(values.get("step", 0)):
            yield f"{kind}'s step of parameter {i} is not a number from 0 on"


def unlike(what: str, saved: dict[str, Any], own: dict[str, Any]) -> Iterator[str]:
    """Which of our plain values have a saved one of another kind, or, of numbers and texts alone, none."""
    for name, mine in own.items():
        value = saved.get(name)
        switch = mine is None or type(mine) is bool         # which not every torch has
        if is_amount(mine) and not is_amount(value) or switch and value is not mine and value is not None:
            yield f"{what} {name} is {shown(value)}, not like {shown(mine)}"
        elif type(mine) in (list, tuple) and not (type(value) in (list, tuple) and len(value) == len(mine)
                                                  and all(is_amount(v) and v < 1 for v in value)):     # betas
            yield f"{what} {name} is {shown(value)}, not like {shown(mine)}"


def is_amount(value: Any) -> bool:
    """A finite number from 0 on, or a tensor that holds one; neither true nor false."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.layout is torch.strided and 0 <= value.item() < math.inf
    return type(value) is float and 0 <= value < math.inf or type(value) is int and 0 <= value <= MANY


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """load_state_dict, with each tensor sharded as its parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shards = {i: {k: shard_like(v, parameters[i]) for k, v in values.items()}
              for i, values in saved["state"].items()}
    optimizer.load_state_dict({**saved, "state": shards})


def fingerprint(names: list[str], captions: list[str]) -> dict[str, int]:
    """What must not change between a run and its continuation: which images, under which captions."""
    listed = "\n".join([*names, *captions]).encode("utf-8", "replace")
    return {"pictures": len(names), "checksum": zlib.crc32(listed)}


def checksum(tensors: Iterable[Tensor], settings: str = "") -> int:
    """CRC-32 of all bytes."""
    value = zlib.crc32(settings.encode("utf-8"))
    for tensor in tensors:
        value = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), value)
    return value
