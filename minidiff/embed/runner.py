"""A picture from a prompt: numpy and onnxruntime, the graphs beside this file and what pipeline.json says.

    python runner.py --prompt "a lake" --out lake.png
    python runner.py --check

Read draw() first. Papers: Song 2021 (DDIM, eq. 12), Ho 2022 (guidance).
Shapes: B pictures, L latent channels, h w their size, S text tokens, D text width, C H W the picture.
"""

import argparse
import json
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from tokens import Tokenizer

HERE = Path(__file__).resolve().parent


class Pipeline:
    """The graphs of a folder, each opened when it is first asked, and the arithmetic between them."""

    def __init__(self, folder=HERE):
        self.folder = Path(folder)
        self.rules = json.loads((self.folder / "pipeline.json").read_text("utf-8"))
        self.tokenizers = [Tokenizer(self.folder / r["folder"], r) for r in self.rules["tokenizers"]]
        self.sessions = {}

    def run(self, name, *inputs):
        """The outputs of a graph, in order."""
        import onnxruntime

        graph = self.rules["graphs"][name]
        if name not in self.sessions:
            self.sessions[name] = onnxruntime.InferenceSession(self.folder / graph["file"],
                                                               providers=["CPUExecutionProvider"])
        return self.sessions[name].run(None, dict(zip(graph["inputs"], inputs)))

    # ---- the text

    def tokens(self, prompts):
        """Ids [B, S] of each tokenizer; SDXL has two."""
        return [np.array(tokenizer(prompts)[0], np.int64) for tokenizer in self.tokenizers]

    def conditions(self, prompts, height, width):
        """What the UNet is given besides x and t, without a prompt and with it: rows [2 B, ...]."""
        count, zeros = len(prompts), self.rules["guidance"]["no_prompt"] == "zeros"
        found = self.run("text_encoder", *self.tokens(prompts if zeros else [""] * count + prompts))
        if zeros:
            found = [np.concatenate([np.zeros_like(f), f]) for f in found]
        if "sizes" in self.rules["graphs"]["unet"]["inputs"]:           # SDXL: size, corner, size
            found.append(np.tile(np.float32([height, width, 0, 0, height, width]), (2 * count, 1)))
        return found

    # ---- the walk from noise to a picture

    def timesteps(self, steps):
        """The training timesteps to visit, from high to low, and the stride to what lies below each."""
        s, T = self.rules["schedule"], len(self.rules["schedule"]["alphas_cumprod"])
        if s["spacing"] == "linspace":
            chosen = [round(i * (T - 1) / max(steps - 1, 1)) for i in range(steps)][::-1]
        elif s["spacing"] == "leading":
            chosen = [i * (T // steps) + s["offset"] for i in range(steps)][::-1]
        else:
            chosen = [round(T - i * (T - (T - T / steps))) - 1 for i in range(steps)]
        return chosen, T // steps

    def alpha_bar(self, t):
        """The share of the picture that is left at timestep t, as float32."""
        s = self.rules["schedule"]
        return np.float32(s["alphas_cumprod"][t] if t >= 0 else s["final_alpha_cumprod"])

    def step(self, output, x, t, stride):
        """x_t [B, L, h, w] and the UNet's output -> x_{t - stride} (Song 2021, eq. 12)."""
        s, one = self.rules["schedule"], np.float32(1)
        now, then = self.alpha_bar(t), self.alpha_bar(t - stride)
        a, sigma = np.sqrt(now), np.sqrt(one - now)
        if s["prediction_type"] == "v_prediction":
            x0, eps = a * x - sigma * output, a * output + sigma * x
        elif s["prediction_type"] == "sample":
            x0, eps = output, (x - a * output) / sigma
        else:
            x0, eps = (x - sigma * output) / a, output
        if s["clip"]:
            x0 = np.clip(x0, -np.float32(s["clip"]), np.float32(s["clip"]))
        if s["eps_from_x0"]:
            eps = (x - a * x0) / sigma
        return np.sqrt(then) * x0 + np.sqrt(one - then) * eps

    def predict(self, x, t, conditions, guidance):
        """The UNet's output for x [B, L, h, w], without prompt and with it, mixed."""
        twice = np.concatenate([x, x])
        free, guided = np.split(self.run("unet", twice, np.full(len(twice), t, np.int64), *conditions)[0], 2)
        return free + np.float32(guidance) * (guided - free)

    def noise(self, count, seed, height, width):
        """[count, L, h, w]; picture i of a seed is the same in any batch."""
        f, L = self.rules["latent"]["factor"], self.rules["latent"]["channels"]
        shape = (L, height // f, width // f)
        generators = [np.random.default_rng([seed, i]) for i in range(count)]
        return np.stack([g.standard_normal(shape, np.float32) for g in generators])

    def decode(self, x):
        """Latents [B, L, h, w] -> pictures [B, C, H, W] in -1..1."""
        rules = self.rules["latent"]
        if "vae_decoder" in self.rules["graphs"]:
            mean, std = (np.reshape(np.float32(rules[name]), (1, -1, 1, 1)) for name in ("mean", "std"))
            return np.clip(self.run("vae_decoder", x * std / np.float32(rules["scaling"]) + mean)[0], -1, 1)
        f, (B, L, h, w) = rules["fold"], x.shape                       # f x f pixels are folded into channels
        squares = x.reshape(B, L // f**2, f, f, h, w).transpose(0, 1, 4, 2, 5, 3)
        pictures = np.clip(squares.reshape(B, L // f**2, h * f, w * f), -1, 1)
        return self.run("upscaler", pictures)[0] if "upscaler" in self.rules["graphs"] else pictures

    def draw(self, prompts, noise, steps, guidance, progress=lambda done: None):
        """Prompts and noise [B, L, h, w] -> pictures [B, C, H, W] in -1..1."""
        x, f = noise, self.rules["latent"]["factor"]
        conditions = self.conditions(prompts, x.shape[2] * f, x.shape[3] * f)
        self.sessions.pop("text_encoder")                               # its memory is needed now
        timesteps, stride = self.timesteps(steps)
        for i, t in enumerate(timesteps):
            x = self.step(self.predict(x, t, conditions, guidance), x, t, stride)
            progress(i + 1)
        return self.decode(x)


def png(picture):
    """[C, H, W] in -1..1 -> the bytes of a PNG file, C = 1 grey or 3 colours."""
    levels = np.round((picture + 1) * 127.5).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in levels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = levels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def check(p):
    """Every stage on its golden input beside its golden output: True if all agree."""
    golden = {file.stem: np.load(file) for file in (p.folder / "golden").glob("*.npy")}
    rules, good = p.rules["golden"], True
    for number, ids in enumerate(p.tokens(["", rules["prompt"]])):
        same = np.array_equal(ids, golden[f"tokens_{number}"])
        print(f"tokens_{number:<15} {'equal' if same else 'DIFFERENT'}")
        good = good and same
    timesteps, stride = p.timesteps(rules["steps"])
    stages = {"step": [p.step(golden["guided"], golden["noise"], timesteps[0], stride)]}
    for name, graph in p.rules["graphs"].items():
        stages[name] = p.run(name, *(golden[f"{name}.{i}"] for i in graph["inputs"]))
    drawn = p.draw([rules["prompt"]], golden["noise"], rules["steps"], rules["guidance"])
    stages["picture"] = [drawn]
    for name, found in stages.items():
        outputs = p.rules["graphs"][name]["outputs"] if name in p.rules["graphs"] else [""]
        for key, value in zip(outputs, found):
            wanted = golden[f"{name}.{key}" if key else name]
            error = np.abs(value - wanted).max() / max(np.abs(wanted).max(), 1e-12)
            if name == "picture":                                       # many steps: in grey levels of 255
                error = np.abs(value - wanted).max() * 127.5
                text, fits = f"{error:.2g} grey levels", error <= 2
            else:
                text, fits = f"{error:.2g} relative", error <= rules["tolerance"]
            print(f"{name + '.' * bool(key) + key:<22} {text}{'' if fits else '  TOO FAR'}")
            good = good and fits
    return bool(good)


def main():
    parser = argparse.ArgumentParser(description="A picture from a prompt, by the graphs beside this file.")
    parser.add_argument("--prompt", default="", help="what to draw")
    parser.add_argument("--out", default="picture.png", help="a PNG, written over (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="default: pipeline.json's")
    parser.add_argument("--guidance", type=float, help="default: pipeline.json's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", help="HxW in pixels, if the graphs take any (default: pipeline.json's)")
    parser.add_argument("--check", action="store_true", help="compare every stage with its golden vector")
    a, p = parser.parse_args(), Pipeline()
    if a.check:
        return 0 if check(p) else 1
    start, defaults = time.perf_counter(), p.rules["defaults"]
    height, width = map(int, a.size.split("x")) if a.size else p.rules["size"]
    steps = a.steps or defaults["steps"]
    guidance = defaults["guidance"] if a.guidance is None else a.guidance
    picture = p.draw([a.prompt], p.noise(1, a.seed, height, width), steps, guidance,
                     lambda done: print(f"step {done}/{steps}", file=sys.stderr))
    Path(a.out).write_bytes(png(picture[0]))
    print(f"{a.out}: {picture.shape[3]} x {picture.shape[2]}, {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
