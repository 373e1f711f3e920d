"""Graphs that run without Python: one module traced once, written for torch (as a program, or compiled to a
library), for ONNX, or with int8 weights.

Read after weights.py and int8.py; miniclip/export.py and minidiff/export.py decide what is traced.
Mirrors: nothing upstream.
Every graph is traced at a batch of 2, never 1, which a tracer would take for a constant.
Shapes: those of the traced modules.
"""

from __future__ import annotations

import copy
import math
import os
import secrets
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from miniclip.files import atomic_write
from miniclip.int8 import INT8, to_int8
from miniclip.weights import write_bytes

SUFFIX = {"onnx": ".onnx", "int8": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}
FORMATS = tuple(SUFFIX)
OF_TORCH = ("pt2", "aoti")      # the others are ONNX
OPSET = 18
MOST_INLINE = 1_800_000_000     # bytes of weights inside an .onnx file; protobuf ends at 2 GiB
LEAST_INT8 = 1024               # numbers of a weight that is worth a scale
FP16_MOST = 65504.0
EMBED = Path(__file__).parent / "embed"
TOKENIZERS = (EMBED / "tokens.py", EMBED / "tokens.js")     # beside every runner and every page


class Part(nn.Module):
    """A module and what to ask of it, as one module: `part(*inputs)` is `call(module, *inputs)`."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs: Tensor) -> Any:
        """Whatever `call` returns: a tensor or several."""
        return self.call(self.module, *inputs)


class Graph(NamedTuple):
    """What is traced. inputs: name -> an example; axes: name -> {dimension: its name}, those left out are
    constants; outputs: names. most, least, multiple: limits of a named dimension."""

    part: Part
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    outputs: list[str]
    most: dict[str, int] = {}
    least: dict[str, int] = {}
    multiple: dict[str, int] = {}


def trace(graph: Graph) -> torch.export.ExportedProgram:
    """The program, for any size of the named axes, 1 included."""
    names = {name for axes in graph.axes.values() for name in axes.values()}
    dims = {name: dimension(name, graph.most.get(name), graph.least.get(name, 1),
                            graph.multiple.get(name, 1)) for name in sorted(names)}
    shapes = tuple({axis: dims[name] for axis, name in graph.axes.get(key, {}).items()}
                   for key in graph.inputs)
    with sizes_of_one(), torch.no_grad():
        part = graph.part.eval().requires_grad_(False)
        program = torch.export.export(part, tuple(graph.inputs.values()), dynamic_shapes=(shapes,))
    narrow_masks(program)
    return program


def sizes_of_one() -> Any:
    """A context in which torch takes a size of 1 for any other."""
    from torch.fx.experimental import _config

    if not hasattr(_config, "backed_size_oblivious"):
        raise ValueError(f"export needs a torch that traces a size of 1 as any other; {torch.__version__} "
                         "is too old")
    return _config.patch(backed_size_oblivious=True)


def narrow_masks(program: torch.export.ExportedProgram) -> None:
    """Numbers below what float16 holds, which stand for "do not look here", become its lowest.

    exp(-65504) is 0 in every precision. Made float16, the lowest float32 would be -inf, and a row that may
    see nothing NaN.
    """
    def narrow(value: Any) -> Any:
        return max(value, -FP16_MOST) if isinstance(value, float) and math.isfinite(value) else value

    for node in program.graph.nodes:
        node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), narrow)
    program.graph_module.recompile()


def dimension(name: str, most: int | None, least: int, multiple: int) -> Any:
    """A size within limits, or a multiple of a number."""
    if multiple == 1:
        return torch.export.Dim(name, min=least, max=most)
    return multiple * torch.export.Dim(f"{name}_by_{multiple}", min=max(1, least // multiple))


def write_graph(graph: Graph, format: str, path: Path) -> dict[str, Any]:
    """Writes the graph, and returns what pipeline.json says of it. Raises ValueError where a package is
    missing."""
    program = trace(graph)
    if format == "pt2":
        torch.export.save(program, path)
    elif format == "aoti":
        compile_to(program, path)
    else:
        write_onnx(program, graph, path)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return {"file": path.name, "inputs": list(graph.inputs), "outputs": graph.outputs, "bytes": size}


def compile_to(program: torch.export.ExportedProgram, path: Path) -> None:
    """A library for processors as this one, by AOTInductor. Raises ValueError where there is no compiler."""
    from torch._inductor import aoti_compile_and_package

    try:
        with sizes_of_one(), torch.no_grad():
            aoti_compile_and_package(program, package_path=str(path))
    except RuntimeError as error:
        raise ValueError(f"--format aoti: {error}") from error


def write_onnx(program: torch.export.ExportedProgram, graph: Graph, path: Path) -> None:
    """An .onnx file; weights that do not fit into one lie beside it in .onnx.data.

    Nothing is optimised here: that would turn small int8 weights back to float32, and every runtime does it
    when it loads. Nor does the file say from which lines of which files its nodes come.
    """
    need("onnx", "onnxscript")
    output = torch.onnx.export(program, input_names=list(graph.inputs), output_names=graph.outputs,
                               opset_version=OPSET, dynamo=True, verbose=False, optimize=False)
    for node in output.model.graph.all_nodes():
        for noted in (node, *node.outputs):
            noted.metadata_props.clear()
        if node.op_type == "Constant":
            narrow_constant(node)
    output.save(path, external_data=number_bytes(graph.part) > MOST_INLINE)


def narrow_constant(node: Any) -> None:
    """As narrow_masks, for masks that the exporter itself makes, of causal attention."""
    import onnx_ir

    value = node.attributes["value"].value if "value" in node.attributes else None
    number = value.numpy() if value is not None and value.size == 1 else None
    if number is not None and number.dtype.kind == "f" and math.isfinite(number) and number < -FP16_MOST:
        narrowed = onnx_ir.tensor(number.clip(-FP16_MOST))
        node.attributes["value"] = onnx_ir.AttrTensor("value", narrowed)


def need(*packages: str) -> None:
    """Raises ValueError, in one line, for packages that are not installed."""
    for name in packages:
        try:
            __import__(name)
        except ImportError:
            raise ValueError(f"{name} is not installed: pip install 'minidiff[export]'") from None


def number_bytes(module: nn.Module) -> int:
    """Bytes of all weights and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


