"""Time against difference: the exact picture, and what each shortcut of minidiff.shortcuts makes of it.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_shortcuts sd                      # SD 1.5's shape: hours
    OMP_NUM_THREADS=1 python -m tests.bench.bench_shortcuts sd --latents 32         # a quarter of the picture
    OMP_NUM_THREADS=1 python -m tests.bench.bench_shortcuts run --run out/calligraphy --judge out/judge
    python -m tests.bench.bench_shortcuts page                                      # the page anew

Each row is a process of its own, one thread, after a warm-up. Rows go into docs/shortcuts.json as soon as
they are measured, and docs/shortcuts.md is made of it: no number there is typed.
`sd`: random weights, so the difference says what is given up of the latents, not of a picture's quality.
`run`: a run of train.train_diffusion, whose pictures a judge of train.judge can name.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniclip import CLIPTextModel
from miniclip.config import CLIPTextConfig
from miniclip.weights import load_file, save_file, write_json
from minidiff import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    TextToImage,
    UNet2DConditionModel,
    deep_cache,
    int8,
    merge_tokens,
    optimize,
)
from tests.bench.models import VAE

FILE = Path(__file__).parents[2] / "docs" / "shortcuts.json"
EXACT = "plain"
PART = {"optimize": True, "interval": (0.2, 0.8)}
ROWS: dict[str, dict[str, Any]] = {
    EXACT: {},
    "optimized": {"optimize": True},
    "guidance from 0.2 to 0.8": PART,
    "guidance from 0 to 0.5": {"optimize": True, "interval": (0.0, 0.5)},
    "deep cache, every 2": {"optimize": True, "every": 2},
    "deep cache, every 3": {"optimize": True, "every": 3},
    "deep cache, every 5": {"optimize": True, "every": 5},
    "tokens merged, 0.5": {"optimize": True, "ratio": 0.5},
    "int8": {"optimize": True, "int8": True},
    "guidance 0.2 to 0.8, cache 2": {**PART, "every": 2},
    "guidance 0.2 to 0.8, cache 3": {**PART, "every": 3},
    "guidance 0.2 to 0.8, cache 3, merged 0.5": {**PART, "every": 3, "ratio": 0.5},
    "guidance 0.2 to 0.8, cache 5, merged 0.5": {**PART, "every": 5, "ratio": 0.5},
    "all of the last, int8": {**PART, "every": 5, "ratio": 0.5, "int8": True},
}
BESIDE = {"sd": ["diffusers"], "run": ["another seed"]}         # measured as well
SD_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def shorten(model: Any, row: dict[str, Any]) -> None:
    """Applies a row to a pipeline or a TextToImage."""
    model.guidance_interval = row.get("interval", (0.0, 1.0))
    if "every" in row:
        deep_cache(model.unet, row["every"])
    if "ratio" in row:
        merge_tokens(model.unet, row["ratio"])
    if "int8" in row:
        int8(model.unet)
    if "optimize" in row:
        model.optimize() if isinstance(model, StableDiffusionPipeline) else optimize(model)


# ------------------------------------------------------------------------------------------ in each process


def measure_sd(name: str, args: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """A whole picture: text, 20 steps with guidance, decoding."""
    torch.manual_seed(0)
    text = CLIPTextModel(CLIPTextConfig(**SD_TEXT)).eval()
    unet, vae = UNet2DConditionModel(**SD_UNET).eval(), AutoencoderKL(**VAE, scaling_factor=0.18215).eval()
    scheduler, ids = DPMSolverMultistepScheduler(**SD_BETAS, steps_offset=1), torch.randint(49000, (2, 1, 77))
    latents = torch.randn(1, 4, args.latents, args.latents)
    pipe = StableDiffusionPipeline(vae, text, None, unet, scheduler)
    if name == "diffusers":
        pipe = upstream(pipe)
    else:
        shorten(pipe, ROWS[name])

    @torch.no_grad()
    def draw(steps: int) -> Tensor:
        prompt, negative = (text(each).last_hidden_state for each in ids)
        found = pipe(prompt_embeds=prompt, negative_prompt_embeds=negative, latents=latents,
                     height=8 * args.latents, width=8 * args.latents, guidance_scale=7.5,
                     num_inference_steps=steps, output_type="latent").images
        pipe.vae.decode(found / vae.config.scaling_factor)
        return found

    seconds, found = timed(draw, args.steps)
    bytes_ = sum(t.numel() * t.element_size() for t in [*pipe.unet.parameters(), *pipe.unet.buffers()])
    return {"seconds": seconds, "unet_gb": bytes_ / 1e9}, found


def upstream(pipe: StableDiffusionPipeline) -> Any:
    """diffusers' pipeline around the same tensors."""
    import diffusers

    unet = diffusers.UNet2DConditionModel(**SD_UNET)
    vae = diffusers.AutoencoderKL(**VAE, scaling_factor=0.18215)
    unet.load_state_dict(pipe.unet.state_dict(), assign=True)
    vae.load_state_dict(pipe.vae.state_dict(), assign=True)
    scheduler = diffusers.DPMSolverMultistepScheduler(**SD_BETAS, steps_offset=1)
    made = diffusers.StableDiffusionPipeline(vae.eval(), None, None, unet.eval(), scheduler, None, None,
                                             requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def measure_run(name: str, args: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Pictures of a run, and the share of them that the judge names right."""
    model = TextToImage.load(args.run)
    shorten(model, ROWS.get(name, ROWS[EXACT]))
    prompts = [model.captions[i % len(model.captions)] for i in range(args.count)]
    seconds, found = timed(lambda steps: model.sample(prompts, 7 + (name not in ROWS), steps, args.guidance),
                           args.steps)
    measured: dict[str, Any] = {"seconds": seconds}
    if args.judge:
        from train.glyphs import classify_images, load_judge

        names, _ = classify_images(load_judge(args.judge), found)
        right = sum(n == prompt.split()[0] for n, prompt in zip(names, prompts, strict=True))
        measured["legible"] = f"{right} of {len(prompts)}"
    return measured, found


def timed(draw: Any, steps: int) -> tuple[float, Tensor]:
    """CPU seconds of draw(steps), after a walk of one step: then the copies of weights are there."""
    draw(1)
    start = time.process_time()
    found = draw(steps)
    return time.process_time() - start, found


def measure(args: argparse.Namespace) -> None:
    """One row, as one line of JSON; EXACT leaves what the others are compared with."""
    torch.set_num_threads(1)
    measured, found = {"sd": measure_sd, "run": measure_run}[args.what](args.row, args)
    if args.row == EXACT:
        save_file({"exact": found.contiguous()}, args.kept)
    wanted = load_file(args.kept)["exact"]
    measured["error"] = float((found - wanted).norm() / wanted.norm())
    measured["grey"] = float((found - wanted).abs().mean()) * 127.5         # of pictures in -1 to 1
    measured["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"name": args.row, **measured}))


# ---------------------------------------------------------------------------------------------- the processes


def all_rows(args: argparse.Namespace) -> None:
    """Measures the rows in turn, and writes file and page after each."""
    asked = [EXACT, *[name for name in [*ROWS, *BESIDE[args.what]] if name != EXACT]]
    asked = [name for name in asked if name == EXACT or not args.rows or name in args.rows]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in asked:
            call = [sys.executable, "-m", "tests.bench.bench_shortcuts", *sys.argv[1:], "--row", name,
                    "--kept", str(Path(folder) / "exact.safetensors")]
            done = subprocess.run(call, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            write(args, {"about": about(args), "rows": rows})


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What was measured where."""
    kept = ("latents",) if args.what == "sd" else ("count", "guidance")
    return {**{name: getattr(args, name) for name in ("steps", *kept)}, "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine()}


def write(args: argparse.Namespace, measured: dict[str, Any] | None = None) -> None:
    """The file with what was measured, and the page of the whole file."""
    results = json.loads(args.file.read_text(encoding="utf-8")) if args.file.exists() else {}
    if measured is not None:
        results[args.what] = measured
        write_json(args.file, results)
    args.file.with_suffix(".md").write_text(page(results), encoding="utf-8")


# --------------------------------------------------------------------------------------------------- the page


def page(results: dict[str, Any]) -> str:
    """docs/shortcuts.md."""
    parts = ["# Shortcuts: time against difference",
             "Made by `python -m tests.bench.bench_shortcuts`. All rows but the plain one and those beside "
             "it are optimized (`minidiff.optimize`) as well. CPU seconds on one thread. How each shortcut "
             "works and what it gives up: "
             "[minidiff/shortcuts.py](../minidiff/shortcuts.py)."]
    for what, heading in (("sd", sd_heading), ("run", run_heading)):
        if what in results:
            parts += [*heading(results[what]["about"]), table(what, results[what]["rows"])]
    return "\n\n".join(parts) + "\n"


def sd_heading(a: dict[str, Any]) -> tuple[str, str]:
    side = 8 * a["latents"]
    return ("## Stable Diffusion 1.5's shape",
            f"Random weights: text to picture of {side} x {side}, {a['steps']} steps of DPM-Solver++ with "
            "guidance 7.5, text tower and VAE included. Difference: of the latents, relative. It says "
            "nothing of how a trained model's pictures look. "
            f"torch {a['torch']}, {a['cpu']}, {a['machine']}.")


def run_heading(a: dict[str, Any]) -> tuple[str, str]:
    return ("## A run of train_diffusion",
            f"{a['count']} pictures, {a['steps']} steps of DDIM with guidance {a['guidance']:g}. Difference: "
            "mean of the absolute differences in grey levels, of 255; another seed is another picture. "
            "Legible: named right by a judge that never saw the run. "
            f"torch {a['torch']}, {a['cpu']}, {a['machine']}.")


def table(what: str, rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    plain = rows[0]["seconds"]
    columns = {"": lambda r: r["name"], "CPU s": lambda r: f"{r['seconds']:.1f}",
               "times as fast": lambda r: f"{plain / r['seconds']:.2f}"}
    if what == "sd":
        columns |= {"difference": lambda r: f"{r['error']:.1e}",
                    "UNet's weights, GB": lambda r: f"{r['unet_gb']:.2f}",
                    "peak memory, GB": lambda r: f"{r['peak_gb']:.1f}"}
    else:
        columns |= {"difference": lambda r: f"{r['grey']:.2f}"}
        if "legible" in rows[0]:
            columns["legible"] = lambda r: r["legible"]
    cells = [[cell(row) for cell in columns.values()] for row in rows]
    lines = [list(columns), ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["sd", "run", "page"])
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *sum(BESIDE.values(), [])], help="default: all")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--latents", type=int, default=64, help="sd: height and width of the latents")
    parser.add_argument("--run", default="out/calligraphy")
    parser.add_argument("--judge", help="run: a judge's folder")
    parser.add_argument("--count", type=int, default=40, help="run: pictures")
    parser.add_argument("--guidance", type=float, default=1.5, help="run")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--kept", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "page":
        write(args)
    elif args.row:
        measure(args)
    else:
        all_rows(args)


if __name__ == "__main__":
    main()
