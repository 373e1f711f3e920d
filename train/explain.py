"""How a run writes one prompt, as one page: python -m train.sample --prompt "春 楷書" --explain FILE.html

Read after minidiff/text_to_image.py; sample.py calls `explain`, explain.html is the page. The model is not
changed for it. Forward hooks look on while `model.sample` draws, and others take a part out for as long as a
`with` lasts; so each picture here is one of train.sample's.
Papers: Hertz 2022, "Prompt-to-Prompt" (maps of cross-attention); Ho 2020, eq. 4 (x_t, x0, eps); Ho 2022
(guidance). Mirrors: nothing upstream.
Shapes: B batch, C image channels, S image size, L h w a folded image, T = H*W positions, N text tokens,
nh heads.
"""

from __future__ import annotations

import base64
import html
import inspect
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.transforms.functional import to_pil_image

from miniclip.files import atomic_write, script_json
from minidiff import schedule
from minidiff.attention import Attention, BasicTransformerBlock, Transformer2DModel
from minidiff.objective import objective_of
from minidiff.resnet import ResnetBlock2D
from minidiff.text_to_image import TextToImage
from minidiff.unet import DownBlock, MidBlock, UNet2DConditionModel, UpBlock

from .errors import UserError
from .report import data_uri
from .run.folder import make_folder
from .run.log import Progress

TEMPLATE = Path(__file__).with_name("explain.html")
GUIDANCES = (0.0, 1.0, 1.5, 3.0, 5.0)   # beside the one that was asked for
FRAMES = 40                             # steps shown, at most, of those that were walked
TOKENS = 16                             # tokens of the prompt shown, at most; the others are one
MAP_SIDE = 16                           # of an attention map, at most
CURVE = 100                             # points of the schedule's curves
STRIP_BYTES, DRAWN_BYTES = 1_600_000, 800_000   # of all steps' pictures, of all others, before compression

Hook = Callable[..., Any]
Handles = list[RemovableHandle]


def explain(model: TextToImage, prompt: str, path: Path, seed: int, steps: int, guidance: float) -> None:
    """Writes the page; beside an export (pipeline.json) it offers to draw live, in the page that lies there.

    Raises UserError for a model without a UNet and for a path that cannot be a file.
    """
    if not isinstance(model.unet, UNet2DConditionModel):
        raise UserError("--explain: this run writes strokes by a transformer; a run of pictures has the UNet "
                        "that is explained")
    if path.is_dir():
        raise UserError(f"--explain {path}: is a folder; give the name of a file")
    make_folder(path.parent)
    data = {**data_of(model, prompt, seed, steps, guidance),
            "live": (path.parent / "pipeline.json").is_file()}
    values = {"title": html.escape(f"How {prompt or 'a picture'} is written"), "data": script_json(data)}
    page = re.sub(r"\{\{(title|data)\}\}", lambda found: values[found[1]],
                  TEMPLATE.read_text(encoding="utf-8"))
    with atomic_write(path) as file:
        file.write(page.encode("utf-8"))


def data_of(model: TextToImage, prompt: str, seed: int, steps: int, guidance: float) -> dict[str, Any]:
    """All that the page shows: pictures as data URIs, numbers, names, code."""
    off, guided = switches(model.unet), objective_of(model.scheduler).guided
    strengths = sorted({*GUIDANCES, guidance}) if guided else []
    progress = Progress(1 + len(strengths) + len(off), unit="picture")

    def draw(what: str, strength: float = guidance) -> Tensor:
        picture = model.sample([prompt], seed, steps, strength)
        done.append(what)
        progress.show(len(done), what)
        return picture[0]

    done: list[str] = []
    with recorded(model.unet) as walk:
        normal = draw("every step")
    side = side_within(DRAWN_BYTES, 1 + len(strengths) + len(off), normal)
    by_strength = [{"w": w, **drawn(draw(f"guidance {w:g}", w), normal, side)} for w in strengths]
    by_switch = []
    for switch in off:
        with switched(switch):
            by_switch.append({"kind": switch.kind, "at": switch.at,
                              **drawn(draw(f"without {switch.kind} {switch.at}"), normal, side)})
    progress.close()
    tokens = tokens_of(model, prompt)
    return {"prompt": prompt, "seed": seed, "guidance": guidance if guided else None, "steps": len(walk),
            "sampler": type(sampler_of(model)).__name__, "predicts": model.scheduler.prediction_kind,
            "T": len(model.scheduler), "size": model.drawn_size, "picture": to_uri(normal, side),
            "frames": frames_of(model, walk, guidance, len(tokens)), "curve": curve_of(model),
            "tokens": tokens, "places": list(walk[0].maps), "guidances": by_strength, "switches": by_switch,
            "levels": levels_of(model.unet, model.latent_shape[1]), "code": code_of(model)}


