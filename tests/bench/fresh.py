"""Rows of fresh processes: what an import costs over torch's, and a whole folder up to the first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.bench.engines import OURS, Failed, Row
from tests.bench.folder import write_folder
from tests.bench.measure import Program, Timed

RUN = """
import json, time
import torch
from tests.bench.measure import memory, peak
torch.set_num_threads({threads})
torch.set_grad_enabled(False)
torch.ones(64, 64) @ torch.ones(64, 64)
began, cpu, wall = memory("VmRSS"), time.process_time(), time.perf_counter()
{body}
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
print(json.dumps([cpu, wall, {memory}]))
"""


def fresh(body: str, memory: str, answer: Path | None = None) -> Timed:
    """Runs the lines in a Python of their own, after torch's import.

    Peers were compiled to bytecode when they were installed; ours is by the first run, the warm-up.
    """
    threads = torch.get_num_threads()
    code = RUN.format(threads=threads, body=body, memory=memory)
    given = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**given, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        raise Failed((done.stderr.strip() or "killed").splitlines()[-1][:200])
    cpu, wall, held = json.loads(done.stdout.splitlines()[-1])
    return Timed(cpu, wall, [torch.load(answer, weights_only=True)] if answer else [], held)


class Import(Row):
    """The memory is what the import adds to the process's."""

    title, rounds = "import of the pipeline and of CLIP, over torch: memory more", 5
    engines = (OURS, "diffusers, transformers")
    peaks = False

    def build(self, name: str) -> Program:
        """The same classes."""
        ours = ("minidiff", "miniclip")
        diffusion, clip = ours if name == OURS else ("diffusers", "transformers")
        body = (f"from {diffusion} import StableDiffusionPipeline, UNet2DConditionModel\n"
                f"from {clip} import CLIPModel")
        return lambda: fresh(body, "memory('VmRSS') - began")


class Load(Row):
    """A folder up to the first step; imports: with those of the library, as who starts a program waits for
    them. Nothing is optimized: it would not pay for one step."""

    rounds = 3
    engines = (OURS, "diffusers")
    peaks = False

    def __init__(self, *args, imports: bool = False, **options):
        super().__init__(*args, **options)
        self.imports = imports
        self.title = ("import over torch, then " * imports
                      + "a folder of SD 1.5 (4.3 GB) opened, a step of the UNet at 1 x 4 x 16 x 16")
        write_folder(self.folder)

    def build(self, name: str) -> Program:
        """Each weight is read, those too that were only mapped."""
        answer = self.folder / f"{name}.pt"
        library = "minidiff" if name == OURS else "diffusers"
        options = "" if name == OURS else ", safety_checker=None"
        again = "" if self.imports else "cpu, wall = time.process_time(), time.perf_counter()"
        body = f"""from {library} import StableDiffusionPipeline
{again}
pipe = StableDiffusionPipeline.from_pretrained({str(self.folder)!r}{options})
torch.manual_seed(0)
x = pipe.unet(torch.randn(1, 4, 16, 16), 5, torch.randn(1, 77, 768)).sample
for model in (pipe.unet, pipe.vae, pipe.text_encoder):
    sum(float(p.flatten()[::512].sum()) for p in model.parameters())
torch.save(x, {str(answer)!r})"""
        return lambda: fresh(body, "peak()", answer)
