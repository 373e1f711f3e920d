"""docs/compatibility.md, made from upstream's own signatures: python -m tests.parity.compatibility

Each public method and argument of the classes that both libraries have gets a row: it works, does nothing,
or is left out, with the reason that the code itself gives (the tables of miniclip/habits.py and its like). A
name that is none of these is an error, here and in test_compatibility.py.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

import miniclip
import minidiff
from miniclip import encoding, picture_habits, text_habits
from miniclip import habits as clip_habits
from minidiff import habits, lora, pipeline_habits

PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"
WORKS, IDLE, OUT = "works", "does nothing", "left out"
Row = tuple[str, str, str]                              # name, or name(argument); status; reason
Pair = tuple[type, type]                                # our class and upstream's

# Options that methods take as **habits: the tables that settle them
IDLE_TABLES = [clip_habits.LOADING_IDLE, habits.SCHEDULER_LOADING_IDLE, pipeline_habits.PIPELINE_LOADING_IDLE,
               clip_habits.SAVING_IDLE, text_habits.READING_IDLE, text_habits.WRITING_IDLE,
               encoding.CALL_IDLE, picture_habits.PICTURE_IDLE, picture_habits.CALL_IDLE,
               clip_habits.CHECKPOINTING_IDLE]
OUT_TABLES = [clip_habits.LOADING_REFUSED, habits.SCHEDULER_LOADING_REFUSED, clip_habits.SAVING_REFUSED,
              pipeline_habits.PIPELINE_LOADING_REFUSED, habits.SCHEDULER_SAVING_REFUSED, lora.LORA_REFUSED,
              text_habits.READING_REFUSED, text_habits.WRITING_REFUSED, encoding.CALL_REFUSED,
              picture_habits.CALL_REFUSED, pipeline_habits.CALL_REFUSED, habits.SET_TIMESTEPS_REFUSED,
              clip_habits.CHECKPOINTING_REFUSED]
# Methods that hand their options on to another one
PASSED_ON = {"encode": "__call__", "tokenize": "__call__", "save_config": "save_pretrained"}
# Found on an object, not on its class; test_compatibility.py looks
ON_OBJECTS = {"config", "vocab", "padding_side", "truncation_side", "backend"}


def families() -> dict[str, list[Pair]]:
    """Heading -> pairs of classes."""
    import diffusers
    import transformers

    def pairs(ours: Any, theirs: Any, names: str) -> list[Pair]:
        return [(getattr(ours, name), getattr(theirs, name)) for name in names.split()]

    diffusion = {kind: " ".join(name for name in minidiff.__all__ if name.endswith(kind))
                 for kind in ("Scheduler", "Pipeline")}
    return {
        "Pipelines": pairs(minidiff, diffusers, diffusion["Pipeline"]),
        "Samplers": pairs(minidiff, diffusers, diffusion["Scheduler"]),
        "UNet and VAE": pairs(minidiff, diffusers, "UNet2DConditionModel AutoencoderKL"),
        "CLIP models": pairs(miniclip, transformers, "CLIPModel CLIPTextModel CLIPTextModelWithProjection "
                                                     "CLIPVisionModel CLIPVisionModelWithProjection"),
        "CLIP configs": pairs(miniclip, transformers, "CLIPConfig CLIPTextConfig CLIPVisionConfig"),
        "Tokenizers": pairs(miniclip, transformers, "CLIPTokenizer BertTokenizer"),
        "Processors": pairs(miniclip, transformers, "CLIPImageProcessor CLIPProcessor"),
    }


# ---------------------------------------------------------------------------------------------- the questions


def public_names(theirs: type) -> list[str]:
    """What a user may call or read: not Python's, not nn.Module's; building and calling count."""
    common = {*dir(object), *(dir(nn.Module) if issubclass(theirs, nn.Module) else ())}
    names = {name for name in dir(theirs) if not name.startswith("_") and name not in common}
    calls = {"forward"} if issubclass(theirs, nn.Module) else {"__call__"} & set(dir(theirs))
    return sorted({"__init__", *names, *calls})


def arguments(function: Any) -> dict[str, inspect.Parameter]:
    """Named parameters, without self."""
    try:
        found = inspect.signature(function).parameters
    except (TypeError, ValueError):                     # a property, a class attribute
        return {}
    return {name: p for name, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            and name not in ("self", "cls")}


def built_of(ours: type) -> set[str]:
    """What our constructor takes: its parameters, the fields of its config, what must be None."""
    config = getattr(ours, "config_class", ours)
    names = {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    names |= set(getattr(config, "inert", ())) | set(getattr(config, "metadata", ()))
    return names | set(arguments(ours.__init__)) | set(pipeline_habits.NEVER_HERE)


def left_out(ours: type, name: str) -> str | None:
    """The reason that the class gives for a name."""
    tables = [vars(kind).get("left_out", {}) for kind in ours.__mro__]
    return next((table[name] for table in tables if name in table), None)


def is_here(ours: type, name: str) -> bool:
    """Whether the name is a method, an attribute, or a field of the config."""
    config = getattr(ours, "config_class", ours)
    names = {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    names |= set(getattr(config, "inert", ())) | set(getattr(config, "metadata", ()))
    return hasattr(ours, name) or name in ON_OBJECTS or name in names


def rows(ours: type, theirs: type) -> Iterator[Row]:
    """A row for each public name of upstream's class, and for each argument of those that are here."""
    for name in public_names(theirs):
        reason = left_out(ours, name)
        if not is_here(ours, name) or (reason and not hasattr(ours, name)):
            yield name, OUT if reason else "MISSING", reason or ""
            continue
        mine = getattr(ours, name, None)
        says = (inspect.getdoc(mine) or "").split("\n")[0] if inspect.isfunction(mine) else ""
        idle = says.startswith("Does nothing")
        yield name, IDLE if idle else WORKS, says.removeprefix("Does nothing").strip(" :,.") if idle else ""
        if not idle and not inspect.isclass(mine):
            yield from argument_rows(ours, name, mine, getattr(theirs, name))


