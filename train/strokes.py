"""A writer of strokes: TextToImage whose "image" is a row of stroke tokens, in writing order.

Read after minidiff/text_to_image.py and data/strokes.py; train.train_diffusion trains it where --data holds
strokes. Token k is stroke k: C coefficients of a cosine transform each for x, y and the brush's width along
the stroke, and whether there is such a stroke at all. Papers: Ahmed 1974 (the transform); Vaswani 2017.
Shapes: N characters, B of them, K strokes at most, P points of a stroke, F = 3 C + 1 numbers a token, D width
of the transformer. A batch of tokens is [B, F, K, 1]: an image F channels deep, K high and 1 wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miniclip.config import CLIPTextConfig
from miniclip.files import WeightsError, is_texts, read_json, write_json
from miniclip.model import CLIPTextModel
from miniclip.tokenizer import CLIPTokenizer
from miniclip.weights import load_file, load_strict, save_file
from minidiff.attention import BasicTransformerBlock
from minidiff.embeddings import TimestepEmbedding, Timesteps
from minidiff.objective import cosine_schedule, load_scheduler
from minidiff.schedule import Sampler
from minidiff.text_to_image import VOCABULARY, ImageFormat, TextToImage

from .brush import write
from .data.strokes import JOINED, MAX_STROKES, Character, Stroke, read_character, resample
from .errors import DataError, UserError
from .run.cli import command

STROKES_FILE = "strokes.json"   # of a model folder: captions, sizes, and how coefficients are scaled
POINTS, COEFFICIENTS = 32, 10   # P and C
FEATURES = 3 * COEFFICIENTS + 1
WIDTH, LAYERS, HEADS, TEXT_WIDTH = 128, 4, 4, 64
LEAST_DEVIATION = 0.03          # of a coefficient: smaller ones are not worth learning to the last bit
SIDE = 128                      # pixels of a picture of a character
THINNEST = 0.004                # of a brush, in boxes
LONGEST = 8                     # characters of a text


# ----------------------------------------------------------------------------------------------------- tokens


class Scaling(NamedTuple):
    """How tokens are shifted and scaled, [F] each, so that each number has mean 0 and deviation 1 over the
    strokes of the data; and K."""

    mean: Tensor
    deviation: Tensor
    most: int


def cosines() -> Tensor:
    """[C, P]: the first rows of the orthonormal cosine transform of P numbers."""
    k, p = torch.arange(COEFFICIENTS)[:, None], torch.arange(POINTS) + 0.5
    rows = torch.cos(math.pi * k * p / POINTS) * (2 / POINTS) ** 0.5
    return torch.cat([rows[:1] / 2**0.5, rows[1:]])


def tokens_of(characters: list[Character]) -> tuple[Tensor, Scaling]:
    """Characters as scaled tokens [N, F, K, 1], absent strokes being 0 but for their last number, -1."""
    most = max(len(character.strokes) for character in characters)
    raw = torch.stack([_raw(character, most) for character in characters])         # [N, K, F]
    there = raw[raw[..., -1] > 0]                                                   # [strokes, F]
    mean, deviation = there.mean(0), there.std(0).clamp_min(LEAST_DEVIATION)
    mean[-1], deviation[-1] = 0.0, 1.0
    scaling = Scaling(mean, deviation, most)
    return scaled(raw, scaling), scaling


def _raw(character: Character, most: int) -> Tensor:
    """[K, F], not yet scaled."""
    rows = torch.zeros(most, FEATURES)
    rows[:, -1] = -1
    for k, stroke in enumerate(character.strokes):
        line = resample(np.column_stack([stroke.points, stroke.widths]), POINTS)    # [P, 3]
        rows[k, :-1] = (cosines() @ torch.from_numpy(line)).T.flatten()
        rows[k, -1] = 1
    return rows


def scaled(raw: Tensor, scaling: Scaling) -> Tensor:
    """[N, K, F] -> [N, F, K, 1]; what is not there stays 0."""
    tokens = (raw - scaling.mean) / scaling.deviation
    tokens[..., :-1] *= raw[..., -1:] > 0
    return tokens.transpose(1, 2)[..., None].contiguous()


def unscaled(tokens: Tensor, scaling: Scaling) -> Tensor:
    """[N, F, K, 1] -> [N, K, F]: `scaled` undone, where there is a stroke."""
    return tokens[..., 0].transpose(1, 2) * scaling.deviation.to(tokens) + scaling.mean.to(tokens)


def lines_of(tokens: Tensor, scaling: Scaling) -> Tensor:
    """Tokens [B, F, K, 1] -> [B, K, P, 4]: x and y from -1 to 1, the brush's width, presence."""
    raw = unscaled(tokens, scaling)
    curves = raw[..., :-1].unflatten(-1, (3, COEFFICIENTS)) @ cosines().to(tokens)  # [B, K, 3, P]
    x, y, width = curves.unbind(2)
    return torch.stack([2 * x - 1, 2 * y - 1, width, raw[..., -1:].expand_as(x)], dim=-1)


