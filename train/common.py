"""What the training scripts truly share: flags, device, clear errors, EMA, checkpoints, metrics, a progress line.

Read before train_diffusion.py. No loop lives here: each script keeps its own in sight.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from data.folder import DataError
from miniclip.config import ConfigError
from miniclip.weights import WeightsError, atomic_write, read_json, read_pickle, write_json
from train.report import series

if TYPE_CHECKING:
    from train.parallel import Group  # which is read after this file


class UserError(Exception):
    """Something the user can mend; shown as one line, without a traceback."""


MOST = 10**9                # of any number whose flag names no upper limit
SEEDS = {"at_least": 0, "at_most": 2**63 - 1}
OF_THIS_START = ("resume", "overwrite")     # flags that are no settings of a run, but say how it starts


def flag(default: Any, help: str, **more: Any) -> Any:
    """A field of a script's config that is also a command-line flag. `section` begins a part of --help.

    `choices`, and for numbers `above` or `at_least` and `at_most`, are what check_flags holds it to.
    """
    return dataclasses.field(default=default, metadata={"help": help, **more})


def check_flags(cfg: Any) -> None:
    """Refuses what a flag cannot be, in one line, wherever the config comes from: flags, a file or Python."""
    hints = typing.get_type_hints(type(cfg))
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if problem := problem_with(value, hints[f.name], f.metadata):
            raise UserError(f"{flag_name(f.name)} {value}: {problem}")


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def problem_with(value: Any, kind: Any, limits: Mapping[str, Any]) -> str:
    """Why a value of a flag of this type is refused, in words; empty if it is fine."""
    kind, optional = plain_type(kind)
    if value is None and optional:
        return ""
    if kind in (bool, str):
        fits = isinstance(value, bool if kind is bool else (str, os.PathLike))
        problem = "" if fits else "must be true or false" if kind is bool else "must be a text"
    elif isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        problem = f"must be a {'whole ' if kind is int else ''}number"
    else:
        problem = out_of_range(value, limits)
    if not problem and value not in limits.get("choices", (value,)):
        problem = f"must be one of {', '.join(map(str, limits['choices']))}"
    return problem


def plain_type(kind: Any) -> tuple[type, bool]:
    """int | None -> int, True."""
    kinds = typing.get_args(kind) or (kind,)
    return next(t for t in kinds if t is not type(None)), type(None) in kinds


def out_of_range(value: float, limits: Mapping[str, Any]) -> str:
    """Nothing is in range that is not finite."""
    open_end = "above" in limits
    low, high = limits.get("above", limits.get("at_least", -MOST)), limits.get("at_most", MOST)
    if low < value <= high or (value == low and not open_end):
        return ""
    if "at_most" in limits:
        return f"must be above {low:,} and at most {high:,}" if open_end else f"from {low:,} to {high:,}"
    if value > high:
        return f"at most {high:,}"
    return f"must be above {low:,}" if open_end else f"at least {low:,}"


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for empty ones."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in ("", None) else super()._get_help_string(action)


def parse_flags(config_class: type, description: str, argv: list[str] | None = None) -> Any:
    """A dataclass's fields as flags: `jitter: bool = True` gives --jitter and --no-jitter.

    With --resume what is not given is as the run's config.json has it.
    """
    parser = parser_of(config_class, description)
    given = parser.parse_args(argv)
    if getattr(given, "resume", False):
        parser.set_defaults(**settings_of(Path(given.out), config_class))
        given = parser.parse_args(argv)
    return config_class(**vars(given))


def parser_of(config_class: type, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {module_of(config_class)}", usage="%(prog)s [options]",
                                     description=description, formatter_class=Help)
    section, hints = parser, typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):
        if "section" in f.metadata:
            section = parser.add_argument_group(f.metadata["section"])
        options = {"help": f.metadata["help"], "default": f.default}
        if hints[f.name] is bool:
            section.add_argument(flag_name(f.name), action=argparse.BooleanOptionalAction, **options)
        else:
            section.add_argument(flag_name(f.name), type=reader(f, hints[f.name]),
                                 choices=f.metadata.get("choices"), **options)
    return parser


def module_of(config_class: type) -> str:
    """The script that a config is of, as python -m takes it, also where it was started by its path."""
    if config_class.__module__ != "__main__":
        return config_class.__module__
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else f"train.{Path(sys.argv[0]).stem}"


def reader(f: dataclasses.Field, kind: Any) -> Callable[[str], Any]:
    """Turns a flag's text into its value. What is refused is named as it was typed."""
    def read(text: str) -> Any:
        try:
            value = plain_type(kind)[0](text)
        except ValueError:
            value = text
        if problem := problem_with(value, kind, f.metadata):
            raise UserError(f"{flag_name(f.name)} {text}: {problem}")
        return value

    return read