# ---------------------------------------------------------------------------------------------- int8 weights


def with_int8(module: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A copy whose layers hold int8 weights, and why each other parameter stayed float: name -> reason."""
    module = copy.deepcopy(module).requires_grad_(False)
    kept = {name: why_float(p) for name, p in module.named_parameters()}
    for name, layer in list(module.named_modules()):
        if type(layer) in INT8 and why_float(layer.weight) == "no layer's weight":
            kept.pop(f"{name}.weight", None)
            to_int8(layer, INT8[type(layer)])
    return module, kept


def why_float(weight: Tensor) -> str:
    """Why a parameter that is no layer's weight, or too small a one, stays float."""
    if weight.ndim < 2:
        return "a bias, norm or scale"
    return f"{weight.numel()} numbers only" if weight.numel() < LEAST_INT8 else "no layer's weight"


# ------------------------------------------------------------------------------------------ folders, vectors


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill that takes the name `out` when the block ends well; else nothing is left.

    Raises ValueError for an `out` that holds something.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: is there and not empty; nothing is written over")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.absolute().parent / f".{out.name[:40]}.{secrets.token_hex(4)}.tmp"
    unfinished.mkdir()
    try:
        yield unfinished
        if out.exists():
            out.rmdir()
        os.replace(unfinished, out)
    except OSError as error:
        if isinstance(error, ValueError):                   # of a model's file, which says what is wrong
            raise
        raise ValueError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def save_npy(path: Path, tensor: Tensor) -> None:
    """Writes what numpy.load reads."""
    tensor = tensor.detach().cpu().contiguous()
    kind = {torch.float32: "<f4", torch.int64: "<i8", torch.uint8: "|u1"}[tensor.dtype]
    shape = "".join(f"{n}, " for n in tensor.shape)
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({shape}), }}"
    header = header.ljust(64 * math.ceil((len(header) + 11) / 64) - 11) + "\n"
    with atomic_write(path) as file:
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode("latin-1"))
        write_bytes(file, tensor)


def save_golden(folder: Path, vectors: dict[str, Tensor]) -> None:
    """golden/NAME.npy of each vector."""
    (folder / "golden").mkdir(exist_ok=True)
    for name, tensor in vectors.items():
        save_npy(folder / "golden" / f"{name}.npy", tensor)


class Progress:
    """Prints each stage with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        print(f"{time.perf_counter() - self.start:6.1f} s  {text}", flush=True)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in parts of the largest number that is wanted."""
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()


