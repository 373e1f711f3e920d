"""`python -m miniclip.trace clip-b32`: one forward pass, module by module, as a table, as JSON or as a page.

Read beside model.py; minidiff/trace.py does the same for diffusion models with what stands here. All of it
runs on the meta device: tensors have shapes and no numbers, and a model of any size takes seconds, no memory.
FLOPs are torch.utils.flop_counter's: 2 for each multiply-add of matrix products, convolutions and attention;
norms, activations and sums count nothing.
Shapes: B batch, S text tokens, C channels, H W height and width, T tokens of either kind, D width.
"""

from __future__ import annotations

import argparse
import functools
import html
import inspect
import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from miniclip.bert import PostNormTower
from miniclip.command import run
from miniclip.config import CLIPConfig, CLIPResNetConfig, CLIPTextConfig, CLIPVisionConfig, Config
from miniclip.convert import RESNET, VIT, class_of, from_tensors, read_any
from miniclip.files import WeightsError, atomic_write, read_json, script_json
from miniclip.image import CLIPImageProcessor
from miniclip.image_text import HEAD_WIDTH, PRESETS
from miniclip.model import CLIPEncoder, CLIPPreTrainedModel, CLIPTextTransformer, CLIPVisionTransformer
from miniclip.resnet import ModifiedResNet, ResNet
from miniclip.simple import SimpleCLIPConfig, SimpleCLIPModel
from miniclip.weights import class_named, load_strict, skip_init

Shape = list[int] | None
MOST = 65_536               # of a side, a batch or a text, in options


@dataclass
class Row:
    """One call of one module. depth: how many modules it runs within; the model itself is 0.
    parameters and flops include those of the modules within; input and output are the first tensors'."""

    name: str
    depth: int
    kind: type
    input: Shape = None
    output: Shape = None
    parameters: int = 0
    parameter_bytes: int = 0
    flops: int = 0
    activation_bytes: int = 0       # of the output; 0 where the module hands on what it was given
    within: bool = False            # whether modules ran within it

    def as_dict(self, total: int) -> dict[str, Any]:
        """For JSON. total: the FLOPs that `share` is of."""
        return {"name": self.name, "depth": self.depth, "class": self.kind.__name__, "input": self.input,
                "output": self.output, "parameters": self.parameters, "parameter_bytes": self.parameter_bytes,
                "flops": self.flops, "activation_bytes": self.activation_bytes,
                "share": self.flops / total if total else 0.0, "where": where(self.kind)}


@dataclass
class Trace:
    """A forward pass. rows[0] is the model; its activation_bytes are the sum over modules with none within.

    drawn: what a page draws, each a tower's name, a row, and the rows that are its boxes.
    skips: pairs of rows; what the first made, the second took besides its input.
    """

    title: str
    inputs: dict[str, Shape]
    rows: list[Row]
    drawn: list[tuple[str, int, list[int]]] = field(default_factory=list)
    skips: list[tuple[int, int]] = field(default_factory=list)

    @property
    def total(self) -> Row:
        """The model's own row."""
        return self.rows[0]


# ---------------------------------------------------------------------------------------------------- tracing


@torch.no_grad()
def trace(model: nn.Module, inputs: dict[str, Any], title: str = "") -> Trace:
    """model(**inputs), watched: a row for each module that runs, in the order in which they begin.

    Attention runs as the two matrix products that it is: the counter knows no fused kernel of the CPU.
    """
    watch, handles = Watch(), []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(watch.enter, name), with_kwargs=True))
        handles.append(module.register_forward_hook(watch.leave, with_kwargs=True))
    try:
        with watch.counter, sdpa_kernel(SDPBackend.MATH):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    rows = watch.rows
    rows[0].activation_bytes = sum(row.activation_bytes for row in rows if not row.within)
    return Trace(title, shapes_of(inputs), rows)


class Watch:
    """The hooks around each module's forward."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.running: list[Row] = []
        self.counter = FlopCounterMode(display=False)

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a forward: its row begins, and the row around it is none of a leaf."""
        if self.running:
            self.running[-1].within = True
        row = Row(name, len(self.running), type(module), shape_of(first((args, kwargs))))
        row.flops = -self.counter.get_total_flops()
        self.rows.append(row)
        self.running.append(row)

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """After it: what it made and what it cost."""
        row, made = self.running.pop(), first(output)
        row.flops += self.counter.get_total_flops()
        row.output = shape_of(made)
        row.activation_bytes = 0 if made is first((args, kwargs)) else size_of(made)
        row.parameters = sum(p.numel() for p in module.parameters())
        row.parameter_bytes = sum(map(size_of, module.parameters()))