def settings_of(out: Path, config_class: type) -> dict[str, Any]:
    """The settings in a run folder's config.json. Fields younger than the file are not in it."""
    path, hints = out / "config.json", typing.get_type_hints(config_class)
    if not path.exists():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            return {}                       # the processes compare what they see, and all end: see go_on
        raise UserError(f"--resume: no {path} to take the run's settings from; is --out {out} its folder? "
                        "(A file that holds {} leaves all settings to the flags.)")
    fields, values = {f.name: f for f in dataclasses.fields(config_class)}, read_json(path)
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"--resume: {path}: {name} is no setting of {module_of(config_class)}; "
                            "is this a run of another script?")
        if problem := problem_with(value, hints[name], fields[name].metadata):
            raise UserError(f"--resume: {path}: {name} = {value!r}: {problem}")
    return {name: value for name, value in values.items() if name not in ("out", *OF_THIS_START)}


def command(module: str, **flags: Any) -> str:
    """A command to paste: this Python and the flags, quoted for the shell. True: a flag without value."""
    words = [interpreter(), "-m", module]
    for name, value in flags.items():
        words += [flag_name(name)] if value is True else [flag_name(name), str(value)]
        if words[-1].startswith("-") and value is not True:
            words[-2:] = [f"{words[-2]}={words[-1]}"]       # else it would be read as the next flag
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def interpreter() -> str:
    """The Python that runs, from the working folder if it lies in a folder there."""
    path, here = Path(sys.executable or "python"), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) and path.parent != here else path)


