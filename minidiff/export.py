"""`python -m minidiff.export --model RUN --out DIR`: a pipeline that runs without PyTorch, and its proof.

Read after pipeline.py and text_to_image.py; miniclip/graphs.py traces and writes.
Mirrors: nothing upstream; DIR holds the graphs, the tokenizer, pipeline.json, golden vectors of every stage,
runner.py (embed/runner.py), which needs numpy and onnxruntime alone, and a page for browsers.
Shapes: B batch, L latent channels, h w their size, C H W pictures, S text tokens, D text width.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from miniclip.command import run
from miniclip.files import write_json
from miniclip.graphs import (
    FORMATS,
    OF_TORCH,
    OPSET,
    Graph,
    Part,
    Progress,
    check_format,
    int8_report,
    new_folder,
    outputs_of,
    save_golden,
    token_rules,
    with_int8,
    write_beside,
    write_graphs,
)
from minidiff.objective import Walk, objective_of
from minidiff.pipeline import StableDiffusionPipeline
from minidiff.samplers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler
from minidiff.schedule import Sampler
from minidiff.text_to_image import TextToImage, model_of
from minidiff.unet import UNet2DConditionModel

EMBED = Path(__file__).parent / "embed"
GOLDEN_STEPS = 4
TOLERANCE = 1e-5        # relative, of each stage in float32
MODULES = ("text_encoder", "text_encoder_2", "unet", "vae", "upscaler")
UNET_AXES = {"x": {0: "batch", 2: "height", 3: "width"}, "t": {0: "batch"}, "text": {0: "batch", 1: "tokens"},
             "pooled": {0: "batch"}, "sizes": {0: "batch"}}


class Plan(NamedTuple):
    """A pipeline as it will be written. rules: of pipeline.json. walk(steps, generator) and draw(prompt,
    noise, generator, steps, guidance), which returns [1, C, H, W] in -1..1, are PyTorch's; their generator
    draws what LCM adds between the steps."""

    graphs: dict[str, Graph]
    tokenizers: list[Any]
    rules: dict[str, Any]
    prompt: str
    walk: Callable[[int, torch.Generator], Walk]
    draw: Callable[[str, Tensor, torch.Generator, int, float], Tensor]


# ---------------------------------------------------------------------------------------------------- graphs


def text_of(encoder: nn.Module, ids: Tensor) -> Tensor:
    """[B, S] -> what the UNet attends to [B, S, D]: the last layer, normalised."""
    return encoder(ids).last_hidden_state


def texts_of(encoders: nn.ModuleList, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL: the last layers but one of both encoders side by side [B, S, D], and the pooled text [B, P]."""
    first, second = (encoder(i, output_hidden_states=True)
                     for encoder, i in zip(encoders, (ids, ids_2), strict=True))
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def prediction_of(unet: nn.Module, x: Tensor, t: Tensor, text: Tensor, *added: Tensor) -> Tensor:
    """[B, L, h, w] as x; added: SDXL's pooled text [B, P] and sizes [B, 6]."""
    named = dict(zip(("text_embeds", "time_ids"), added, strict=True)) if added else None
    return unet(x, t, text, added_cond_kwargs=named).sample


def text_graph(tokenizers: list[Any], encoders: list[nn.Module]) -> Graph:
    """The text encoder, or both of SDXL: ids -> text, pooled."""
    ids = {f"ids{'_2' * i}": torch.randint(tokenizer.vocab_size, (2, tokenizer.model_max_length))
           for i, tokenizer in enumerate(tokenizers)}
    axes = {name: {0: "batch", 1: "tokens"} for name in ids}
    most = {"tokens": min(encoder.config.max_position_embeddings for encoder in encoders)}
    if len(encoders) == 1:
        return Graph(Part(encoders[0], text_of), ids, axes, ["text"], most)
    return Graph(Part(nn.ModuleList(encoders), texts_of), ids, axes, ["text", "pooled"], most)