def first(value: Any) -> Tensor | None:
    """The first tensor in tensors in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := first(part)) is not None), None)


def shape_of(tensor: Tensor | None) -> Shape:
    """As a list, which JSON knows."""
    return None if tensor is None else list(tensor.shape)


def size_of(tensor: Tensor | None) -> int:
    """In bytes."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def shapes_of(inputs: dict[str, Any]) -> dict[str, Shape]:
    """The tensors among inputs, those in dicts by their own names."""
    found: dict[str, Shape] = {}
    for name, value in inputs.items():
        found |= shapes_of(value) if isinstance(value, dict) else \
            {name: list(value.shape)} if isinstance(value, Tensor) else {}
    return found


@functools.cache
def where(kind: type) -> str:
    """minidiff/resnet.py:17: where a class begins, seen from the folder of its package."""
    path = f"{kind.__module__.replace('.', '/')}.py"
    try:
        return f"{path}:{inspect.getsourcelines(kind)[1]}"
    except (OSError, TypeError):        # a program without its sources
        return path


def drawn(rows: list[Row], open_kinds: tuple[type, ...]) -> list[int]:
    """The rows that a page draws: rows of these kinds are opened; what lies within others is not drawn."""
    found, closed = [], None
    for i, row in enumerate(rows):
        if closed is None or row.depth <= closed:
            closed = None if issubclass(row.kind, open_kinds) else row.depth
            found += [] if closed is None else [i]
    return found


# ---------------------------------------------------------------------------------------------------- showing


def amount(number: float, unit: str = "") -> str:
    """1,234,567 -> 1.23 M."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5 or prefix == "P":
            break
        number /= 1000
    digits = 0 if number >= 99.95 or not prefix else 1 if number >= 9.995 else 2
    return f"{number:,.{digits}f} {prefix}{unit}".rstrip()


def short_name(row: Row, around: list[str]) -> str:
    """Without the name of the module that it runs within."""
    outer = around[row.depth - 1] if row.depth > 1 else ""
    return row.name.removeprefix(f"{outer}.") if outer else row.name


def table(t: Trace, depth: int) -> str:
    """A line for each row down to `depth`, and one for the whole."""
    head = ("module", "class", "input -> output", "parameters", "FLOPs", "share", "weights", "activations",
            "defined in")
    lines, around = [head], [""]
    for row in t.rows[1:]:
        around[row.depth:] = [row.name]
        if row.depth <= depth:
            lines.append(cells("  " * (row.depth - 1) + short_name(row, around), row, t.total.flops))
    lines.append(cells("total", t.total, t.total.flops))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) if 3 <= i <= 7 else cell.ljust(width)
                               for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
                     for line in lines)


def cells(name: str, row: Row, total: int) -> tuple[str, ...]:
    """A line of the table."""
    shapes = ["" if shape is None else str(shape) for shape in (row.input, row.output)]
    return (name, row.kind.__name__, " -> ".join(shapes), f"{row.parameters:,}", amount(row.flops),
            f"{100 * row.flops / total if total else 0:.1f} %", amount(row.parameter_bytes, "B"),
            amount(row.activation_bytes, "B"), where(row.kind))


def as_dict(t: Trace, depth: int) -> dict[str, Any]:
    """For programs: everything, rows down to `depth`."""
    rows = [row.as_dict(t.total.flops) for row in t.rows[1:] if row.depth <= depth]
    return {"title": t.title, "inputs": t.inputs, "total": t.total.as_dict(t.total.flops), "rows": rows,
            "skips": [[t.rows[a].name, t.rows[b].name] for a, b in t.skips]}


def page(t: Trace) -> str:
    """One HTML page that fetches nothing: trace.html with the rows in it."""
    rows = [[r.name, r.depth, r.kind.__name__, r.input, r.output, r.parameters, r.flops, r.parameter_bytes,
             r.activation_bytes] for r in t.rows]
    data = {"title": t.title, "inputs": t.inputs, "rows": rows, "drawn": t.drawn, "skips": t.skips,
            "where": {row.kind.__name__: where(row.kind) for row in t.rows}}
    template = (Path(__file__).parent / "trace.html").read_text(encoding="utf-8")
    return template.replace("{{title}}", html.escape(t.title)).replace("{{data}}", script_json(data))


# ---------------------------------------------------------------------------------------------------- command


class Parser(argparse.ArgumentParser):
    """argparse, whose mistakes are the caller's ValueError: one line."""

    def error(self, message: str) -> NoReturn:
        """Hook of argparse."""
        raise ValueError(message)