def character_of(lines: Tensor, char: str, hand: str) -> Character:
    """What `lines_of` gives for one character, [K, P, 4], as strokes; those that are absent are left out."""
    present = [line for line in lines.cpu().numpy() if line[0, 3] > 0]
    return Character(char, hand, [Stroke((line[:, :2] + 1) / 2, line[:, 2].clip(THINNEST, 1))
                                  for line in present])


def affine_tokens(tokens: Tensor, u: Tensor, scaling: Scaling, degrees: float = 3.0, translate: float = 0.02,
                  scale: float = 0.05, shear: float = 3.0) -> Tensor:
    """A small affine change of each character [B, F, K, 1] by numbers already drawn, u [B, 6] in 0..1.

    The transform is linear: coefficients of x and y mix as x and y do, and a shift changes the first alone.
    """
    u = (2 * u - 1).to(tokens)
    angle, slant = u[:, 0] * math.radians(degrees), u[:, 1] * math.tan(math.radians(shear))
    rows = [angle.cos(), slant - angle.sin(), angle.sin(), angle.cos()]
    turn = torch.stack(rows, -1).unflatten(-1, (2, 2)) * torch.exp(scale * u[:, 2, None, None])
    raw = unscaled(tokens, scaling)
    xy = raw[..., :2 * COEFFICIENTS].unflatten(-1, (2, COEFFICIENTS)).clone()       # [B, K, 2, C]
    middle = 0.5 * POINTS**0.5                                                      # of the box
    xy[..., 0] -= middle
    xy = torch.einsum("bij,bkjc->bkic", turn, xy)
    xy[..., 0] += middle + POINTS**0.5 * translate * u[:, None, 3:5]
    return scaled(torch.cat([xy.flatten(2), raw[..., 2 * COEFFICIENTS:]], dim=-1), scaling)


def read_strokes(folder: str | Path) -> tuple[list[Character], list[Path]]:
    """All characters of a folder, HAND/CHARACTER.json each, and their files. Raises DataError."""
    files = sorted(Path(folder).glob("*/*.json"))
    if not files:
        raise DataError(f"{folder}: holds no HAND/CHARACTER.json")
    return [read_character(file) for file in files], files


def holds_strokes(folder: str | Path) -> bool:
    """Whether a folder holds strokes in place of images."""
    return next(Path(folder).glob("*/*.json"), None) is not None


# ------------------------------------------------------------------------------------------------------ model