def run(main: Callable[[], None]) -> None:
    """Runs a script: what the user can mend becomes one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")      # Chinese on any Windows console
    try:
        main()
        if dist.is_available() and dist.is_initialized():
            dist.barrier()              # torchrun would soon end the first process if it still wrote its last files alone
    except (UserError, DataError, ConfigError, WeightsError) as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        if is_closed_pipe(error):
            sys.exit(141)           # as a shell has it
        sys.exit(_fail(f"{error.filename or 'file'}: {error.strerror or error}"))
    except torch.cuda.OutOfMemoryError:
        sys.exit(_fail("out of memory on the device: try a smaller --batch or --preset"))
    except RuntimeError as error:
        if not is_about_others(error):
            raise
        sys.exit(_fail(f"lost another process ({str(error).splitlines()[0]:.200}); see what it says, and go on with --resume"))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))
    finally:
        if dist.is_available() and dist.is_initialized():
            time.sleep(0.2)             # gloo of PyTorch 2.4 hangs where it is taken down while it still cleans up
            dist.destroy_process_group()
        flush_output()


def is_closed_pipe(error: OSError) -> bool:
    """Whether nobody reads what is printed any more; Windows calls that an invalid argument."""
    windows = os.name == "nt" and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or windows


def flush_output() -> None:
    """If nobody reads any more (`| head`), the rest goes nowhere: else Python complains as it shuts down."""
    try:
        sys.stdout.flush() if sys.stdout else None
    except OSError as error:
        if is_closed_pipe(error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_about_others(error: RuntimeError) -> bool:
    """Whether it is what torch.distributed raises when another process, or its machine, is gone."""
    return dist.is_available() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def _fail(message: str, status: int = 2) -> int:
    who = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""        # one of torchrun's
    print(f"\nerror{who}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return status


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, else Apple's MPS, else the CPU; a device that is not there is a UserError."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, present in there.items() if present)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; try auto, cpu, cuda, cuda:1 or mps") from None
    if not there.get(device.type) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        have = ", ".join(d for d, present in there.items() if present)
        raise UserError(f"--device {name} is not there; this machine has: {have}")
    return device


PRECISIONS = ("auto", "float32", "bf16", "fp16")


def autocast(precision: str, device: torch.device) -> torch.amp.autocast:
    """A context for forward passes: bf16 and fp16 where they are safe, float32 elsewhere in it; off for float32."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if precision == "fp16" and device.type == "mps":
        raise UserError("--precision fp16: Apple's GPU has no loss scaling here; take float32 or bf16")
    dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def make_folder(path: str | Path, write: bool = True) -> Path:
    """Creates an output folder, proves that it can be written, and removes what a killed run left half written."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if write:
        with atomic_write(path / "writable"):
            pass
        (path / "writable").unlink()
        for left in path.rglob(".*.tmp"):
            if re.fullmatch(r"\..*\.[0-9a-f]{12}\.tmp", left.name):      # the temporary names of atomic_write
                left.unlink(missing_ok=True)
    return path


MARKS = ("checkpoint*.pt", "best.pt", "model", "metrics.jsonl")     # any of these makes a folder a run folder
OF_A_RUN = re.compile(r"""
    checkpoint(\.\d+|\.new)?\.pt | best\.pt | config\.json | (metrics|speed)\.jsonl | report\.html | loss\.svg
    | skipped(\.\d+)?\.txt | evaluation\.(json|html) | evaluation_(legible|seeds)\.png
    | evaluation-skipped\.txt | (answers|hits)\.png | (samples|matrix)/(held_out_)?\d{6,}\.png
    | index[^/]*/(index\.json|embeddings\.safetensors)
    | lora/(pytorch_lora_weights\.safetensors|adapter_model\.safetensors|adapter_config\.json)
    | model/(\w+/)?((diffusion_pytorch_)?model[\w.-]*\.safetensors(\.index\.json)?|(merges|vocab)\.txt
                    |(\w*config|model_index|writer|matcher)\.json
                    |(vocab|tokenizer|added_tokens|special_tokens_map)\.json)
    """, re.VERBOSE)    # all that a run and who asks it leave there, but caches under checksums


def claim(cfg: Any, group: Group) -> Path:
    """The run folder, made if need be. Neither a run in it nor what --init reads is ever lost unasked."""
    if cfg.resume and cfg.overwrite:
        raise UserError("--resume, --overwrite: give one of them, to go on with a run or to begin it anew")
    out = make_folder(cfg.out, write=group.main)
    marks = [path for mark in MARKS for path in out.glob(mark)]
    found = group.union([path.name for path in marks if group.main])    # what the first process sees counts
    if found and not (cfg.resume or cfg.overwrite):
        raise UserError(f"--out {out}: holds a run already ({found[0]}); --resume goes on with it, "
                        "--overwrite removes it and begins anew, another --out leaves it as it is")
    if cfg.overwrite and cfg.init and Path(cfg.init).resolve().is_relative_to(out.resolve()):
        raise UserError(f"--init {cfg.init}: lies in --out {out}, and --overwrite removes it; give another")
    return out


def clear(out: Path) -> None:
    """Removes what an earlier run left, by name: other files stay, and so do folders that hold some."""
    names = {path: path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()}
    found = [path for path, name in names.items() if OF_A_RUN.fullmatch(name)]
    for path in sorted(found, key=lambda path: path.parent == out):     # last what tells that a run is here
        path.unlink()
    folders = {folder for path in found for folder in path.relative_to(out).parents if folder.parts}
    for folder in sorted(folders, reverse=True):
        with contextlib.suppress(OSError):
            (out / folder).rmdir()


def check_init(init: str) -> None:
    """Refuses a run of ours in place of its model."""
    model = Path(init) / "model"
    if init and any((model / name).exists() for name in ("writer.json", "matcher.json", "model_index.json")):
        raise UserError(f"--init {init}: a run folder; did you mean {model}?")


def check_pattern(freeze: str) -> None:
    try:
        re.compile(freeze)
    except re.error as error:
        raise UserError(f"--freeze {freeze}: not a regular expression ({error})") from None


def freeze_named(model: nn.Module, freeze: str) -> None:
    """What has the regular expression in its name does not learn; something has to."""
    for name, parameter in model.named_parameters():
        if freeze and re.search(freeze, name):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--freeze {freeze}: leaves nothing to learn")


def local(tensor: Tensor) -> Tensor:
    """Of a tensor that FSDP shares out (a DTensor), this process's part; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(value: Any) -> Any:
    """A nested state with every shared out tensor put together again, on the CPU: a GPU may not hold them all.

    All processes have to call it.
    """
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(whole, value))
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def shared_like(value: Any, like: Tensor) -> Any:
    """The opposite of `whole`, for a tensor of the shape of `like`; anything else as it is."""
    if not hasattr(like, "device_mesh") or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


