"""A picture from a prompt: numpy and onnxruntime, the graphs beside this file and what pipeline.json says.

    python runner.py --prompt "a lake" --out lake.png
    python runner.py --check

Read draw() first. Papers: Song 2021 (DDIM, eq. 12), Liu 2022 (flow), Song 2023 (consistency models), Ho 2022.
Shapes: N noises of a walk, B pictures, L latent channels, h w their size, S text tokens, C H W the picture.
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
        s, self.sessions = self.rules["schedule"], {}
        self.alpha_bar = np.float32([*s.get("alphas_cumprod", ()), s.get("final_alpha_cumprod", 1)])

    def run(self, name, *inputs):
        """The outputs of a graph, in order."""
        import onnxruntime
        graph, options = self.rules["graphs"][name], onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena = False                           # it would keep the most it ever held
        if name not in self.sessions:
            self.sessions[name] = onnxruntime.InferenceSession(
                self.folder / graph["file"], options, ["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"])               # it holds weights twice
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

    def walk(self, steps):
        """The timesteps to visit, from high to low, each with the one that its step leads to."""
        s = self.rules["schedule"]
        if s["sampler"] == "euler":                     # T sigma, sigma from 1 to 0
            even = np.linspace(1, 0, steps + 1, dtype=np.float32)
            times = s["T"] * (s["shift"] * even / (1 + (s["shift"] - 1) * even))
            return list(zip(times, times[1:]))
        T = len(s["alphas_cumprod"])
        if s["sampler"] == "lcm":                       # some of those that the distillation knew
            known = [i * (T // s["known"]) - 1 for i in range(s["known"], 0, -1)]
            chosen = [known[int(i * (len(known) / steps))] for i in range(steps)]
            return list(zip(chosen, [*chosen[1:], -1]))
        if s["spacing"] == "linspace":
            chosen = [round(i * (T - 1) / max(steps - 1, 1)) for i in range(steps)][::-1]
        elif s["spacing"] == "leading":
            chosen = [i * (T // steps) + s["offset"] for i in range(steps)][::-1]
        else:
            chosen = [round(T - i * (T - (T - T / steps))) - 1 for i in range(steps)]
        return [(t, max(t - T // steps, -1)) for t in chosen]

    def step(self, output, x, t, below, noise):
        """x_t [B, L, h, w], the UNet's output, and noise where the sampler takes it -> x at `below`."""
        s, one = self.rules["schedule"], np.float32(1)
        if s["sampler"] == "euler":
            return x + np.float32((below - t) / s["T"]) * output
        now, then = self.alpha_bar[t], self.alpha_bar[below]
        a, sigma = np.sqrt(now), np.sqrt(one - now)
        if s["prediction_type"] == "v_prediction":
            x0, eps = a * x - sigma * output, a * output + sigma * x
        elif s["prediction_type"] == "sample":
            x0, eps = output, (x - a * output) / sigma
        else:
            x0, eps = (x - sigma * output) / a, output
        if s["clip"]:
            x0 = np.clip(x0, -np.float32(s["clip"]), np.float32(s["clip"]))
        if s["sampler"] == "lcm":                       # 0.5: the data's deviation
            scaled = t * s["timestep_scaling"]
            x0 = np.float32(scaled / (scaled**2 + 0.25)**0.5) * x0 + np.float32(0.25 / (scaled**2 + 0.25)) * x
            eps = noise
        elif s["eps_from_x0"]:
            eps = (x - a * x0) / sigma
        return np.sqrt(then) * x0 + np.sqrt(one - then) * eps

    def predict(self, x, t, conditions, guidance):
        """The UNet's output for x [B, L, h, w], without prompt and with it, mixed; guidance 1: with it."""
        if guidance == 1:
            return self.run("unet", x, np.full(len(x), t), *(c[len(x):] for c in conditions))[0]
        twice = np.concatenate([x, x])
        free, guided = np.split(self.run("unet", twice, np.full(len(twice), t), *conditions)[0], 2)
        return free + np.float32(guidance) * (guided - free)

    def noise(self, count, seed, height, width, steps):
        """[N, count, L, h, w]: N = steps for LCM, else 1. Picture i of a seed is the same in any batch."""
        f, L = self.rules["latent"]["factor"], self.rules["latent"]["channels"]
        shape = (steps if self.rules["schedule"]["sampler"] == "lcm" else 1, L, height // f, width // f)
        generators = [np.random.default_rng([seed, i]) for i in range(count)]
        return np.stack([g.standard_normal(shape, np.float32) for g in generators], axis=1)

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
        """Prompts and noise [N, B, L, h, w] -> pictures [B, C, H, W] in -1..1."""
        x, f = noise[0], self.rules["latent"]["factor"]
        conditions = self.conditions(prompts, x.shape[2] * f, x.shape[3] * f)
        self.sessions.pop("text_encoder")                               # its memory is needed now
        guidance = guidance if self.rules["guidance"]["free"] else 1   # what is distilled keeps to its own
        for i, (t, below) in enumerate(self.walk(steps), start=1):
            x = self.step(self.predict(x, t, conditions, guidance), x, t, below, noise[i % len(noise)])
            progress(i)
        self.sessions.pop("unet")                                       # as above: the VAE takes as much
        return self.decode(x)


def png(picture):
    """[C, H, W] in -1..1 -> the bytes of a PNG file, C = 1 grey or 3 colours."""
    levels = np.round((picture + 1) * 127.5).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in levels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", *levels.shape[1::-1], 8, 0 if levels.shape[2] == 1 else 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def check(p):
    """Every stage on its golden input beside its golden output: True if all agree."""
    golden = {file.stem: np.load(file) for file in (p.folder / "golden").glob("*.npy")}
    rules, noise, good = p.rules["golden"], golden["noise"], True
    found = {f"tokens_{i}": ids for i, ids in enumerate(p.tokens(["", rules["prompt"]]))}
    for name, graph in p.rules["graphs"].items():
        outputs = p.run(name, *(golden[f"{name}.{key}"] for key in graph["inputs"]))
        found |= {f"{name}.{key}": value for key, value in zip(graph["outputs"], outputs)}
    found["step"] = p.step(golden["guided"], noise[0], *p.walk(rules["steps"])[0], noise[1 % len(noise)])
    found["picture"] = p.draw([rules["prompt"]], noise, rules["steps"], rules["guidance"])
    for name, value in found.items():
        error, grey = np.abs(value - golden[name]).max(), name == "picture"
        error *= 127.5 if grey else 1 / max(np.abs(golden[name]).max(), 1e-12)
        fits = error <= (2 if grey else 0 if value.dtype == np.int64 else rules["tolerance"])
        print(f"{name:<22} {error:.2g} {'grey levels' if grey else 'relative'}{'' if fits else '  TOO FAR'}")
        good = good and fits
    return bool(good)


def main():
    parser = argparse.ArgumentParser(description="A picture from a prompt, by the graphs beside this file.")
    parser.add_argument("--prompt", default="", help="what to draw")
    parser.add_argument("--out", default="picture.png", help="a PNG, written over (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="default: pipeline.json's")
    parser.add_argument("--guidance", type=float, help="default: pipeline.json's")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--size", help="HxW in pixels, if the graphs take any (default: pipeline.json's)")
    parser.add_argument("--check", action="store_true", help="compare every stage with its golden vector")
    a, p, start = parser.parse_args(), Pipeline(), time.perf_counter()
    if a.check:
        return not check(p)
    height, width = map(int, a.size.split("x")) if a.size else p.rules["size"]
    steps = min(a.steps or p.rules["defaults"]["steps"], p.rules["schedule"]["most_steps"])
    guidance = p.rules["defaults"]["guidance"] if a.guidance is None else a.guidance
    picture = p.draw([a.prompt], p.noise(1, a.seed, height, width, steps), steps, guidance,
                     lambda done: print(f"step {done}/{steps}", file=sys.stderr))
    Path(a.out).write_bytes(png(picture[0]))
    print(f"{a.out}: {picture.shape[3]} x {picture.shape[2]}, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
