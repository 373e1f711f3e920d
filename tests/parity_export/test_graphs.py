"""Every graph of every kind of model, at the traced size and at others, beside PyTorch."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor

import miniclip.export
import minidiff.export
from miniclip import graphs
from miniclip.graphs import Graph, outputs_of, relative_error, with_int8
from tests.parity_export.models import CLIPS, DIFFUSION, MAKERS

# batch, height, width, tokens; None: as traced
SIZES = [(2, None, None, None), (1, 14, 14, None), (3, 2, 2, 1), (1, 34, 6, 3), (3, 2, 80, 2), (1, 10, 22, 4)]
ODD = [(1, 7, 13, 3), (3, 1, 1, 1), (1, 1, 9, 2), (2, 33, 47, None)]


def graphs_of(name: str, folder: Path, format: str) -> dict[str, Graph]:
    """The graphs of a model in PyTorch; with int8 weights, if these were exported."""
    if name in DIFFUSION:
        model = minidiff.export.load(str(folder), None)
        if format == "int8":
            minidiff.export.in_int8(model)
        return minidiff.export.plan_of(model, None).graphs
    model = miniclip.export.open_model(str(folder), None, None)
    model.model = with_int8(model.model)[0] if format == "int8" else model.model
    return miniclip.export.graphs_of(model)


def at_size(graph: Graph, size: tuple) -> list[Tensor]:
    """Inputs of a size; the dimensions that the graph does not name stay."""
    chosen = dict(zip(("batch", "height", "width", "tokens"), size, strict=True))
    inputs = []
    for key, example in graph.inputs.items():
        axes = graph.axes.get(key, {})
        shape = [max(chosen.get(axes.get(i)) or n, graph.least.get(axes.get(i), 1))
                 for i, n in enumerate(example.shape)]
        whole = not example.is_floating_point()
        inputs.append(torch.randint(int(example.max()) + 1, shape) if whole else torch.randn(shape))
        if key == "mask":
            inputs[-1] = (torch.arange(shape[1]) < torch.randint(1, shape[1] + 1, (shape[0], 1))).long()
    return inputs


def sizes_of(graph: Graph) -> list[tuple]:
    """Odd ones too, unless the graph takes multiples."""
    return SIZES if max(graph.multiple.values(), default=1) > 1 else [*SIZES, *ODD]


def by_onnxruntime(file: Path):
    """A function from inputs to outputs."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def call(inputs: list[Tensor]) -> list[Tensor]:
        return [torch.tensor(o) for o in session.run(None, dict(zip(names, map(np.asarray, inputs))))]

    return call


def by_openvino(file: Path):
    """A function from inputs to outputs."""
    model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [next(iter(i.names)) for i in model.inputs]
    return lambda inputs: [torch.tensor(o) for o in
                           model(dict(zip(names, map(np.asarray, inputs)))).to_tuple()]


def by_torch(file: Path):
    """A function from inputs to outputs."""
    return as_list(torch.export.load(file).module(check_guards=False))


def by_aoti(file: Path):
    """A function from inputs to outputs."""
    return as_list(torch._inductor.aoti_load_package(str(file)))