class EMA:
    """A running mean of the weights, for sampling. Parameters only: no table or buffer is touched.

    The decay grows as (1 + s) / (10 + s) up to `decay`, so that a run of a few hundred steps is not mostly its start.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.parameters, self.decay = list(parameters), decay
        self.mean = [p.detach().clone() for p in self.parameters]

    def update(self, step: int) -> None:
        keep = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([*map(local, self.mean)], [local(p.detach()) for p in self.parameters], 1 - keep)

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


# ---- checkpoints


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Written beside its place, synced, and then moved there: a kill never leaves half a file under the good name."""
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except RuntimeError as error:           # what torch makes of a disk that is full
        raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Tensors and plain values only; a pickle that would run code is refused, and so is one with a changed byte."""
    state = read_pickle(path)
    try:
        damaged = zipfile.ZipFile(path).testzip()
    except Exception as error:              # noqa: BLE001  zipfile raises nearly anything on a damaged archive
        damaged = type(error).__name__
    if damaged:
        raise UserError(f"{path}: damaged, its checksums are wrong ({damaged})")
    parts = ("model", "optimizers", "ema", "step", "config")
    missing = [name for name in parts if not isinstance(state, dict) or name not in state]
    if missing:
        raise UserError(f"{path}: not a checkpoint of a training run (no {', '.join(missing)})")
    return state


class Checkpoints:
    """The last `keep` checkpoints of a run (checkpoint.pt, the one before checkpoint.1.pt, ...) and best.pt."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.arriving, self.best = folder / "checkpoint.new.pt", folder / "best.pt"
        self.kept = [folder / (f"checkpoint.{i}.pt" if i else "checkpoint.pt") for i in range(keep)]

    def save(self, state: dict[str, Any], best: bool) -> None:
        """The older ones move only when the new one is whole and on the disk, so a kill never costs one."""
        self.settle()
        if best:
            save_checkpoint(self.best, state)
        save_checkpoint(self.arriving, state)
        self.settle()

    def settle(self) -> None:
        """Moves every checkpoint one place on, if a new one has arrived: perhaps in an earlier life of the run."""
        if self.arriving.exists():
            for younger, older in reversed(list(zip(self.kept, self.kept[1:]))):
                if younger.exists():
                    os.replace(younger, older)
            os.replace(self.arriving, self.kept[0])

    def load(self, say: Callable[[str], None]) -> dict[str, Any]:
        """The newest that is whole; each that is not costs a line."""
        older = sorted(self.folder.glob("checkpoint.[0-9]*.pt"), key=lambda path: int(path.name.split(".")[1]))
        problem = f"there is no {self.kept[0]}"
        for path in (self.arriving, self.kept[0], *older, self.best):
            if path.exists():
                try:
                    return load_checkpoint(path)
                except (UserError, WeightsError) as error:
                    problem = str(error)
                    say(f"warning: {problem}; trying the checkpoint before it")
        raise UserError(f"--resume: {problem}")


