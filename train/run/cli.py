"""A script's settings as a dataclass, its fields as command-line flags with limits, and errors as one line.

Read first of train/run. Every script of train/ is a `class Settings`, a `main(settings)` and `start(...)` of
this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from miniclip.command import flush_output, is_closed_pipe
from miniclip.config import ConfigError
from miniclip.files import WeightsError, read_json, shown

from ..errors import DataError, UserError

MANY = 10**9                # the most of any number whose flag names no upper limit
MAX_SEED = 2**63 - 1        # what torch.Generator takes
MAX_TEXT = 10_000           # characters of a setting
START_ONLY = ("resume", "overwrite")        # flags that say how a run starts and are no settings of it


# --------------------------------------------------------------------------------------------------- settings


def flag(default: Any, help: str, *, section: str = "", choices: tuple = (), at_least: float | None = None,
         at_most: float = MANY, above: float | None = None, may_change: bool = False) -> Any:
    """A field of a script's settings that is also a command-line flag.

    section: the part of --help it stands in. choices;
    at_least or above, and at_most: what `check_flags` holds it to.
    may_change: --resume takes another value than the run began with.
    """
    options = {"help": help, "section": section, "choices": choices, "at_least": at_least, "at_most": at_most,
               "above": above, "may_change": may_change}
    return dataclasses.field(default=default, metadata=options)


def changed(settings_class: type, name: str, **changes: Any) -> Any:
    """The flag of that name of another class, with another default, help text or limit."""
    field = next(f for f in dataclasses.fields(settings_class) if f.name == name)
    default = changes.pop("default", field.default)
    return dataclasses.field(default=default, metadata={**field.metadata, **changes})


def check_flags(settings: Any) -> None:
    """Raises UserError for the first value that a flag cannot have, wherever it comes from: flags,
    a file or Python."""
    hints = typing.get_type_hints(type(settings))
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if problem := problem_with(value, hints[f.name], f.metadata):
            raise UserError(f"{flag_name(f.name)} {value}: {problem}")


def flag_name(field: str) -> str:
    """As it is typed: muon_lr is --muon-lr."""
    return "--" + field.replace("_", "-")


def problem_with(value: Any, kind: type, limits: Mapping[str, Any]) -> str:
    """Why a value of a flag of this type is refused, in words; empty if it is fine."""
    if kind is bool:
        problem = "" if isinstance(value, bool) else "must be true or false"
    elif kind is str:
        problem = "" if isinstance(value, (str, os.PathLike)) else "must be a text"
    elif isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        problem = f"must be a {'whole ' if kind is int else ''}number"
    else:
        problem = out_of_range(value, limits)
    if not problem and limits["choices"] and value not in limits["choices"]:
        problem = f"must be one of {', '.join(map(str, limits['choices']))}"
    return problem


def out_of_range(value: float, limits: Mapping[str, Any]) -> str:
    """Nothing that is not finite is in range."""
    low, high, above = limits["at_least"], limits["at_most"], limits["above"]
    low = -MANY if low is None else low
    if value <= high and (value >= low if above is None else value > above):
        return ""
    if high != MANY:
        return (f"from {low:,} to {high:,}" if above is None
                else f"must be above {above:,} and at most {high:,}")
    if value > high:
        return f"at most {high:,}"
    return f"at least {low:,}" if above is None else f"must be above {above:,}"


# ------------------------------------------------------------------------------------------- the command line


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for empty ones."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in ("", None) else super()._get_help_string(action)


def parse_flags(settings_class: type, description: str, argv: list[str] | None = None) -> Any:
    """A dataclass's fields as flags: `jitter: bool = True` gives --jitter and --no-jitter.

    With --resume what is not given is as the run's config.json has it.
    """
    parser = parser_of(settings_class, description)
    given = parser.parse_args(argv)
    if getattr(given, "resume", False):
        parser.set_defaults(**settings_of(Path(given.out), settings_class))
        given = parser.parse_args(argv)
    return settings_class(**vars(given))


def parser_of(settings_class: type, description: str) -> argparse.ArgumentParser:
    """The parser with a flag for each field, in the class's sections of --help."""
    parser = argparse.ArgumentParser(prog=f"python -m {module_of(settings_class)}",
                                     usage="%(prog)s [options]",
                                     description=description, formatter_class=Help)
    titles, hints = getattr(settings_class, "sections", ()), typing.get_type_hints(settings_class)
    sections = {"": parser, **{title: parser.add_argument_group(title) for title in titles}}
    for f in dataclasses.fields(settings_class):
        kind = {"type": reader(f, hints[f.name]), "choices": f.metadata["choices"] or None}
        if hints[f.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        sections[f.metadata["section"]].add_argument(flag_name(f.name), default=f.default,
                                                     help=f.metadata["help"], **kind)
    return parser


def module_of(settings_class: type) -> str:
    """The script whose settings these are, as python -m takes it."""
    if settings_class.__module__ != "__main__":
        return settings_class.__module__
    script = sys.modules["__main__"]
    return f"{script.__package__}.{Path(script.__file__).stem}"             # started by its path or by -m


def reader(f: dataclasses.Field, kind: type) -> Callable[[str], Any]:
    """Turns a flag's text into its value. What is refused is named as it was typed."""
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = text
        if problem := problem_with(value, kind, f.metadata):
            raise UserError(f"{flag_name(f.name)} {text}: {problem}")
        return value

    return read


def settings_of(out: Path, settings_class: type) -> dict[str, Any]:
    """The settings in a run folder's config.json. Fields younger than the file are not in it."""
    path, hints = out / "config.json", typing.get_type_hints(settings_class)
    if not path.exists():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # the processes compare what they see, and all end: see `resume` of loop.py
            return {}
        raise UserError(f"--resume: no {path} to take the run's settings from; is --out {out} its folder? "
                        "(A file that holds {} leaves all settings to the flags.)")
    fields, values = {f.name: f for f in dataclasses.fields(settings_class)}, read_settings(out)
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"--resume: {path}: {shown(name)} is no setting of {module_of(settings_class)}; "
                            "is this a run of another script?")
        if problem := problem_with(value, hints[name], fields[name].metadata):
            raise UserError(f"--resume: {path}: {name} = {shown(value)}: {problem}")
    return {name: value for name, value in values.items() if name not in ("out", *START_ONLY)}