def parser(name: str, presets: str) -> Parser:
    """The options that both commands have."""
    p = Parser(f"python -m {name}", description="One forward pass, module by module, on the meta device: no "
               "weights are read or made.", epilog="FLOPs: 2 for each multiply-add of matrix products, "
               "convolutions and attention. activations: bytes of what a module makes; of the total, of all "
               "modules with none within.")
    p.add_argument("model", nargs="?", help=f"{presets}, or a path: config.json, a model's or run's folder, "
                   "a checkpoint, of which only the shapes are read (default: %(default)s)")
    whole = partial(number, least=1)
    p.add_argument("--size", type=whole, metavar="N", help="height and width (default: the model's)")
    p.add_argument("--batch", type=whole, default=1, metavar="B", help="default: %(default)s")
    p.add_argument("--tokens", type=whole, metavar="S", help="of each text (default: the model's)")
    p.add_argument("--depth", type=whole, metavar="N",
                   help="modules in modules to show (default: 3 in the table, all in files)")
    p.add_argument("--html", metavar="FILE", help="write a page instead; - is standard output")
    p.add_argument("--json", metavar="FILE", help="write JSON instead; - is standard output")
    return p


def number(text: str, least: int) -> int:
    """An option's value. Raises ArgumentTypeError."""
    if not text.isascii() or not text.isdigit() or not least <= int(text[:9]) <= MOST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from {least} to {MOST}")
    return int(text)


def answer(t: Trace, a: argparse.Namespace) -> None:
    """Prints or writes what was asked for."""
    if not a.html and not a.json:
        said = ", ".join(f"{name} {shape}" for name, shape in t.inputs.items())
        print(f"{t.title}: {t.total.kind.__name__}({said})\n\n{table(t, a.depth or 3)}")
    if a.json:
        write(a.json, json.dumps(as_dict(t, a.depth or MOST), ensure_ascii=False, indent=1) + "\n")
    if a.html:
        write(a.html, page(t))


def write(path: str, text: str) -> None:
    """To a file, whole or not at all, or to standard output."""
    if path == "-":
        sys.stdout.write(text)
        return
    with atomic_write(path) as file:
        file.write(text.encode())
    print(path)


# --------------------------------------------------------------------------------------------- models, hollow


