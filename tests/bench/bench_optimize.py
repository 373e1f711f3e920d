"""What minidiff.optimize gains: the plain model and the optimized one, turn and turn about in one process.

    OMP_NUM_THREADS=1 python -m tests.bench.bench_optimize              # or some of: unet1 unet2 demo ...

Random weights, one thread. Medians of CPU time (a busy machine says less about wall time), the ratio of each
pair of runs, the largest relative difference, and how much memory the optimized run adds to the plain one.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from miniclip import CLIPModel
from miniclip.config import CLIPConfig
from minidiff import AutoencoderKL, UNet2DConditionModel, optimize
from minidiff.text_to_image import PRESETS, ImageFormat, build_text_to_image

VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
       "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
Call = Callable[[nn.Module], Tensor]


def unet(batch: int) -> tuple[nn.Module, Call]:
    """SD 1.5's, at 64 x 64."""
    given = torch.randn(batch, 4, 64, 64), 500, torch.randn(batch, 77, 768)
    config = {"cross_attention_dim": 768, "attention_head_dim": 8}
    return UNet2DConditionModel(**config), lambda model: model(*given).sample


def demo() -> tuple[nn.Module, Call]:
    """The small preset's UNet: 20 pictures of 64 x 64, with guidance."""
    model = build_text_to_image(PRESETS["small"], ImageFormat(64, 1, 2), ["春 草書"])
    given = torch.randn(40, 4, 32, 32), 500, torch.randn(40, 5, PRESETS["small"].text_width)
    return model.unet, lambda model: model(*given).sample


def vae() -> tuple[nn.Module, Call]:
    """SD's decoder, to 512 x 512."""
    latents = torch.randn(1, 4, 64, 64)
    return AutoencoderKL(**VAE), lambda model: model.decode(latents).sample


def clip(batch: int) -> tuple[nn.Module, Call]:
    """B/32, pictures and texts."""
    ids, pictures = torch.randint(49000, (batch, 77)), torch.randn(batch, 3, 224, 224)
    return CLIPModel(CLIPConfig()), lambda model: model(ids, pictures).logits_per_image


WORK = {"unet1": lambda: unet(1), "unet2": lambda: unet(2), "demo": demo, "vae": vae,
        "clip1": lambda: clip(1), "clip8": lambda: clip(8)}


def peak() -> float:
    """GB of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(call: Call, model: nn.Module) -> tuple[float, Tensor]:
    start = time.process_time()
    found = call(model)
    return time.process_time() - start, found


def compare(name: str, rounds: int, winograd: bool) -> None:
    """One line. The plain model has its own weights, shared with the optimized one."""
    plain, call = WORK[name]()
    plain = plain.eval()
    fast = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})     # another tree, the same tensors
    _, wanted = timed(call, plain)
    before = peak()
    (_, found), after = timed(call, optimize(fast, winograd)), peak()
    pairs = [(timed(call, plain)[0], timed(call, fast)[0]) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    error = float((found - wanted).norm() / wanted.norm())
    print(f"{name:6} plain {mine:8.3f} s   optimized {other:8.3f} s   {ratio:5.2f} x   "
          f"difference {error:.0e}   peak {before:.2f} GB + {after - before:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", nargs="*", choices=[*WORK, []], default=list(WORK))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-winograd", dest="winograd", action="store_false", help="packed weights only")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread")
    with torch.no_grad():
        for name in args.work:
            compare(name, args.rounds, args.winograd)


if __name__ == "__main__":
    main()
