"""Loads a whole SD 1.5 folder (random weights, 1.07 billion numbers, 4.0 GiB) here and in diffusers,
takes one step.

`python tests/bench/bench_load.py [--dir DIR] [--dtype float16]`.
Each run is a process of its own; the first run of each reads a cold file cache. Peak memory is the process's
resident set, mapped file pages included (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

RUN = """
import json, time
def peak():
    with open("/proc/self/status") as file:     # the high-water mark of this process alone
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) / 2**20
began = time.perf_counter()
import torch
base_import = time.perf_counter() - began
torch.set_num_threads(2)
dtype = getattr(torch, {dtype!r})
{imports}
imported, base = time.perf_counter() - began - base_import, peak()
began = time.perf_counter()
pipe = {load}
loaded = time.perf_counter() - began
models = [pipe.unet, pipe.vae, pipe.text_encoder]
weights = sum(p.numel() * p.element_size() for m in models for p in m.parameters()) / 2**30
began = time.perf_counter()
with torch.no_grad():
    x = pipe.unet(torch.randn(1, 4, 16, 16, dtype=dtype), 5, torch.randn(1, 77, 768, dtype=dtype)).sample
    for m in models:                        # touch every weight, also those that only mapped
        sum(p.flatten()[::512].float().sum().item() for p in m.parameters())
print(json.dumps(dict(imported=imported, loaded=loaded, step=time.perf_counter() - began, weights=weights,
                      peak=(peak() - base) / weights)))
"""
OURS = ("from minidiff.pipeline import StableDiffusionPipeline as P",
        "P.from_pretrained({folder!r}, torch_dtype=dtype)")
THEIRS = (
    "from diffusers import StableDiffusionPipeline as P",
    "P.from_pretrained({folder!r}, torch_dtype=dtype, safety_checker=None)",
)


def write_folder(folder: str) -> None:
    import torch

    from miniclip.config import CLIPTextConfig
    from miniclip.model import CLIPTextModel
    from miniclip.tokenizer import CLIPTokenizer
    from minidiff.pipeline import StableDiffusionPipeline
    from minidiff.samplers import PNDMScheduler
    from minidiff.unet import UNet2DConditionModel
    from minidiff.vae import AutoencoderKL

    tokenizer = CLIPTokenizer.train(["a herb shop"] * 2, vocab_size=520)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
             "num_attention_heads": 12}
    config = CLIPTextConfig(vocab_size=49408, projection_dim=768, **sizes)
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        text = CLIPTextModel(config)
    for model in (unet, vae, text):
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.uniform_(parameter, -0.01, 0.01)
    scheduler = PNDMScheduler(beta_end=0.012, beta_start=0.00085, beta_schedule="scaled_linear",
                              steps_offset=1)
    StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler).save_pretrained(folder)


def measure(side: tuple[str, str], folder: str, dtype: str) -> dict[str, float]:
    code = RUN.format(imports=side[0], load=side[1].format(folder=folder), dtype=dtype)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", default=None,
                        help="where 4 GB may be written; kept if given, and used again")
    parser.add_argument("--dtype", default="float32")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.dir or temporary
        if not os.path.exists(os.path.join(folder, "model_index.json")):
            write_folder(folder)
        for name, side in (("minidiff", OURS), ("diffusers", THEIRS)) * 2:
            m = measure(side, folder, a.dtype)
            print(
                f"{name:9}  import beyond torch {m['imported']:5.2f} s   load {m['loaded']:5.2f} s   "
                f"peak {m['peak']:.2f} x the weights ({m['weights']:.2f} GiB)   step {m['step']:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