def argument_rows(ours: type, name: str, mine: Any, theirs: Any) -> Iterator[Row]:
    """A row for each argument of one method."""
    own = arguments(mine)
    further = arguments(getattr(ours, PASSED_ON.get(name, ""), None))
    names = built_of(ours) if name == "__init__" else {*own, *further}
    free = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(mine).parameters.values()) if own else False
    for place, argument in enumerate(arguments(theirs)):
        yield (f"{name}({argument}=)", *status(ours, name, argument, place, own, names, free))


def status(ours: type, name: str, argument: str, place: int, own: Mapping[str, inspect.Parameter],
           names: set[str], free: bool) -> tuple[str, str]:
    """What becomes of one argument: its status and the reason."""
    if reason := getattr(ours, "arguments_left_out", {}).get(name, {}).get(argument):
        return OUT, reason
    if argument in names:
        return WORKS, ""
    for kind, tables in ((OUT, OUT_TABLES), (IDLE, IDLE_TABLES)):
        if free and (table := next((t for t in tables if argument in t), None)) is not None:
            return kind, table[argument]
    if place < len(own) and list(own.values())[place].default is inspect.Parameter.empty:
        return WORKS, f"by place; by name it is {list(own)[place]}="
    return "MISSING", ""


# --------------------------------------------------------------------------------------------------- the page


def table() -> dict[str, dict[str, list[Row]]]:
    """Heading -> class (or "all", where they agree) -> rows."""
    found: dict[str, dict[str, list[Row]]] = {}
    for heading, pairs in families().items():
        each = {theirs.__name__: list(rows(ours, theirs)) for ours, theirs in pairs}
        times = Counter(row for some in each.values() for row in dict.fromkeys(some))
        shared = [row for row in dict.fromkeys(row for some in each.values() for row in some)
                  if times[row] == len(each)] if len(each) > 1 else []
        found[heading] = {"all": shared} if shared else {}
        found[heading] |= {name: [row for row in some if row not in shared] for name, some in each.items()}
    return found


def missing() -> list[str]:
    """What nobody has decided on."""
    return [f"{name}: {row[0]}" for sections in table().values() for name, some in sections.items()
            for row in some if row[1] == "MISSING"]


def page() -> str:
    """docs/compatibility.md."""
    import diffusers
    import transformers

    found = table()
    counts = Counter(row[1] for sections in found.values() for some in sections.values() for row in some)
    lines = [HEAD.format(diffusers=diffusers.__version__, transformers=transformers.__version__, **{
        status.replace(" ", "_"): counts[status] for status in (WORKS, IDLE, OUT)})]
    for heading, sections in found.items():
        lines += [f"## {heading}", ""]
        for name, some in sections.items():
            title = "In all: " + ", ".join(n for n in sections if n != "all") if name == "all" else name
            lines += [f"### {title}", "", "| name | | |", "|---|---|---|"]
            lines += [f"| `{row}` | {status} | {reason.replace('|', '/')} |" for row, status, reason in some]
            lines += [""]
    return "\n".join(lines)


HEAD = """# What works of diffusers' and transformers' interface

Made by `python -m tests.parity.compatibility` from the signatures of diffusers {diffusers} and transformers
{transformers}; `make parity` fails when a name has no row, or with these versions this page is old.
{works} names and arguments work, {does_nothing} do nothing because there is nothing to do, {left_out} are
left out: an argument then raises an error of one line, a name an AttributeError with the words given here.
"""


def main() -> None:
    """Writes the page, unless a name has no row."""
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    if unknown := missing():
        raise SystemExit("\n".join(unknown))
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