def unet_graph(unet: UNet2DConditionModel, tokens: int, latents: tuple[int, int, int], fixed: bool,
               times: torch.dtype = torch.int64) -> Graph:
    """x [B, L, h, w], t [B], text [B, S, D] -> the prediction [B, L, h, w]."""
    c = unet.config
    inputs = {"x": torch.randn(2, *latents), "t": torch.tensor([999, 1], dtype=times),
              "text": torch.randn(2, tokens, c.encoder_hid_dim or c.per_level("cross_attention_dim")[0])}
    if c.addition_embed_type == "text_time":
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        inputs |= {"pooled": torch.randn(2, pooled), "sizes": torch.rand(2, 6) * 512}
    return Graph(Part(unet, prediction_of), inputs, axes_of(UNET_AXES, fixed), ["prediction"])


def picture_graph(part: Part, channels: int, height: int, width: int, fixed: bool,
                  outputs: list[str], multiple: int = 1, least: int = 1) -> Graph:
    """Latents or pictures [B, channels, height, width], multiples of a number -> pictures or latents."""
    inputs = {"x": torch.rand(2, channels, height, width) * 2 - 1}
    return Graph(part, inputs, axes_of({"x": UNET_AXES["x"]}, fixed), outputs,
                 least={"height": least, "width": least}, multiple={"height": multiple, "width": multiple})


def axes_of(axes: dict[str, dict[int, str]], fixed: bool) -> dict[str, dict[int, str]]:
    """Without height and width, if they are fixed."""
    return {key: {axis: name for axis, name in named.items() if not fixed or name in ("batch", "tokens")}
            for key, named in axes.items()}


# ------------------------------------------------------------------------------------------------- pipelines