class StrokeTransformer(nn.Module):
    """Predicts v for a row of noisy tokens, given the time and a text. Takes the UNet's place."""

    gradient_checkpointing = False

    def __init__(self, most: int, text_width: int = TEXT_WIDTH):
        super().__init__()
        self.conv_in = nn.Conv2d(FEATURES, WIDTH, 1)        # named as in the UNet, since its device is asked
        self.positions = nn.Parameter(0.02 * torch.randn(most, WIDTH))
        self.time_proj = Timesteps(WIDTH, True, 0)
        self.time_embedding = TimestepEmbedding(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(BasicTransformerBlock(WIDTH, text_width, HEADS, False)
                                    for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, FEATURES)

    def forward(self, x: Tensor, t: Tensor | int, text: Tensor) -> Tensor:
        """x [B, F, K, 1], t a number or [B], text [B, T, text_width] -> [B, F, K, 1]."""
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        h = self.conv_in(x)[..., 0].transpose(1, 2)                 # [B, K, D]
        h = h + self.positions + self.time_embedding(self.time_proj(t).to(h.dtype))[:, None]
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, text, None, None, use_reentrant=False)
            else:
                h = block(h, text, None, None)
        return self.out(self.norm(h)).transpose(1, 2)[..., None]

    def enable_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass."""
        self.gradient_checkpointing = enable


class StrokeWriter(TextToImage):
    """`model.characters(prompts)` writes strokes; trained and sampled as TextToImage, for which they are
    images."""

    def __init__(self, unet: StrokeTransformer, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
                 scheduler: Sampler, scaling: Scaling, captions: list[str]):
        super().__init__(unet, text_encoder, tokenizer, scheduler, ImageFormat(SIDE, 1, 1), captions)
        self.scaling = scaling

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(F, K, 1)."""
        return FEATURES, self.scaling.most, 1

    def encode(self, images: Tensor) -> Tensor:
        """The data holds tokens [B, F, K, 1] already."""
        return images

    def decode(self, x0: Tensor) -> Tensor:
        """[B, F, K, 1] -> lines [B, K, P, 4]."""
        return lines_of(x0, self.scaling)

    def predict(self, x_t: Tensor, t: Tensor | int, conditioning: dict[str, Tensor]) -> Tensor:
        """The prediction [B, F, K, 1] for tokens x_t."""
        return self.unet(x_t, t, conditioning["text"])

    def characters(self, prompts: list[str], seed: int = 0, steps: int = 30, guidance: float = 1.5,
                   batch: int = 64, progress: Callable[[int], None] | None = None) -> list[Character]:
        """A character for each prompt, such as 春 楷書. Number i has its own noise, from (seed, i)."""
        lines = super().sample(prompts, seed, steps, guidance, batch, progress)
        return [character_of(line, *_named(prompt)) for line, prompt in zip(lines, prompts, strict=True)]

    def sample(self, prompts: list[str], seed: int = 0, steps: int = 30, guidance: float = 1.5,
               batch: int = 64, progress: Callable[[int], None] | None = None) -> Tensor:
        """Pictures of what `characters` gives, [N, 1, 128, 128] in [-1, 1]."""
        written = self.characters(prompts, seed, steps, guidance, batch, progress)
        paper = np.zeros((SIDE, SIDE), np.float32)
        inks = [write(character, SIDE, seed) if character.strokes else paper for character in written]
        return 1 - 2 * torch.from_numpy(np.stack(inks))[:, None]

    # ---- files

    def save(self, folder: str | Path) -> None:
        """The parts' folders, and the transformer as strokes.safetensors beside strokes.json."""
        folder = Path(folder)
        for name in ("text_encoder", "tokenizer", "scheduler"):
            getattr(self, name).save_pretrained(folder / name)
        save_file(self.unet.state_dict(), folder / "strokes.safetensors", {"format": "pt"})
        write_json(folder / STROKES_FILE, {
            "most": self.scaling.most, "mean": self.scaling.mean.tolist(),
            "deviation": self.scaling.deviation.tolist(), "captions": self.captions})

    @classmethod
    def load(cls, folder: str | Path) -> StrokeWriter:
        """A run folder or its `model`. Raises WeightsError or ConfigError that names the file."""
        folder = strokes_model_of(folder) or Path(folder)
        scaling, captions = _read_format(folder / STROKES_FILE)
        text = CLIPTextModel.from_pretrained(folder / "text_encoder")
        transformer = StrokeTransformer(scaling.most, text.config.hidden_size)
        weights = folder / "strokes.safetensors"
        load_strict(transformer, load_file(weights), str(weights))
        return cls(transformer, text, CLIPTokenizer.from_pretrained(folder / "tokenizer"),
                   load_scheduler(folder / "scheduler"), scaling, captions).eval()