@dataclasses.dataclass
class RunState:
    """All that a run is at the start of a step: what a checkpoint holds and what --resume puts back."""

    config: dict[str, Any]
    data: dict[str, int]                # fingerprint of the data
    model: nn.Module
    ema: EMA
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    dice: torch.Generator
    step: int = 0
    best: float = math.inf              # lowest validation error so far

    def capture(self) -> dict[str, Any]:
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        return {
            "config": {k: v for k, v in self.config.items() if k not in OF_THIS_START}, "data": self.data,
            "step": self.step, "best": self.best,
            "model": whole({k: v for k, v in self.model.state_dict().items() if k not in frozen}),
            "ema": whole(self.ema.mean), "optimizers": [whole(o.state_dict()) for o in self.optimizers],
            "scaler": self.scaler.state_dict(), "dice": self.dice.get_state(), "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }

    def restore(self, state: dict[str, Any], may_change: tuple[str, ...]) -> None:
        """Refuses flags and data that shape training and are not those of the checkpoint."""
        for name, value in self.config.items():
            if name not in may_change and state["config"].get(name, value) != value:
                raise UserError(f"--resume: this run was trained with {name} = {state['config'][name]}, not {value}")
        if state.get("data", self.data) != self.data:
            raise UserError(f"--resume: the data is not what this run was trained on ({state['data']}, now {self.data})")
        mine = self.model.state_dict()
        weights = {name: shared_like(value, mine[name]) if name in mine else value for name, value in state["model"].items()}
        wrong = self.model.load_state_dict(weights, strict=False)
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        if wrong.unexpected_keys or set(wrong.missing_keys) - frozen:
            raise UserError(f"--resume: the checkpoint holds another model ({str(wrong)[:200]})")
        for mine, saved in zip(self.ema.mean, state["ema"], strict=True):
            mine.copy_(shared_like(saved, mine))
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            shares = {i: {k: shared_like(v, parameters[i]) for k, v in values.items()} for i, values in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": shares})
        self.scaler.load_state_dict(state.get("scaler", {})) if self.scaler.is_enabled() else None
        self.dice.set_state(state["dice"])
        torch.set_rng_state(state["rng"])
        if state.get("cuda_rng") is not None and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(state["cuda_rng"])
        self.step, self.best = state["step"], state.get("best", math.inf)

    def learn(self, norm: float) -> None:
        """One step of the optimizers, from unscaled and clipped gradients of this norm.

        Where it is not finite float16 overflowed: the step is left out and the scaler lowers its factor.
        """
        for optimizer in self.optimizers if math.isfinite(norm) else ():
            self.scaler.step(optimizer)
        self.scaler.update()


def go_on(state: RunState, checkpoints: Checkpoints, group: Group, may_change: tuple[str, ...]) -> int:
    """--resume: puts the newest good checkpoint back and returns its step, the same in all processes."""
    saved, problem = None, ""
    try:
        saved = checkpoints.load(group.say)
    except UserError as error:
        problem = str(error)
    if len(group.union([str(saved and saved["step"])])) > 1:
        raise UserError(f"--resume: the processes found different checkpoints; do all of them see {checkpoints.folder}?")
    if saved is None:
        raise UserError(problem)
    began, now = (config.get("steps") for config in (saved["config"], state.config))
    if now != began and now <= saved["step"]:
        done = saved["step"]
        raise UserError(f"--steps {now}: this run has done {done} already; give more, or {began} as before")
    state.restore(saved, (*may_change, "steps"))
    if group.main:
        checkpoints.settle()
    longer = f"; planned for {began} steps, it now ends after {now}: the learning rate follows the new length"
    group.say(f"resumed at step {state.step}" + longer * (now != began))
    return state.step


def how_to_go_on(module: str, out: Path, group: Group) -> str:
    return "the same command and --resume" if group.size > 1 else command(module, out=out, resume=True)


def keep(state: RunState, checkpoints: Checkpoints, group: Group, score: float = math.inf) -> None:
    """A checkpoint of this moment, and best.pt if the score of its evaluation, the less the better, is the best so far."""
    best = score < state.best
    state.best = score if best else state.best          # not min(): the score may be NaN
    captured = state.capture()              # of all processes, if they share the weights out
    if group.main:
        checkpoints.save(captured, best)


def fingerprint(names: list[str], captions: list[str]) -> dict[str, int]:
    """What must not change between a run and its continuation: which pictures, under which captions."""
    return {"pictures": len(names), "checksum": zlib.crc32("\n".join([*names, *captions]).encode("utf-8", "replace"))}


def must_be_alike(cfg: Any, data: dict[str, int], group: Group) -> None:
    """Refuses processes that were started with different flags, or that see different data; paths may differ."""
    own = ("out", "data", "device", "workers", "threads")
    group.must_agree(**{name: value for name, value in dataclasses.asdict(cfg).items() if name not in own}, **data)


# ---- what a run tells


class Metrics:
    """One JSON object a line in a file; `rows` holds them all, those of a resumed run included.

    A checkpoint of step s is taken before s trains and after s is evaluated: on resuming, of step s the rows without
    a loss stay, and so does all before. What only looks on (`path` None) writes nothing.
    """

    def __init__(self, path: Path | None, resume_at: int | None = None):
        self.path, self.rows, self.file = path, [], None
        if path is None:
            return
        if resume_at is not None and path.exists():
            whole = [line for line in path.read_text(encoding="utf-8").split("\n")[:-1]]   # the last may be torn
            rows = map(json.loads, whole)
            self.rows = [r for r in rows if r["step"] < resume_at or r["step"] == resume_at and "loss" not in r]
        with atomic_write(path) as file:
            file.write("".join(map(self._line, self.rows)).encode("utf-8"))
        self.file: TextIO | None = path.open("a", encoding="utf-8", newline="\n")

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        if self.file is not None:
            try:
                self.file.write(self._line(row))
                self.file.flush()
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    @staticmethod
    def _line(row: dict[str, Any]) -> str:
        return json.dumps(row, ensure_ascii=False) + "\n"

    def series(self, name: str) -> list[tuple[int, float]]:
        return series(self.rows, name)


class Speed:
    """What no two runs share: seconds, pictures a second and memory, about a hundred times in a run, in a file apart."""

    def __init__(self, metrics: Metrics, device: torch.device, steps: int, batch: int):
        self.metrics, self.device, self.batch, self.every = metrics, device, batch, max(1, steps // 100)
        self.before = metrics.rows[-1]["seconds"] if metrics.rows else 0.0          # of the run that is resumed
        self.began = self.last = time.monotonic()
        self.last_step: int | None = None

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def add(self, step: int) -> None:
        if self.last_step is None:                  # the first step warms up: it is not counted
            self.last, self.last_step = time.monotonic(), step
        elif step - self.last_step >= self.every:
            now = time.monotonic()
            rate = (step - self.last_step) * self.batch / (now - self.last)
            self.metrics.add(step=step, seconds=round(self.seconds(), 1), pictures_per_second=round(rate, 2),
                             memory_mib=round(peak_memory(self.device) / 2**20))
            self.last, self.last_step = now, step


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what tensors took at most; else what the whole process took, where the system tells (not Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def open_books(cfg: Any, group: Group, resume_at: int | None) -> tuple[Metrics, Speed]:
    """metrics.jsonl and speed.jsonl of a run that begins or goes on at a step; its settings in config.json.

    With --overwrite the earlier run goes here: all that could still refuse the new one has been looked at.
    """
    def book(name: str) -> Metrics:
        return Metrics(Path(cfg.out) / name if group.main else None, resume_at)

    if group.main:
        clear(Path(cfg.out)) if cfg.overwrite else None
        write_json(Path(cfg.out) / "config.json",
                   {k: v for k, v in dataclasses.asdict(cfg).items() if k not in OF_THIS_START})
    group.union([])                         # the others wait: what they leave must not be cleared away
    return book("metrics.jsonl"), Speed(book("speed.jsonl"), group.device, cfg.steps, cfg.batch)


def stop_unless_finite(loss: float, norm: float, lr: float, state: RunState, metrics: Metrics, last_good: Path) -> None:
    """Ends a run that has come off the rails before its weights are touched. (With float16 a norm may overflow.)"""
    if not math.isfinite(loss):
        metrics.add(step=state.step, loss=loss, grad_norm=norm, lr=lr)              # for the report's words
    if not math.isfinite(loss) or not (math.isfinite(norm) or state.scaler.is_enabled()):
        raise UserError(f"step {state.step}: the loss is {loss} and the gradient norm {norm}; stopped before the weights "
                        f"were touched. {last_good} holds the last good state: try a lower --muon-lr")


class Progress:
    """A line with rate and time left: rewritten in place on a terminal, every 10 seconds in a log."""

    def __init__(self, total: int, start: int = 0, unit: str = "step", stream: TextIO = sys.stdout):
        self.total, self.start, self.unit, self.stream = total, start, unit, stream
        self.live = stream.isatty()
        self.began = self.shown = time.monotonic()

    def show(self, done: int, text: str) -> None:
        now = time.monotonic()
        if done < self.total and now - self.shown < (0.2 if self.live else 10):
            return
        self.shown = now
        rate = (done - self.start) / max(now - self.began, 1e-9)
        left = (self.total - done) / rate if rate > 0 else 0
        line = f"{self.unit} {done}/{self.total}  {text}  {rate:.1f} {self.unit}s/s  {clock(left)} left"
        self.stream.write(f"\r\x1b[K{line}" if self.live else line + "\n")
        self.stream.flush()

    def close(self) -> None:
        if self.live:
            self.stream.write("\n")


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes}:{seconds:02d}"


class StopFlag:
    """Ctrl-C and SIGTERM ask the loop to save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.set = False
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number: int, _: Any) -> None:
        self.set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def draw_batch(n: int, batch: int, dice: torch.Generator) -> Tensor:
    """Indices [batch]: whole shuffled rounds of the pictures first, so that each is seen equally often."""
    rounds = [torch.randperm(n, generator=dice) for _ in range(math.ceil(batch / n))]
    return torch.cat(rounds)[:batch]


def evaluation_steps(steps: int, times: int) -> set[int]:
    """When to evaluate: at the start, at the end, and `times` on the way, closer together at first."""
    return {0, steps} | {round(steps * (i / (times + 1)) ** 1.3) for i in range(1, times + 1)}


def save_picture(picture: Tensor, path: Path) -> None:
    """[C, H, W] in [-1, 1] as a PNG, grey if C is 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte()
    with atomic_write(path) as file:
        to_pil_image(levels).save(file, format="png")


def save_grid(pictures: Tensor, path: Path, columns: int) -> None:
    """Pictures [N, C, H, W] in [-1, 1] as one PNG, row by row, with a thin frame around each."""
    save_picture(make_grid(pictures, nrow=columns, padding=1, pad_value=0.6), path)


def grid_columns(n: int) -> int:
    """The widest of a few handy row lengths that fills whole rows, so that captions line up."""
    return next((k for k in (10, 8, 5, 6, 7, 4) if n % k == 0 and n > k), min(n, 8))


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads of {os.cpu_count()}" if device.type == "cpu" else "Apple GPU"