def plan_run(model: TextToImage, size: tuple[int, int] | None) -> Plan:
    """A run of train_diffusion. size: height and width in pixels, if they are to be fixed."""
    f, channels = model.format.fold, model.latent_shape[0]
    height, width = fitting(size, model.drawn_size // (1 if model.upscaler is None else 2), f)
    if model.upscaler is not None and (height % 2 or width % 2):
        raise ValueError(f"--size {height}x{width}: the upscaler takes even sizes")
    tokens, objective = model.tokenizer.model_max_length, objective_of(model.scheduler)
    flows = isinstance(model.scheduler, FlowMatchEulerDiscreteScheduler)
    graphs = {"text_encoder": text_graph([model.tokenizer], [model.text_encoder]),
              "unet": unet_graph(model.unet, tokens, (channels, height // f, width // f), size is not None,
                                 torch.float32 if flows else torch.int64)}
    if model.upscaler is not None:
        part = Part(model.upscaler, lambda upscaler, x: upscaler(x))
        graphs["upscaler"] = picture_graph(part, model.format.channels, height, width, size is not None,
                                           ["picture"], multiple=2)
    rules = {"size": [height, width], "latent": {"channels": channels, "factor": f, "fold": f},
             "schedule": schedule_rules(model.scheduler, eps_from_x0=True),
             "guidance": {"no_prompt": "text", "free": objective.guided},
             "defaults": dict(zip(("steps", "guidance"), (30, 1.5) if objective.guided else (4, 1.0))),
             "captions": model.captions}

    def draw(prompt: str, noise: Tensor, generator: torch.Generator, steps: int, guidance: float) -> Tensor:
        return model.denoise(noise, [prompt], steps, guidance, generator)

    walk = partial(objective.walk, model.scheduler)
    return Plan(graphs, [model.tokenizer], rules, model.captions[0], walk, draw)


def plan_pipeline(pipe: StableDiffusionPipeline, size: tuple[int, int] | None) -> Plan:
    """Stable Diffusion 1, 2 or XL. Its own sampler may be another: what is exported is DDIM."""
    c, vae = pipe.unet.config, pipe.vae.config
    if c.in_channels != vae.latent_channels or c.time_cond_proj_dim is not None:
        raise ValueError("--model: inpainting and LCM models cannot be exported as a pipeline")
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise ValueError("--model: a pipeline without text encoder or tokenizer cannot be exported")
    usual = c.sample_size if isinstance(c.sample_size, tuple) else (c.sample_size or 64,) * 2
    height, width = fitting(size, usual[0] * pipe.factor, pipe.factor)
    h, w, L, fixed = height // pipe.factor, width // pipe.factor, vae.latent_channels, size is not None
    tokenizers = [t for t in (pipe.tokenizer, pipe.tokenizer_2) if t is not None]
    encoders = [e for e in (pipe.text_encoder, pipe.text_encoder_2) if e is not None]
    graphs = {
        "text_encoder": text_graph(tokenizers, encoders),
        "unet": unet_graph(pipe.unet, pipe.tokenizer.model_max_length, (L, h, w), fixed),
        "vae_decoder": picture_graph(Part(pipe.vae, lambda vae, z: vae.decode(z).sample), L, h, w, fixed,
                                     ["picture"]),
        "vae_encoder": picture_graph(Part(pipe.vae, encoded), vae.in_channels, height, width, fixed,
                                     ["latent_mean", "latent_deviation"], pipe.factor, 2 * pipe.factor)}
    sampler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    mean, std = (torch.as_tensor(v).flatten().tolist() for v in pipe.latent_statistics(torch.zeros(1)))
    zeros = pipe.is_xl and pipe.force_zeros_for_empty_prompt
    rules = {"size": [height, width],
             "latent": {"channels": L, "factor": pipe.factor, "scaling": vae.scaling_factor, "mean": mean,
                        "std": std},
             "schedule": schedule_rules(sampler, eps_from_x0=False),
             "guidance": {"no_prompt": "zeros" if zeros else "text", "free": True},
             "defaults": {"steps": 30, "guidance": 5.0 if pipe.is_xl else 7.5}, "captions": []}

    def walk(steps: int, generator: torch.Generator) -> Walk:
        sampler.set_timesteps(steps)
        return sampler.timesteps, sampler.step

    def draw(prompt: str, noise: Tensor, generator: torch.Generator, steps: int, guidance: float) -> Tensor:
        pipe.scheduler = sampler
        H, W = noise.shape[2] * pipe.factor, noise.shape[3] * pipe.factor
        z = pipe(prompt, height=H, width=W, num_inference_steps=steps, guidance_scale=guidance,
                 latents=noise, output_type="latent", progress=False).images
        return pipe.decode_latents(z).clamp(-1, 1)

    return Plan(graphs, tokenizers, rules, "a lake among mountains", walk, draw)


def encoded(vae: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """[B, C, H, W] in -1..1 -> mean and deviation of the latents, not scaled, [B, L, h, w]."""
    latents = vae.encode(pictures).latent_dist
    return latents.mean, latents.std


def fitting(size: tuple[int, int] | None, usual: int, factor: int) -> tuple[int, int]:
    """Height and width in pixels. Raises ValueError for sizes that are no multiples."""
    height, width = size or (usual, usual)
    if height < factor or width < factor or height % factor or width % factor:
        raise ValueError(f"--size {height}x{width}: this model takes multiples of {factor}")
    return height, width


def schedule_rules(scheduler: Sampler, eps_from_x0: bool) -> dict[str, Any]:
    """What flow's Euler, LCM and, for all others, DDIM need: the table and how it is walked."""
    c = scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        if vars(c) != vars(type(c)(num_train_timesteps=len(scheduler), shift=c.shift)):
            raise ValueError("--model: a flow whose scheduler's config has more than its own "
                             "num_train_timesteps and shift is not exported")
        return {"sampler": "euler", "T": len(scheduler), "shift": c.shift, "most_steps": len(scheduler)}
    if c.thresholding:
        raise ValueError("--model: thresholding in the scheduler's config is not exported")
    rules = {"alphas_cumprod": scheduler.alphas_cumprod.tolist(), "prediction_type": c.prediction_type,
             "clip": c.clip_sample_range if c.clip_sample else None}
    if isinstance(scheduler, LCMScheduler):
        return {"sampler": "lcm", **rules, "final_alpha_cumprod": 1.0, "known": c.original_inference_steps,
                "timestep_scaling": c.timestep_scaling, "most_steps": c.original_inference_steps}
    sampler = DDIMScheduler.from_config(c)
    return {"sampler": "ddim", **rules, "final_alpha_cumprod": sampler.final_alpha_cumprod.item(),
            "spacing": sampler.config.timestep_spacing, "offset": sampler.config.steps_offset,
            "eps_from_x0": eps_from_x0, "most_steps": len(sampler)}


# -------------------------------------------------------------------------------------------- golden vectors


def golden_noise(rules: dict[str, Any], count: int) -> tuple[Tensor, torch.Generator]:
    """[count, 1, L, h, w], and the generator that draws what follows."""
    f, g = rules["latent"]["factor"], torch.Generator().manual_seed(0)
    shape = 1, rules["latent"]["channels"], *(n // f for n in rules["size"])
    return torch.stack([torch.randn(shape, generator=g) for _ in range(count)]), g


def golden_picture(plan: Plan) -> Tensor:
    """What PyTorch draws from the golden prompt and noise, [1, C, H, W] in -1..1."""
    (noise,), g = golden_noise(plan.rules, 1)
    return plan.draw(plan.prompt, noise, g, golden_steps(plan), plan.rules["defaults"]["guidance"])


def golden_steps(plan: Plan) -> int:
    """Few, so that it takes little time."""
    return min(GOLDEN_STEPS, plan.rules["schedule"]["most_steps"])


@torch.no_grad()
def golden_vectors(plan: Plan) -> dict[str, Tensor]:
    """Inputs and outputs of every stage, by the names under which runner.py looks for them."""
    r, guidance = plan.rules, plan.rules["defaults"]["guidance"]
    noises = golden_noise(r, golden_steps(plan) if r["schedule"]["sampler"] == "lcm" else 1)[0]
    (noise,), g = golden_noise(r, 1)
    ids = [t(["", plan.prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids
           for t in plan.tokenizers]
    (t, *_), step = plan.walk(golden_steps(plan), g)
    texts = outputs_of(plan.graphs["text_encoder"], ids)
    sizes = [torch.tensor([[*r["size"], 0, 0, *r["size"]]] * 2).float()] if len(texts) > 1 else []
    inputs = {"text_encoder": ids, "unet": [torch.cat([noise, noise]), t.repeat(2), *texts, *sizes],
              "vae_decoder": [noise]}
    vectors = {f"tokens_{i}": rows for i, rows in enumerate(ids)} | {"noise": noises}
    for name, graph in plan.graphs.items():
        shape = (1, *graph.inputs["x"].shape[1:]) if "x" in graph.inputs else ()
        seeded = torch.Generator().manual_seed(1)
        given = inputs.get(name) or [torch.rand(shape, generator=seeded) * 2 - 1]
        found = outputs_of(graph, given)
        vectors |= {f"{name}.{key}": v for key, v in zip(graph.inputs, given, strict=True)}
        vectors |= {f"{name}.{key}": v for key, v in zip(graph.outputs, found, strict=True)}
    free, guided = vectors["unet.prediction"].chunk(2)
    vectors["guided"] = free + guidance * (guided - free)
    vectors["step"] = step(vectors["guided"], t, noise).prev_sample
    return {**vectors, "picture": golden_picture(plan)}


# --------------------------------------------------------------------------------------------------- command


def load(path: str, tokenizer: str | None) -> Any:
    """The model of --model: a TextToImage or a StableDiffusionPipeline, in float32."""
    if model_of(path):
        return TextToImage.load(path)
    if any((Path(path) / inside / "strokes.json").is_file() for inside in ("", "model")):
        raise ValueError(f"{path}: a run that writes strokes; these cannot be exported")
    if not Path(path).is_file():
        return StableDiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32)
    if tokenizer is None:
        raise ValueError(f"{path}: a single file holds no tokenizer, so --tokenizer is needed")
    return StableDiffusionPipeline.from_single_file(path, tokenizer, torch.float32)


def plan_of(model: Any, size: tuple[int, int] | None) -> Plan:
    """The plan of either kind of model."""
    return plan_run(model, size) if isinstance(model, TextToImage) else plan_pipeline(model, size)


def in_int8(model: Any) -> dict[str, dict[str, str]]:
    """Puts int8 weights into the parts of a model; part -> what stayed float, and why."""
    kept = {}
    for name in MODULES:
        if isinstance(part := getattr(model, name, None), nn.Module):
            converted, kept[name] = with_int8(part)
            setattr(model, name, converted)
    return kept


def export(model: Any, format: str, size: tuple[int, int] | None, folder: Path, say: Progress) -> None:
    """Fills a folder."""
    plan, report = plan_of(model, size), {}
    if format == "int8":
        small = copy.deepcopy(model)
        kept = in_int8(small)
        exact, plan = plan, plan_of(small, size)
    vectors = golden_vectors(plan)
    if format == "int8":
        grey = (golden_picture(exact) - vectors["picture"]).abs()
        report = {"int8": {**int8_report(exact.graphs, plan.graphs, vectors, kept),
                           "picture_grey_levels": {"mean": grey.mean().item() * 127.5,
                                                   "most": grey.max().item() * 127.5}}}
    say("golden vectors")
    graphs = write_graphs(plan.graphs, format, folder, vectors, say)
    tokenizers = [token_rules(t, folder / f"tokenizer{'_2' * i}", fill=True)
                  for i, t in enumerate(plan.tokenizers)]
    golden = {"prompt": plan.prompt, "steps": golden_steps(plan), "tolerance": TOLERANCE,
              "guidance": plan.rules["defaults"]["guidance"]}
    write_json(folder / "pipeline.json", {
        "kind": "text to image", "format": format, **({} if format in OF_TORCH else {"opset": OPSET}),
        "any_size": size is None, "graphs": graphs, "tokenizers": tokenizers, **plan.rules,
        "golden": golden, **report})
    save_golden(folder, vectors)
    write_beside(folder, format, EMBED)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line; a mistake in it exits with status 2."""
    parser = argparse.ArgumentParser("python -m minidiff.export", description="A pipeline that runs without "
                                     "PyTorch: graphs, tokenizer, settings, golden vectors, a runner.")
    parser.add_argument("--model", required=True, metavar="PATH",
                        help="a run of train_diffusion, a Stable Diffusion folder or single file")
    parser.add_argument("--tokenizer", metavar="PATH", help="of a single file, which holds none")
    parser.add_argument("--format", default="onnx", help=f"{', '.join(FORMATS)} (default: %(default)s)")
    parser.add_argument("--size", default="dynamic", metavar="HxW",
                        help="pixels, fixed in the graphs, or dynamic: any (default: %(default)s)")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that is not there, or empty")
    return parser.parse_args(argv)


def parse_size(text: str) -> tuple[int, int] | None:
    """HxW in pixels; None for dynamic."""
    if text == "dynamic":
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size {text}: not HxW in pixels, such as 512x768, nor dynamic")
    return int(height), int(width)


def write(a: argparse.Namespace) -> None:
    """Checks, loads, exports."""
    check_format(a.format)
    size, say = parse_size(a.size), Progress()
    with new_folder(a.out) as folder:
        model = load(a.model, a.tokenizer)
        say(f"{a.model} is loaded")
        export(model, a.format, size, folder, say)
    say(f"done: {a.out}/README.md says what is there")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status, 2 after a mistake of the user."""
    a = arguments(argv)
    return run("export", lambda: write(a), (ValueError, OSError, RuntimeError))


if __name__ == "__main__":
    sys.exit(main())