def sampler_of(model: TextToImage) -> schedule.Sampler:
    """That which walks from noise to picture."""
    _, step = objective_of(model.scheduler).walk(model.scheduler, 1, None)
    return getattr(step, "func", step).__self__


# ------------------------------------------------------------------------------------- looking on as it draws


class Step(NamedTuple):
    """One call of the UNet. Of guidance there are two rows, the free prediction and that with the prompt."""

    t: float
    x_t: Tensor                 # [1, L, h, w]
    output: Tensor              # [1 or 2, L, h, w]
    maps: dict[str, Tensor]     # of each block that attends: mean over its heads and layers [T, N]


def attention_weights(attention: Attention, x: Tensor, context: Tensor | None = None,
                      mask: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt(hd) + mask) of a module's own projections: what the fused kernel keeps to itself.

    x [B, T, C], context [B, N, D] -> [B, nh, T, N]; each row sums to 1.
    """
    q = attention.split(attention.to_q(x))                                  # [B, nh, T, hd]
    k = attention.split(attention.to_k(x if context is None else context))  # [B, nh, N, hd]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return torch.softmax(scores if mask is None else scores + mask[:, None], dim=-1)


@contextmanager
def recorded(unet: UNet2DConditionModel) -> Iterator[list[Step]]:
    """Fills the list with each call of the UNet, for the length of the block. Of the first picture only."""
    steps: list[Step] = []
    seen: dict[str, list[Tensor]] = {}

    def look(place: str, attention: Attention, args: tuple) -> None:
        weights = attention_weights(attention, *args)[-1].mean(0)           # of the prompt, [T, N]
        seen.setdefault(place, []).append(weights.cpu())

    def note(_: nn.Module, args: tuple, output: Any) -> None:
        maps = {place: torch.stack(found).mean(0) for place, found in seen.items()}
        steps.append(Step(float(args[1]), args[0][-1:].cpu(), output.sample.cpu(), maps))
        seen.clear()

    handles = [block.attn2.register_forward_pre_hook(partial(look, place))
               for place, block in transformers_of(unet)]
    handles.append(unet.register_forward_hook(note))
    try:
        yield steps
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """down 0, down 1, ..., mid, up 0, ... in the order in which they run."""
    mid = {} if unet.config.mid_block_type is None else {"mid": unet.mid_block}
    return {**{f"down {i}": block for i, block in enumerate(unet.down_blocks)}, **mid,
            **{f"up {i}": block for i, block in enumerate(unet.up_blocks)}}


def transformers_of(unet: UNet2DConditionModel) -> list[tuple[str, BasicTransformerBlock]]:
    """Each transformer block with the block of the U that holds it."""
    return [(place, module) for place, block in blocks_of(unet).items() for module in block.modules()
            if isinstance(module, BasicTransformerBlock)]


# ------------------------------------------------------------------------------------------ taking a part out


class Switch(NamedTuple):
    """A part that can be off: `turn` registers the hooks that do it."""

    kind: str                   # skip, level, cross-attention or self-attention
    at: str                     # which of them: a place in the U, or all
    turn: Callable[[], Handles]


@contextmanager
def switched(switch: Switch) -> Iterator[None]:
    """The part is out for the length of the block; afterwards the model is as it was."""
    handles = switch.turn()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def switches(unet: UNet2DConditionModel) -> list[Switch]:
    """Each skip, each block, and attention: everywhere, and across in each block that attends."""
    found = [Switch("skip", place, partial(without_skip, unet, i))
             for i, place in enumerate(skips_of(unet))]
    found += [Switch("level", place, partial(without_level, block))
              for place, block in blocks_of(unet).items()]
    across: dict[str, list[Attention]] = {}
    for place, block in transformers_of(unet):
        across.setdefault(place, []).append(block.attn2)
    if across:
        found.append(Switch("cross-attention", "all", partial(silenced, sum(across.values(), []))))
        found += [Switch("cross-attention", place, partial(silenced, muted))
                  for place, muted in across.items() if len(across) > 1]
        own = [block.attn1 for _, block in transformers_of(unet)]
        found.append(Switch("self-attention", "all", partial(silenced, own)))
    return found


def skips_of(unet: UNet2DConditionModel) -> list[str]:
    """Where each map of the way down was made that the way up concatenates, in the order of unet.forward."""
    places = ["conv_in"]
    for i, block in enumerate(unet.down_blocks):
        places += [f"down {i}, resnet {j}" for j in range(len(block.resnets))]
        places += [f"down {i}, halved"] * len(block.downsamplers)
    return places


def without_skip(unet: UNet2DConditionModel, index: int) -> Handles:
    """Zeros in place of one skip. The first block of the way up is given the list of all of them."""
    def zero(_: nn.Module, args: tuple) -> None:
        skips = args[1]
        skips[index] = torch.zeros_like(skips[index])

    return [unet.up_blocks[0].register_forward_pre_hook(zero)]


def without_level(block: nn.Module) -> Handles:
    """Resnets and transformers of a block that add nothing: what is left are their own shortcuts."""
    def shortcut(resnet: ResnetBlock2D, args: tuple, _: Tensor) -> Tensor:
        return resnet.conv_shortcut(args[0]) / resnet.output_scale_factor

    def same(_: nn.Module, args: tuple, __: Tensor) -> Tensor:
        return args[0]

    return [module.register_forward_hook(shortcut if isinstance(module, ResnetBlock2D) else same)
            for module in block.modules() if isinstance(module, (ResnetBlock2D, Transformer2DModel))]


def silenced(attentions: list[Attention]) -> Handles:
    """Attention that answers 0, whatever it is asked."""
    return [attention.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
            for attention in attentions]


# -------------------------------------------------------------------------------------------- what is written


def frames_of(model: TextToImage, walk: list[Step], guidance: float, tokens: int) -> list[dict[str, Any]]:
    """Each step for the page, or FRAMES of them, evenly taken: pictures, norms, attention."""
    count = min(len(walk), FRAMES)
    chosen = [round(i * (len(walk) - 1) / max(count - 1, 1)) for i in range(count)]
    side = side_within(STRIP_BYTES, 3 * count, model.decode(walk[0].x_t)[0])
    return [{"step": i + 1, **frame_of(model, walk[i], guidance, side),
             "maps": [map_of(weights, tokens) for weights in walk[i].maps.values()]} for i in chosen]


@torch.no_grad()
def frame_of(model: TextToImage, step: Step, guidance: float, side: int) -> dict[str, Any]:
    """What a step's prediction stands for. Norms are divided by sqrt(n), so that noise has 1."""
    scheduler, x_t = model.scheduler, step.x_t
    guided, difference = step.output[-1:], None
    if len(step.output) == 2:
        free = step.output[:1]
        difference, guided = rms(guided - free), free + guidance * (guided - free)
    t = step.t if scheduler.prediction_kind == "flow_prediction" else int(step.t)
    alpha, sigma = scheduler.signal_and_noise(t)
    x0 = scheduler.predict_x0(guided, x_t, t)
    eps = schedule.to_eps(scheduler.prediction_kind, guided, x_t, alpha, sigma)
    pictures = {"x": x_t, "x0": x0, "eps": eps / 3}         # most noise lies within 3
    return {"t": step.t, "alpha": alpha, "sigma": sigma,
            "norms": {"x": rms(x_t), "x0": rms(x0), "eps": rms(eps), "difference": difference},
            **{name: to_uri(model.decode(values)[0], side) for name, values in pictures.items()}}


