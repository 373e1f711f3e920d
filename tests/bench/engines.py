"""The programs of a row of single models: ours, upstream's at its best, and the other runtimes, on the same
weights and inputs.

ONNX Runtime and OpenVINO read files that a process of its own exports from upstream's model (`export`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from minidiff import optimize
from tests.bench.measure import Program, peak

OURS, PLAIN = "ours", "ours, not optimized"
ONNX, OPENVINO = "ONNX Runtime", "OpenVINO"
FILES = {ONNX: "model.onnx", OPENVINO: "model.xml"}


class Failed(Exception):
    """A process of a row ended with an error."""


class Row:
    """What a row runs: `build(name)` makes the program of an engine.

    alone: in a process for one engine only, whose memory counts: it makes its own weights, of its own class.
    warm: what it builds has already run.
    """

    title = ""
    rounds, steps = 5, 0
    engines: tuple[str, ...] = ()
    warm = False
    peaks = True            # whether memory is measured in processes of their own
    flops: float | None = None
    loose: tuple[str, ...] = (ONNX, OPENVINO)   # held against 1e-4 instead of 1e-5

    def __init__(self, name: str, folder: Path, alone: bool = False, steps: int = 0):
        self.name, self.folder, self.alone, self.steps = name, folder, alone, steps or self.steps
        torch.manual_seed(0)

    def prepare(self, name: str) -> None:
        """What an engine needs of other processes, before this one holds models."""

    def build(self, name: str) -> Program:
        """The program of one of `engines`."""
        raise NotImplementedError


class Asked(nn.Module):
    """A model and how it is asked: tensors in, a tuple of tensors out, as exporters want it."""

    def __init__(self, model: nn.Module, ask: Callable[..., tuple[Tensor, ...]]):
        super().__init__()
        self.model, self.ask = model, ask
        self.train(model.training)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.ask(self.model, *inputs)


class Forward(Row):
    """One model's answer to `inputs`."""

    library = "diffusers"
    meta = True             # models are first made without memory: none of their buffers would be missing
    inputs: tuple[Tensor, ...]
    kept: dict[str, Tensor] | None = None

    @property
    def engines(self) -> tuple[str, ...]:
        """Ours first. Compiled: where a C++ compiler is."""
        compiled = (f"{self.library}, compiled",) * has_compiler()
        return (OURS, PLAIN, self.library, f"{self.library}, tuned", *compiled, ONNX, OPENVINO)

    def make_ours(self) -> nn.Module:
        """Our class, with any weights."""
        raise NotImplementedError

    def make_theirs(self) -> nn.Module:
        """Upstream's, with the random weights of its constructor."""
        raise NotImplementedError

    def ask(self, model: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Of ours and upstream's alike."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """Those of the row, made once."""
        if self.kept is None:
            torch.manual_seed(0)
            self.kept = self.make_theirs().state_dict()
        return self.kept

    def filled(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A model that shares the row's weights."""
        if self.alone:
            return make().eval()
        weights = self.weights()
        with torch.device("meta") if self.meta else nullcontext():
            model = make()
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def tuned(self) -> nn.Module:
        """Upstream's model as fast as its settings make it."""
        model = self.filled(self.make_theirs).to(memory_format=torch.channels_last)
        model.fuse_qkv_projections()
        return model

    def tuned_inputs(self) -> tuple[Tensor, ...]:
        """Maps with channels last."""
        return tuple(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
                     for x in self.inputs)

    def prepare(self, name: str) -> None:
        """The files of other runtimes."""
        if name in FILES:
            child(self, "--export", str(self.folder / FILES[name]))

    def build(self, name: str) -> Program:
        """The program of one of `engines`."""
        if name == OURS:
            self.flops = None if self.alone else self.count()
            return self.program(optimize(self.filled(self.make_ours)), self.inputs)
        if name == PLAIN:
            return self.program(self.filled(self.make_ours), self.inputs)
        if name == self.library:
            return self.program(self.filled(self.make_theirs), self.inputs)
        if name == f"{self.library}, tuned":
            return self.program(self.tuned(), self.tuned_inputs())
        if name == f"{self.library}, compiled":
            return compiled(Asked(self.tuned(), self.ask), self.tuned_inputs())
        run = {ONNX: onnx_runtime, OPENVINO: openvino}[name]
        return run(self.folder / FILES[name], self.inputs)

    def count(self) -> float:
        """Multiplications and additions of a run, by the definitions of ours' layers, without computing."""
        from torch.utils.flop_counter import FlopCounterMode  # takes memory: not an engine's

        with torch.device("meta"):
            program = self.program(self.make_ours(), tuple(x.to("meta") for x in self.inputs))
        with FlopCounterMode(display=False) as counter:
            program()
        return float(counter.get_total_flops())

    def program(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Program:
        """A model and its inputs."""
        return lambda: self.ask(model, *inputs)


def has_compiler() -> bool:
    """Whether torch.compile finds one."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++", "cl"))


# -------------------------------------------------------------------------------------------- the others


def compiled(model: nn.Module, inputs: tuple[Tensor, ...]) -> Program:
    """torch.compile, with the weights frozen: packed for the CPU and folded."""
    fast = torch.compile(model, options={"freezing": True})
    return lambda: fast(*inputs)


def onnx_runtime(file: Path, inputs: tuple[Tensor, ...]) -> Program:
    """ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: [torch.from_numpy(y) for y in session.run(None, given)]


def openvino(file: Path, inputs: tuple[Tensor, ...]) -> Program:
    """OpenVINO on the CPU, in float32."""
    from openvino import Core

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    model = Core().compile_model(str(file), "CPU", settings)
    given = [x.numpy() for x in inputs]
    return lambda: [torch.from_numpy(y.copy()) for y in model(given, share_inputs=True).values()]


def child(row: Row, *command: str) -> str:
    """The last line that `python -m tests.bench` prints about a row, on as many threads. For memory, of many
    steps one is enough."""
    threads, steps = str(torch.get_num_threads()), "1" if "--peak" in command else str(row.steps)
    done = subprocess.run([sys.executable, "-m", "tests.bench", row.name, *command, "--threads", threads,
                           "--steps", steps, "--folder", str(row.folder)], text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": threads})
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {(done.stderr.strip() or 'killed').splitlines()[-1][:200]}")
    return (done.stdout.splitlines() or [""])[-1]


def export(row: Forward, file: Path) -> None:
    """Upstream's model with the row's weights as a file of ONNX or OpenVINO, of fixed shapes."""
    model = Asked(row.filled(row.make_theirs), row.ask)
    if file.suffix == ".onnx":
        torch.onnx.export(model, row.inputs, file, dynamo=True, external_data=True, verbose=False)
        return
    from openvino import convert_model, save_model

    converted = convert_model(model, example_input=row.inputs, input=[tuple(x.shape) for x in row.inputs])
    save_model(converted, file, compress_to_fp16=False)


def peak_of(row: Row, name: str) -> float:
    """GB that this process holds at most when it makes one engine and runs it once."""
    row.build(name)()
    return peak()
