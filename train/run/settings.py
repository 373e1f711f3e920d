"""The settings that both training scripts share, each typed once with its limits,
and what they cannot be together.

Read after cli.py. A new option of both scripts is a field here; of one script, a field there.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from ..errors import UserError
from .cli import MAX_SEED, check_flags, flag

# ----------------------------------------------------------------------------------------- sections of --help
DATA, MODEL, EVALUATION, MACHINE = ("data and run folder", "model and training", "evaluation on the way",
                                    "machine, memory and speed")
OTHERS, MORE, SAVES = "starting from what others trained", "more processes, more data", "checkpoints"

PRECISIONS = ("auto", "float32", "bf16", "fp16")


@dataclass(frozen=True)
class TrainSettings:
    """The flags that train.train_diffusion and train.train_clip share."""

    # of --help, in order
    sections: ClassVar[tuple[str, ...]] = (DATA, MODEL, EVALUATION, MACHINE, OTHERS, MORE, SAVES)

    data: str = flag("", "folder of images: captions.csv, or one folder for each class", section=DATA,
                     may_change=True)
    out: str = flag("", "run folder to write", section=DATA, may_change=True)
    caption_column: str = flag("caption", "column of captions.csv that holds the captions", section=DATA)
    size: int = flag(64, "images are S x S", section=DATA, at_least=1, at_most=2048)

    preset: str = flag("", "size of a fresh model", section=MODEL)
    steps: int = flag(400, "optimizer steps; --resume may raise them", section=MODEL, at_least=1,
                      may_change=True)
    batch: int = flag(20, "images a step", section=MODEL, at_least=1)
    optimizer: str = flag("muon", "muon (learns faster on few images) or adamw", section=MODEL,
                          choices=("muon", "adamw"))
    lr: float = flag(1e-3, "peak learning rate of AdamW", section=MODEL, above=0)
    muon_lr: float = flag(0.02, "peak learning rate of Muon", section=MODEL, above=0)
    warmup: int = flag(20, "steps of linear warm-up", section=MODEL, at_least=0)
    ema: float = flag(0.0, "maximum EMA decay of the weights; 0 for none", section=MODEL, at_least=0,
                      at_most=1)
    clip: float = flag(1.0, "maximum gradient norm", section=MODEL, above=0)
    jitter: bool = flag(True, "random affine augmentation", section=MODEL)
    flip: bool = flag(False, "mirror half of the images", section=MODEL)

    seed: int = flag(0, "one seed, one result (on one machine, on the CPU)", section=MACHINE, at_least=0,
                     at_most=MAX_SEED)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps", section=MACHINE, may_change=True)
    precision: str = flag("auto", "of the forward pass; auto: bf16 on a GPU that has it, else float32",
                          section=MACHINE, choices=PRECISIONS)
    gradient_checkpointing: bool = flag(False,
                                        "recompute activations instead of keeping them, to save memory",
                                        section=MACHINE, may_change=True)
    compile: bool = flag(False, "torch.compile: slow to start, then faster, most of all on a GPU",
                         section=MACHINE, may_change=True)

    init: str = flag("", "start from this model folder", section=OTHERS)
    lora: int = flag(0, "rank of LoRA on the attention of --init, which stays as it is; 0 for none",
                     section=OTHERS, at_least=0)
    lora_alpha: float = flag(0.0, "LoRA is scaled by alpha / rank; 0 takes the rank", section=OTHERS,
                             at_least=0)
    freeze: str = flag("", "freeze parameters whose name matches this regular expression", section=OTHERS)

    shard: bool = flag(False, "FSDP2: torchrun's processes shard parameters, gradients and optimizer state",
                       section=MORE, may_change=True)
    stream: bool = flag(False, "read images as they are needed: for more than memory holds; skips broken "
                               "files",
                        section=MORE)
    workers: int = flag(0, "processes that read ahead for --stream; 0 reads in the training process",
                        section=MORE, at_least=0, at_most=1024, may_change=True)

    save_every: int = flag(100, "steps between checkpoints, beside those at each evaluation", section=SAVES,
                           at_least=1, may_change=True)
    keep: int = flag(2, "how many checkpoints to keep, beside the best", section=SAVES, at_least=1,
                     may_change=True)
    resume: bool = flag(False, "go on from the run folder's newest good checkpoint; settings that are not "
                               "given are those of its config.json", section=SAVES, may_change=True)
    overwrite: bool = flag(False, "begin anew in a folder that holds a run, which is removed", section=SAVES,
                           may_change=True)

    def may_change(self) -> set[str]:
        """The settings that --resume takes other values of."""
        return {f.name for f in dataclasses.fields(self) if f.metadata["may_change"]}


def check_together(cfg: TrainSettings) -> None:
    """Refuses in one line, before any work starts, what is out of its limits or does not go with another
    flag."""
    check_flags(cfg)
    check_init(cfg.init)
    if cfg.lora and not cfg.init:
        raise UserError(f"--lora {cfg.lora}: a rank above 0, beside an --init that it builds on")
    if cfg.lora_alpha and not cfg.lora:
        raise UserError(f"--lora-alpha {cfg.lora_alpha}: means nothing without --lora")
    if cfg.workers and not cfg.stream:
        raise UserError(f"--workers {cfg.workers}: only --stream reads ahead")
    if cfg.shard and (cfg.optimizer == "muon" or cfg.lora or cfg.compile or cfg.precision == "fp16"):
        raise UserError("--shard: not with --lora, --compile or fp16, and with --optimizer adamw, "
                        "as Muon needs whole matrices")
    try:
        re.compile(cfg.freeze)
    except re.error as error:
        raise UserError(f"--freeze {cfg.freeze}: not a regular expression ({error})") from None


def check_processes(cfg: TrainSettings, processes: int, parts: int = 1) -> None:
    """Refuses a batch that cannot be divided, once the number of processes is known."""
    if cfg.batch % (processes * parts):
        among = "process" if processes == 1 else "processes"
        raise UserError(f"--batch {cfg.batch}: cannot be shared evenly among {processes} {among} times "
                        f"--accumulate {parts}")
    if cfg.shard and processes == 1:
        raise UserError("--shard: there is one process only; start several with torchrun")


def freeze_named(model: nn.Module, pattern: str) -> None:
    """Freezes parameters whose name matches; something has to be left to learn."""
    for name, parameter in model.named_parameters():
        if pattern and re.search(pattern, name):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--freeze {pattern}: leaves nothing to learn")


def autocast(precision: str, device: torch.device) -> torch.amp.autocast:
    """A context for forward passes: bf16 and fp16 where they are safe, float32 elsewhere in it;
    off for float32."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if precision == "fp16" and device.type == "mps":
        raise UserError("--precision fp16: Apple's GPU has no loss scaling here; take float32 or bf16")
    dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def check_init(init: str) -> None:
    """Refuses a run of ours in place of its model."""
    model = Path(init) / "model"
    if init and any((model / name).exists() for name in ("writer.json", "matcher.json", "model_index.json")):
        raise UserError(f"--init {init}: a run folder; did you mean {model}?")