def rms(x: Tensor) -> float:
    """The norm over sqrt(n)."""
    return x.square().mean().sqrt().item()


def map_of(weights: Tensor, tokens: int) -> dict[str, Any]:
    """[T, N] -> for each of so many tokens how much it is looked at: bytes [tokens, side, side], 255 being
    `most` of that token, and the mean. The last one holds all tokens from there on, such as padding."""
    side = math.isqrt(len(weights))
    maps = weights.T.unflatten(1, (side, side))                             # [N, H, W]
    maps = torch.cat([maps[:tokens - 1], maps[tokens - 1:].sum(0, keepdim=True)])
    if side > MAP_SIDE:
        maps = F.adaptive_avg_pool2d(maps, MAP_SIDE)
    most = maps.amax((1, 2), keepdim=True).clamp_min(1e-9)
    levels = (maps / most * 255).round().byte()
    return {"side": maps.shape[-1], "most": most.flatten().tolist(), "mean": maps.mean((1, 2)).tolist(),
            "bytes": base64.b64encode(levels.numpy().tobytes()).decode("ascii")}


def tokens_of(model: TextToImage, prompt: str) -> list[str]:
    """The prompt's tokens as text. After the last one there is padding, if the prompt leaves room."""
    def ids(**options: Any) -> list[int]:
        return model.tokenizer([prompt], truncation=True, **options).input_ids[0]

    own, padded = ids(), ids(padding="max_length")
    texts = [model.tokenizer.text_of([i]) for i in own]
    ends = {model.tokenizer.bos_token_id: "[begin]", model.tokenizer.eos_token_id: "[end]"}
    texts = [ends.get(i, text) for i, text in zip(own, texts, strict=True)]
    if len(padded) > len(own):
        texts.append("[padding]")
    return texts if len(texts) <= TOKENS else [*texts[:TOKENS - 1], "[others]"]


