"""Speed and memory beside diffusers, turn and turn about in one run: make bench.
Ratios first: machines are noisy."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import diffusers
import torch

from minidiff import UNet2DConditionModel

DEMO = {"in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64, 128), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), "cross_attention_dim": 128,
        "attention_head_dim": (1, 2, 4), "norm_num_groups": 8, "use_linear_projection": True}
SD_SMALL = {"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 256, "norm_num_groups": 16}


def compare(name: str, ours: Callable[[], float], theirs: Callable[[], float], unit: str,
            rounds: int = 7) -> None:
    """Medians of alternating runs after one warm-up each; the ratio is the median of the pairs' ratios."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{name:44} ours/theirs {ratio:5.2f}   {mine:9.3f} {unit} / {other:9.3f} {unit}", flush=True)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def step(model: torch.nn.Module, inputs: tuple, train: bool) -> Callable[[], float]:
    def work() -> None:
        with torch.set_grad_enabled(train):
            out = model(*inputs).sample
        if train:
            out.square().mean().backward()

    return lambda: seconds(work)


def unets(name: str, config: dict, batch: int, size: int, tokens: int) -> None:
    torch.manual_seed(0)
    theirs, ours = diffusers.UNet2DConditionModel(**config), UNet2DConditionModel(**config)
    ours.load_state_dict(theirs.state_dict())
    inputs = (torch.randn(batch, 4, size, size), 500,
              torch.randn(batch, tokens, config["cross_attention_dim"]))
    for train in (False, True):
        what = "forward + backward" if train else "forward"
        compare(f"{name}, {what}", step(ours, inputs, train), step(theirs, inputs, train), "s")
    fast = (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
    ours.to(memory_format=torch.channels_last)
    compare(f"{name}, forward + backward, channels last", step(ours, fast, True), step(theirs, inputs, True),
            "s")


def importing(statement: str) -> Callable[[], float]:
    """Seconds of a fresh Python to run `statement` after torch is there."""
    program = f"import torch, time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return lambda: float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                                        check=True).stdout)


def main() -> None:
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads")
    compare("import of the UNet", importing("from minidiff import UNet2DConditionModel"),
            importing("from diffusers import UNet2DConditionModel"), "s", rounds=3)
    unets("demo UNet, 20 x 4 x 32 x 32", DEMO, batch=20, size=32, tokens=5)
    unets("quarter-width SD 1.5, 2 x 4 x 64 x 64", SD_SMALL, batch=2, size=64, tokens=77)


if __name__ == "__main__":
    main()