def read_settings(out: Path, **needed: type) -> dict[str, Any]:
    """The settings in a run folder's config.json: one-line texts, numbers, true and false. needed: those that
    have to be there, and their types. Raises WeightsError that names file, setting and value."""
    path, values = out / "config.json", read_json(out / "config.json")
    for name, value in values.items():
        number = type(value) in (int, float) and abs(value) <= MAX_SEED
        text = isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()
        if not (number or text or isinstance(value, (bool, type(None)))):
            raise WeightsError(f"{path}: {shown(name)} = {shown(value)}: no setting has such a value")
    for name, kind in needed.items():
        if type(values.get(name)) is not kind:
            raise WeightsError(f"{path}: {name} = {shown(values.get(name))} is not of type {kind.__name__}")
    return values


def command(script: str, **flags: Any) -> str:
    """A command to paste: this Python, a script of this package and its flags, quoted.
    True: a flag without value."""
    words = [interpreter(), "-m", f"{PACKAGE}.{script}"]
    for name, value in flags.items():
        words += [flag_name(name)] if value is True else [flag_name(name), str(value)]
        if words[-1].startswith("-") and value is not True:
            words[-2:] = [f"{words[-2]}={words[-1]}"]       # else it would be read as the next flag
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


PACKAGE = __package__.rpartition(".")[0]    # train, or minidiff_train where it is installed


def interpreter() -> str:
    """The Python that runs, from the working folder if it lies in a folder there."""
    path, here = Path(sys.executable or "python"), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) and path.parent != here else path)


# ------------------------------------------------------------------------------------------- running a script


def start(main: Callable[[], None]) -> None:
    """Runs a script: what the user can mend becomes one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")      # Chinese on any Windows console
    try:
        main()
        if dist.is_available() and dist.is_initialized():
            # torchrun would soon end the first process if it still wrote its last files alone
            dist.barrier()
    except (UserError, DataError, ConfigError, WeightsError) as error:
        sys.exit(fail(str(error)))
    except OSError as error:
        if is_closed_pipe(error):
            sys.exit(141)               # as a shell has it
        sys.exit(fail(f"{error.filename or 'file'}: {error.strerror or error}"))
    except torch.cuda.OutOfMemoryError:
        sys.exit(fail("out of memory on the device: try a smaller --batch or --preset"))
    except RuntimeError as error:
        if not is_about_others(error):
            raise
        sys.exit(fail(f"lost another process ({str(error).splitlines()[0]:.200}); see what it says, "
                      "and go on with --resume"))
    except KeyboardInterrupt:
        sys.exit(fail("interrupted", 130))
    finally:
        if dist.is_available() and dist.is_initialized():
            # gloo of PyTorch 2.4 hangs where it is taken down while it still cleans up
            time.sleep(0.2)
            dist.destroy_process_group()
        flush_output()


def is_about_others(error: RuntimeError) -> bool:
    """Whether it is what torch.distributed raises when another process, or its machine, is gone."""
    return dist.is_available() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def fail(message: str, status: int = 2) -> int:
    """Prints one line of error and returns the exit status."""
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
    missing = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if not there.get(device.type) or missing:
        have = ", ".join(d for d, present in there.items() if present)
        raise UserError(f"--device {name} is not there; this machine has: {have}")
    return device


def model_folder(run: str) -> Path:
    """The model of a run folder. Raises UserError where there is none."""
    folder = Path(run) / "model"
    if not folder.is_dir():
        raise UserError(f"--run {run}: no run folder here (it would hold a folder `model`)")
    return folder


def describe_machine(device: torch.device, processes: int = 1) -> str:
    """In a few words, for the line that a run begins with."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"{torch.get_num_threads()} CPU threads of {os.cpu_count()}"
    else:
        name = "Apple GPU"
    return name + (f", {processes} processes" if processes > 1 else "")