def build_stroke_writer(scaling: Scaling, captions: list[str],
                        scheduler: Sampler | None = None) -> StrokeWriter:
    """A fresh model: a tokenizer trained on the captions, a text tower and a transformer.
    scheduler: one that does not clip, as coefficients pass 1."""
    distinct = list(dict.fromkeys(captions))
    tokenizer = CLIPTokenizer.of_captions(distinct, VOCABULARY)
    text = CLIPTextModel(CLIPTextConfig.for_tokenizer(
        tokenizer, hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=1,
        num_attention_heads=2, projection_dim=TEXT_WIDTH))
    return StrokeWriter(StrokeTransformer(scaling.most), text, tokenizer,
                        scheduler or cosine_schedule(clip=False), scaling, distinct)


def strokes_model_of(folder: str | Path) -> Path | None:
    """The folder itself or its `model`, whichever holds a StrokeWriter; None if neither does."""
    return next((path for path in (Path(folder), Path(folder) / "model") if (path / STROKES_FILE).is_file()),
                None)


def load_writer(folder: str | Path) -> TextToImage:
    """The model of a run folder, whichever kind it is of. Raises WeightsError or ConfigError."""
    return StrokeWriter.load(folder) if strokes_model_of(folder) else TextToImage.load(folder)


def _named(prompt: str) -> tuple[str, str]:
    """Character and hand of a prompt: 春 楷書."""
    char, _, hand = prompt.partition(" ")
    return char, hand


def _read_format(path: Path) -> tuple[Scaling, list[str]]:
    values = read_json(path)
    most, captions = values.get("most"), values.get("captions")
    if type(most) is not int or not 1 <= most <= MAX_STROKES or not is_texts(captions):
        raise WeightsError(f"{path}: most must be 1 to {MAX_STROKES}, captions a list of texts")
    numbers = [_numbers(values.get(name)) for name in ("mean", "deviation")]
    if None in numbers or min(numbers[1]) <= 0:
        raise WeightsError(f"{path}: mean and deviation must be {FEATURES} numbers each, the latter above 0")
    return Scaling(torch.tensor(numbers[0]), torch.tensor(numbers[1]), most), captions


def _numbers(value: Any) -> list[float] | None:
    """A list of F numbers that are not huge, or None."""
    good = isinstance(value, list) and len(value) == FEATURES and all(
        type(n) in (int, float) and abs(n) <= 1e6 for n in value)
    return [float(n) for n in value] if good else None


# --------------------------------------------------------------------------------------- what a user asks for


def load_run(run: str) -> StrokeWriter:
    """The model of a run. Raises UserError for a folder without one."""
    if strokes_model_of(run) is None:
        again = command("train_diffusion", data="data/strokes", steps=400, batch=56, out=run)
        raise UserError(f"--run {run}: no run on strokes; {again} trains one")
    return StrokeWriter.load(run)


def written(model: StrokeWriter, text: str, hand: str, seed: int, steps: int = 30,
            guidance: float = 1.5) -> list[Character]:
    """The characters of a text in a hand. Raises UserError for one that cannot be written."""
    check_text(model, text, hand)
    characters = model.characters([f"{char} {hand}" for char in text], seed, steps, guidance)
    if empty := [c.char for c in characters if not c.strokes]:
        raise UserError(f"--run: wrote no stroke of {'、'.join(empty)}; it needs more training")
    return characters


def check_text(model: StrokeWriter, text: str, hand: str) -> None:
    """Refuses in one line what the run never saw."""
    known = [caption.partition(" ") for caption in model.captions]
    hands = {char: [h for c, _, h in known if c == char] for char, _, _ in known}
    if not 1 <= len(text) <= LONGEST:
        raise UserError(f"--text {text[:40]}: must be 1 to {LONGEST} characters")
    if hand in JOINED:
        raise UserError(f"--hand {hand}: joins its strokes, so that they have no order here; the run knows "
                        f"{' '.join(dict.fromkeys(h for _, _, h in known))}")
    if unknown := [char for char in text if char not in hands]:
        raise UserError(f"--text {text}: the run never saw {'、'.join(unknown)}; it knows "
                        f"{''.join(hands)[:60]}")
    if lacking := [char for char in text if hand not in hands[char]]:
        raise UserError(f"--hand {hand}: the run knows {'、'.join(lacking)} in "
                        f"{' '.join(hands[lacking[0]])} only")