def token_rules(tokenizer: Any, folder: Path, fill: bool) -> dict[str, Any]:
    """Writes a tokenizer's vocabulary, and returns what embed/tokens.py needs to know besides.

    fill: rows of the full length always, else as long as the longest.
    """
    folder.mkdir(exist_ok=True)
    tokenizer.save_vocabulary(folder)
    clean, vocab = tokenizer.clean, tokenizer.vocab
    cleaned = {clean(t): vocab[t] for t in tokenizer.added_tokens if t in tokenizer.cleaned_tokens}
    added = {t: vocab[t] for t in tokenizer.added_tokens if t not in tokenizer.cleaned_tokens}
    rules = {"folder": folder.name, "kind": "bpe", "fill": fill, "length": tokenizer.model_max_length,
             "start": tokenizer.bos_token_id, "end": tokenizer.eos_token_id,
             "pad": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id,
             "added": added, "cleaned": cleaned}
    if hasattr(tokenizer, "merges"):
        special = {t: vocab[t] for t in tokenizer.added_tokens if t in ("<|startoftext|>", "<|endoftext|>")}
        return {**rules, "rules": tokenizer.rules, "special": special}
    return {**rules, "kind": "wordpiece", "lower": tokenizer.do_lower_case,
            "strip_accents": tokenizer.strip_accents}


# ---------------------------------------------------------------------------------------------- fp16, golden

@torch.no_grad()
def ranges(graph: Graph, inputs: list[Tensor]) -> dict[str, Any]:
    """How large the numbers inside get: the largest, and the layers whose output float16 cannot hold."""
    largest: dict[str, float] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                largest[name] = max(largest.get(name, 0.0), output.abs().max().item())

        return hook

    leaves = [(name, m) for name, m in graph.part.module.named_modules() if not any(m.children())]
    hooks = [module.register_forward_hook(note(name)) for name, module in leaves]
    graph.part(*inputs)
    for hook in hooks:
        hook.remove()
    where = max(largest, key=largest.get, default="")
    return {"largest": largest.get(where, 0.0), "layer": where,
            "stays_float32": [name for name, value in largest.items() if not value < FP16_MOST]}


@torch.no_grad()
def outputs_of(graph: Graph, inputs: list[Tensor]) -> list[Tensor]:
    """What the traced module answers in PyTorch, always as a list."""
    found = graph.part(*inputs)
    return [found] if isinstance(found, Tensor) else list(found)


def write_beside(folder: Path, format: str, embed: Path) -> None:
    """README.md and, where the graphs can run, the runner and the page of a package's embed/."""
    for file in () if format in OF_TORCH else (embed / "runner.py", embed / "index.html", *TOKENIZERS):
        shutil.copyfile(file, folder / file.name)
    name = f"README_{format if format in OF_TORCH else 'onnx'}.md"
    shutil.copyfile(embed / name, folder / "README.md")


def int8_report(graphs: dict[str, Graph], small: dict[str, Graph], vectors: dict[str, Tensor],
                kept: dict[str, dict[str, str]]) -> dict[str, Any]:
    """What int8 weights cost: each stage's error, given the same golden input; bytes; what stayed float."""
    errors = {name: max(relative_error(vectors[f"{name}.{key}"], wanted) for key, wanted in
                        zip(graph.outputs, outputs_of(graph, golden_inputs(graph, name, vectors)),
                            strict=True))
              for name, graph in graphs.items()}
    sizes = {name: [number_bytes(of[name].part) for of in (graphs, small)] for name in graphs}
    return {"relative_error": errors, "weight_bytes_float32_int8": sizes, "stayed_float": kept}


def golden_inputs(graph: Graph, name: str, vectors: dict[str, Tensor]) -> list[Tensor]:
    """The golden inputs of a graph."""
    return [vectors[f"{name}.{key}"] for key in graph.inputs]


def write_graphs(graphs: dict[str, Graph], format: str, folder: Path, vectors: dict[str, Tensor],
                 say: Progress) -> dict[str, Any]:
    """All graphs of a folder, and what pipeline.json says of them."""
    written = {}
    for name, graph in graphs.items():
        written[name] = write_graph(graph, format, folder / f"{name}{SUFFIX[format]}")
        written[name]["float16"] = ranges(graph, golden_inputs(graph, name, vectors))
        say(f"{written[name]['file']}, {written[name]['bytes']:,} bytes")
    return written


def check_format(format: str) -> None:
    """Raises ValueError for an unknown format, or one whose packages are missing."""
    if format not in FORMATS:
        raise ValueError(f"--format {format}: not one of {', '.join(FORMATS)}")
    if format not in OF_TORCH:
        need("onnx", "onnxscript")