def curve_of(model: TextToImage) -> list[list[float]]:
    """Rows of timestep, alpha and sigma over the whole schedule."""
    last = len(model.scheduler) - 1
    times = sorted({round(i * last / (CURVE - 1)) for i in range(CURVE)})
    return [[t, *model.scheduler.signal_and_noise(t)] for t in times]


def levels_of(unet: UNet2DConditionModel, side: int) -> list[dict[str, Any]]:
    """Each level of the U from the top: channels, side, how deep it attends, and the skips that cross it."""
    skips, rows = skips_of(unet), []
    for up in unet.up_blocks:                               # from the deepest; takes its skips off the end
        rows.append([skips.pop() for _ in up.resnets][::-1])
    attends = {place for place, _ in transformers_of(unet)}
    last = len(unet.down_blocks) - 1
    return [{"channels": channels, "side": math.ceil(side / 2**i), "skips": rows[last - i],
             "down": f"down {i}", "up": f"up {last - i}",
             "attends": [f"down {i}" in attends, f"up {last - i}" in attends]}
            for i, channels in enumerate(unet.config.block_out_channels)]


def code_of(model: TextToImage) -> list[dict[str, str]]:
    """The functions that all this goes through: name, file and line, and their source."""
    functions = {
        "loop": TextToImage.denoise, "forward": UNet2DConditionModel.forward, "down": DownBlock.forward,
        "mid": MidBlock.forward, "up": UpBlock.forward, "resnet": ResnetBlock2D.forward,
        "transformer": BasicTransformerBlock.forward, "attention": Attention.forward,
        "to_x0": schedule.to_x0, "to_eps": schedule.to_eps, "step": type(sampler_of(model)).step}
    return [{"key": key, "name": function.__qualname__, "where": where(function),
             "source": textwrap.dedent(inspect.getsource(function))} for key, function in functions.items()]


def where(function: Any) -> str:
    """minidiff/unet.py:96"""
    line = inspect.getsourcelines(function)[1]
    return f"{function.__module__.replace('.', '/')}.py:{line}"


def drawn(picture: Tensor, normal: Tensor, side: int) -> dict[str, Any]:
    """A picture [C, S, S] for the page, and how far it lies from the normal one, in grey levels of 255."""
    return {"picture": to_uri(picture, side), "difference": (picture - normal).abs().mean().item() * 127.5}


def side_within(budget: int, count: int, like: Tensor) -> int:
    """Pixels a side of `count` pictures like one [C, S, S] that take no more bytes in all."""
    return min(like.shape[-1], math.isqrt(budget // (count * like.shape[0])))


def to_uri(picture: Tensor, side: int) -> str:
    """[C, S, S] in -1..1 (what lies beyond is cut off) -> a PNG as a data URI, at most `side` large."""
    if picture.shape[-1] > side:
        picture = F.interpolate(picture[None], size=(side, side), mode="nearest-exact")[0]
    levels = ((picture.float().nan_to_num().clamp(-1, 1) + 1) * 127.5).round().byte()
    file = io.BytesIO()
    to_pil_image(levels.cpu()).save(file, format="png", optimize=True)
    return data_uri(file.getvalue(), "png")