def as_list(program):
    """A function from inputs to outputs, always as a list."""
    def call(inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            found = program(*inputs)
        return [found] if isinstance(found, Tensor) else list(found)

    return call


def own_error(graph: Graph, inputs: list[Tensor]) -> float:
    """How far PyTorch's float32 is from its float64: a norm over a few numbers leaves few digits."""
    doubled = [i.double() if i.is_floating_point() else i for i in inputs]
    exact = outputs_of(graph._replace(part=copy.deepcopy(graph.part).double()), doubled)
    return max(relative_error(a.double(), b) for a, b in zip(outputs_of(graph, inputs), exact, strict=True))


RUNTIMES = {"onnx": {"onnxruntime": by_onnxruntime, "openvino": by_openvino},
            "int8": {"onnxruntime": by_onnxruntime, "openvino": by_openvino}, "pt2": {"torch": by_torch},
            "aoti": {"AOTInductor": by_aoti}}
COMPILED = ("run", "clip")          # the others would be minutes of a C++ compiler
WHAT = [(name, format) for name in MAKERS for format in RUNTIMES if format != "aoti" or name in COMPILED]


@pytest.mark.parametrize("name, format", WHAT)
def test_every_stage_at_any_size(name: str, format: str, folders, note) -> None:
    model, out = folders(name, format)
    for stage, graph in graphs_of(name, model, format).items():
        (file,) = [f for f in out.glob(f"{stage}.*") if f.suffix in (".onnx", ".pt2")]
        for runtime, opened in RUNTIMES[format].items():
            call = opened(file)
            for size in sizes_of(graph):
                inputs = at_size(graph, size)
                for found, wanted in zip(call(inputs), outputs_of(graph, inputs), strict=True):
                    assert found.shape == wanted.shape, (stage, runtime, size)
                    error = note(name, format, stage, runtime, error=relative_error(found, wanted))
                    assert error < 1e-5 or error < 3 * own_error(graph, inputs), (stage, runtime, size, error)


@pytest.mark.parametrize("format", ["onnx", "int8"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_runner_checks_its_golden_vectors(name: str, format: str, folders) -> None:
    _, out = folders(name, format)
    done = subprocess.run([sys.executable, "runner.py", "--check"], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0 and "TOO FAR" not in done.stdout, done.stdout + done.stderr
    rules = json.loads((out / "pipeline.json").read_text(encoding="utf-8"))
    wanted = {f"{stage}.{key}" for stage, graph in rules["graphs"].items() for key in graph["outputs"]}
    wanted |= {"step", "picture"} if name in DIFFUSION else set()
    assert wanted <= {line.split()[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("name", MAKERS)
def test_the_runner_notices_a_wrong_graph(name: str, folders, tmp_path: Path) -> None:
    """A weight that is not what it was: the check goes red."""
    import shutil

    shutil.copytree(folders(name, "onnx")[1], tmp_path / "out")
    file = tmp_path / "out" / ("unet.onnx" if name in DIFFUSION else "text.onnx")
    graph = onnx.load(file)
    weight = max(graph.graph.initializer, key=lambda i: len(i.raw_data))
    weight.raw_data = (np.frombuffer(weight.raw_data, np.float32) * np.float32(1.01)).tobytes()
    onnx.save(graph, file)
    done = subprocess.run([sys.executable, "runner.py", "--check"], cwd=tmp_path / "out", capture_output=True,
                          text=True)
    assert done.returncode == 1 and "TOO FAR" in done.stdout


@pytest.mark.parametrize("name", MAKERS)
def test_no_constant_is_beyond_float16(name: str, folders) -> None:
    """So that a graph whose numbers are made float16 still masks."""
    for file in folders(name, "onnx")[1].glob("*.onnx"):
        model = onnx.load(file)
        onnx.checker.check_model(model)
        assert {i.domain: i.version for i in model.opset_import}[""] == 18
        constants = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute
                                                 if a.type == onnx.AttributeProto.TENSOR)]
        for tensor in map(onnx.numpy_helper.to_array, constants):
            numbers = tensor[np.isfinite(tensor)] if tensor.dtype == np.float32 else np.zeros(1)
            assert not numbers.size or np.abs(numbers).max() <= 65504, file


@pytest.mark.parametrize("name", ["run", "clip"])
def test_int8_is_smaller(name: str, folders) -> None:
    """Of models this small the graph itself is much of the file: the weights are what is counted."""
    import json

    rules = json.loads((folders(name, "int8")[1] / "pipeline.json").read_text(encoding="utf-8"))
    full, small = map(sum, zip(*rules["int8"]["weight_bytes_float32_int8"].values()))
    assert small < 0.4 * full
    assert 0 < max(rules["int8"]["relative_error"].values()) < 0.3


@pytest.mark.parametrize("name", CLIPS)
def test_texts_and_pictures_on_the_command_line(name: str, folders, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGBA", (40, 61), (200, 30, 30, 128)).save(tmp_path / "a.png")
    done = subprocess.run([sys.executable, "runner.py", "--image", str(tmp_path / "a.png"), "--text", "人蔘",
                           "--text", "a cat"], cwd=folders(name, "onnx")[1], capture_output=True, text=True)
    assert done.returncode == 0 and "人蔘" in done.stdout and "a cat" in done.stdout, done.stderr


def test_weights_that_do_not_fit_into_a_file_lie_beside_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "MOST_INLINE", 0)
    inputs = {"x": torch.randn(2, 300)}
    graph = Graph(graphs.Part(torch.nn.Linear(300, 40), lambda layer, x: layer(x)), inputs,
                  {"x": {0: "batch"}}, ["y"])
    said = graphs.write_graph(graph, "onnx", tmp_path / "g.onnx")
    assert (tmp_path / "g.onnx.data").stat().st_size >= 4 * 300 * 40 and said["bytes"] > 4 * 300 * 40
    (found,) = by_onnxruntime(tmp_path / "g.onnx")([torch.ones(3, 300)])
    assert relative_error(found, outputs_of(graph, [torch.ones(3, 300)])[0]) < 1e-5