def hollow(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of a shape, without numbers."""
    return torch.empty(shape, dtype=dtype, device="meta")


def hollow_model(kind: type, config: Config) -> nn.Module:
    """A model of a config, without weights."""
    with skip_init():
        return kind(config).eval()


def shapes_in(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file without their numbers; a mapped file is not read."""
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def from_config(path: Path, more: dict[str, type] | None = None) -> nn.Module:
    """The model that a config.json describes. more: classes beside CLIP's. Raises WeightsError,
    ConfigError."""
    values, source = read_json(path), str(path)
    kind = (more or {}).get(class_named(values)) or class_of(values, source)
    return hollow_model(kind, kind.config_from_folder(values, source))


def beside(path: Path, tensors: dict[str, Tensor], more: dict[str, type] | None = None) -> nn.Module | None:
    """A weight file in a model's folder: the model of its config.json, which the file must fit; else None."""
    try:
        model = from_config(path.parent / "config.json", more)
    except WeightsError:                # there is none, or it is no model's
        return None
    load_strict(model, model.convert_keys(tensors), str(path), model.ignored_keys)
    return model


def config_in(folder: Path) -> Path | None:
    """The config.json of a model's folder, or of the model in a run's folder."""
    return next((path for path in (folder / "model" / "config.json", folder / "config.json")
                 if path.is_file()), None)


# ------------------------------------------------------------------------------------------------------- CLIP

ALIASES = {"clip-b32": "ViT-B-32", "clip-l14": "ViT-L-14", "rn50": "RN50"}
OPENED = (CLIPPreTrainedModel, SimpleCLIPModel, CLIPTextTransformer, CLIPVisionTransformer, CLIPEncoder,
          PostNormTower, ResNet, ModifiedResNet, nn.Sequential)
DEMO_TEXT = {"vocab_size": 560, "max_position_embeddings": 20}  # of the herb shop's own tokenizer
DEMO_SIZE = 64


def published(name: str) -> nn.Module:
    """One of OpenAI's models, of the sizes in convert.py's tables."""
    E, picture, (D, L, heads) = (VIT | RESNET)[name]
    text = CLIPTextConfig(hidden_size=D, intermediate_size=4 * D, num_hidden_layers=L,
                          num_attention_heads=heads)
    if name in RESNET:
        n, w, blocks = picture
        return hollow_model(class_of({"model_type": "clip_resnet"}, name), CLIPResNetConfig(
            text_config=text, vision_layers=blocks, vision_width=w, image_size=n, projection_dim=E))
    n, p, D, L, head = picture
    vision = CLIPVisionConfig(hidden_size=D, intermediate_size=4 * D, num_hidden_layers=L, image_size=n,
                              num_attention_heads=D // head, patch_size=p)
    return hollow_model(class_of({"model_type": "clip"}, name), CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=E))


def demo() -> nn.Module:
    """The CLIP of the herb shop: train.train_clip's default model on data/herbs."""
    p = PRESETS["tiny"]
    text = CLIPTextConfig(**DEMO_TEXT, hidden_size=p.text_width, intermediate_size=4 * p.text_width,
                          num_hidden_layers=p.text_layers, num_attention_heads=p.text_width // HEAD_WIDTH)
    return hollow_model(SimpleCLIPModel, SimpleCLIPConfig(
        text_config=text, image_layers=p.layers, image_width=p.width, projection_dim=p.projection))


def open_model(path: str, name: str | None) -> tuple[nn.Module, int | None]:
    """The model of a preset or a path, and the side of the pictures in its folder's settings, if it has any.
    name: of an OpenCLIP file's model, as in convert.py. Raises WeightsError, ConfigError."""
    if path in ALIASES:
        return published(ALIASES[path]), None
    if path == "demo":
        return demo(), DEMO_SIZE
    place = Path(path)
    if place.is_dir():
        config = config_in(place)
        if config is None:
            raise WeightsError(f"{path}: no config.json in it, nor in its folder model")
        return from_config(config), side_in(config.parent)
    if place.suffix == ".json":
        return from_config(place), side_in(place.parent)
    if not place.is_file():
        raise WeightsError(f"{path}: neither one of {', '.join((*ALIASES, 'demo'))} nor a file or folder")
    tensors, archive = read_any(path)
    tensors = shapes_in(tensors)
    return beside(place, tensors) or from_tensors(tensors, archive, path, name), side_in(place.parent)


def side_in(folder: Path) -> int | None:
    """The side of the pictures that a folder's preprocessor_config.json asks for."""
    if not (folder / "preprocessor_config.json").is_file():
        return None
    size = CLIPImageProcessor.from_pretrained(folder).size
    return size.get("shortest_edge") or size.get("height")


def inputs_of(model: nn.Module, batch: int, size: int | None, tokens: int | None) -> dict[str, Any]:
    """What the model's forward takes: ids [B, S], pictures [B, C, n, n], or both."""
    c = model.config
    text, vision = getattr(c, "text_config", c), getattr(c, "vision_config", c)
    given: dict[str, Any] = {}
    if hasattr(text, "vocab_size"):
        given["input_ids"] = hollow(batch, tokens or text.max_position_embeddings, dtype=torch.long)
    usual = getattr(vision, "image_size", None)
    if usual or isinstance(model, SimpleCLIPModel):
        n = size or usual or 224
        given["pixel_values"] = hollow(batch, getattr(vision, "num_channels", 3), n, n)
        if n != usual and hasattr(vision, "patch_size"):
            given["interpolate_pos_encoding"] = True
    if isinstance(model, SimpleCLIPModel):
        ids, pictures = given["input_ids"], given["pixel_values"]
        return {"batch": {"image": pictures, "input_ids": ids, "id": hollow(batch, dtype=torch.long)}}
    return given


def tower_of(name: str) -> str:
    """Which tower a module belongs to."""
    return "text" if "text" in name.split(".")[0] else "picture"


def trace_clip(path: str, batch: int = 1, size: int | None = None, tokens: int | None = None,
               name: str | None = None) -> Trace:
    """The trace of a preset or a path, with its two towers to draw."""
    model, side = open_model(path, name)
    t = trace(model, inputs_of(model, batch, size or side, tokens), path)
    t.drawn = [(tower_of(t.rows[i].name), i, [i]) for i in drawn(t.rows, OPENED)]
    return t


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status, 2 after a mistake of the user."""
    def work() -> None:
        p = parser("miniclip.trace", ", ".join((*ALIASES, "demo")))
        p.set_defaults(model="clip-b32")
        p.add_argument("--name", help="which OpenCLIP model a file is, e.g. ViT-B-32-quickgelu")
        a = p.parse_args(argv)
        answer(trace_clip(a.model, a.batch, a.size, a.tokens, a.name), a)

    return run("trace", work, (ValueError, OSError, RuntimeError))


if __name__ == "__main__":
    sys.exit(main())
