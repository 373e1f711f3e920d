"""Pictures for CLIP: RGB, shortest edge to n, crop the middle, scale, normalise; and the processor with text.

Read after tokenizer.py; next weights.py. Pillow is imported only where a Pillow picture or a file comes in.
Paper: none; the resampling is Pillow's ImagingResample, done here in torch to the last bit, so that tensors
need no Pillow.
Mirrors: transformers' CLIPImageProcessor(Pil) and CLIPProcessor; OpenAI's clip.load transform as
`.openai(n)`.
Shapes: C channels, H W height and width in pixels, n the side that the model reads, N pictures.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from miniclip.config import Config, ConfigError
from miniclip.encoding import Encoding
from miniclip.files import need_folder, read_json, shown, write_json
from miniclip.habits import LOADING_REFUSED, SAVING_IDLE, SAVING_REFUSED, settle
from miniclip.picture import MOST_PIXELS, ImageError, open_picture
from miniclip.picture_habits import PICTURE_IDLE, PictureHabits, ProcessorHabits
from miniclip.tokenizer import CLIPTokenizer

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the pictures that OpenAI trained on, in 0..1
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MOST_EDGE = 4096        # pixels that size and crop_size may ask for; the largest CLIPs read about 900
MOST_FACTOR = 10**6     # of mean, std and rescale_factor


# ------------------------------------------------------------------------------------------------- resampling


def bicubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, as Pillow has it; support 2 pixels."""
    x, a = x.abs(), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def bilinear(x: Tensor) -> Tensor:
    """The triangle; support 1 pixel."""
    return (1 - x.abs()).clamp_min(0)


FILTERS = {2: (bilinear, 1.0), 3: (bicubic, 2.0)}  # Pillow's numbers for resample


def resampling_matrix(old: int, new: int, resample: int) -> Tensor:
    """[new, old] float64: row i holds the weights of the old pixels for new pixel i,
    whole multiples of 2^-22.

    Pillow widens the filter when it shrinks a picture (antialiasing) and rounds the weights to 22 bits.
    """
    kernel, support = FILTERS[resample]
    scale = old / new
    stretch = max(scale, 1.0)
    centers = (torch.arange(new, dtype=torch.float64) + 0.5) * scale                  # [new]
    # first pixel under the filter
    low = (centers - support * stretch + 0.5).trunc().clamp_min(0)
    high = (centers + support * stretch + 0.5).trunc().clamp_max(old)                 # one past the last
    pixels = torch.arange(old, dtype=torch.float64)                                   # [old]
    weights = kernel((pixels - centers[:, None] + 0.5) * (1.0 / stretch))             # [new, old]
    weights = weights * ((pixels >= low[:, None]) & (pixels < high[:, None]))
    weights = weights / weights.sum(dim=1, keepdim=True)
    fixed = weights * 2**22
    return (fixed + torch.where(fixed < 0, -0.5, 0.5)).trunc() / 2**22


def resize(picture: Tensor, height: int, width: int, resample: int = 3) -> Tensor:
    """uint8 [C, H, W] -> uint8 [C, height, width], bit for bit what Pillow's Image.resize gives.

    Columns first, then rows, rounded to 8 bits in between: the order of every Pillow up to 12;
    Pillow 13 turns it round for pictures that lose far more height than width.
    Sums stay below 2^53, so float64 computes them exactly.
    """
    if max(picture.shape[2] * width, picture.shape[1] * height) > MOST_PIXELS:        # weights of a matrix
        raise ImageError(f"a picture of {list(picture.shape)} is too large to be resized to {height} x "
                         f"{width}")
    x = picture.to("cpu", torch.float64)                                              # MPS has no float64
    if width != x.shape[2]:
        x = (x @ resampling_matrix(x.shape[2], width, resample).T + 0.5).floor().clamp(0, 255)
    if height != x.shape[1]:
        x = (resampling_matrix(x.shape[1], height, resample) @ x + 0.5).floor().clamp(0, 255)
    return x.to(torch.uint8)


def center_crop(picture: Tensor, height: int, width: int, rounding: str = "floor") -> Tensor:
    """[C, H, W] -> [C, height, width] from the middle; what is missing of a small picture is filled with 0.

    rounding: where an odd margin's extra pixel goes.
    "floor" as transformers, "round" as torchvision (half to even);
    they differ by one pixel on about a quarter of all aspect ratios.
    """
    _, H, W = picture.shape
    down, right = max(0, height - H), max(0, width - W)
    if down or right:
        top, left = ((down + 1) // 2, (right + 1) // 2) if rounding == "floor" else (down // 2, right // 2)
        picture = torch.nn.functional.pad(picture, (left, right - left, top, down - top))
        _, H, W = picture.shape
    top, left = (H - height) // 2, (W - width) // 2
    if rounding == "round":
        top, left = round((H - height) / 2), round((W - width) / 2)
    return picture[:, top : top + height, left : left + width]


# ------------------------------------------------------------------------------------------ kinds of pictures


def _is_pillow(image: Any) -> bool:
    return hasattr(image, "getbands") and hasattr(image, "tobytes")


def pillow_to_rgb(image: Any, alpha: str) -> Any:
    """A Pillow picture of any mode -> mode RGB. alpha: "white" composites on white,
    otherwise it is dropped."""
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparent and alpha == "white":
        from PIL import Image

        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def pillow_to_tensor(image: Any) -> Tensor:
    """A Pillow picture of mode L, RGB or RGBA -> uint8 [1, 3 or 4, H, W]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).permute(2, 0, 1)


def array_to_tensor(image: Any, layout: str | None = None) -> Tensor:
    """A tensor or a numpy array, [C, H, W], [H, W, C] or [H, W] -> uint8 [C, H, W].

    layout: "channels_first" or "channels_last"; without it, it is found by which axis has 1, 3 or 4 entries:
    of two such axes the first of a tensor, the last of an array.
    """
    x = image if isinstance(image, Tensor) else torch.from_numpy(image.copy())
    if x.ndim == 2:
        x = x[None]
    elif x.ndim == 3:
        first, last = x.shape[0] in (1, 3, 4), x.shape[2] in (1, 3, 4)
        found = last and not (first and isinstance(image, Tensor))
        x = x.permute(2, 0, 1) if (found if layout is None else layout == "channels_last") else x
    if x.dtype != torch.uint8 or x.ndim != 3 or x.shape[0] not in (1, 3, 4):
        raise ImageError(f"picture of {x.dtype}, shape {list(x.shape)}: expected uint8 with 1, 3 or 4 "
                         "channels")
    return x


def tensor_to_rgb(x: Tensor, alpha: str) -> Tensor:
    """uint8 [1, 3 or 4, H, W] -> [3, H, W], with Pillow's integer arithmetic for a picture on white."""
    if x.shape[0] == 4 and alpha == "white":
        color, a = x[:3].to(torch.int64), x[3].to(torch.int64)
        mixed = (color * a + 255 * (255 - a)) * 128 + 0x4000
        return ((((mixed >> 8) + mixed) >> 8) >> 7).to(torch.uint8)
    return x.expand(3, -1, -1) if x.shape[0] == 1 else x[:3]


# ------------------------------------------------------------------------------------------------- processors


@dataclass(frozen=True, eq=False, repr=False)
class CLIPImageProcessor(PictureHabits, Config):
    """Pictures -> pixel_values [N, 3, n, n]. Fields are those of preprocessor_config.json,
    defaults upstream's.

    A picture is a Pillow image, a path, a uint8 tensor or a numpy array, see array_to_tensor.
    alpha: "white" (transformers 5: composited on white), "drop" (transformers 4), "drop_after_resize"
    (OpenAI). crop_rounding: see center_crop.
    """

    do_resize: bool | None = True  # None is False, here and below
    size: Any = 224  # {"shortest_edge": n} or n; {"height", "width"} distorts
    resample: int = 3  # 2 bilinear, 3 bicubic
    do_center_crop: bool | None = True
    crop_size: Any = 224  # {"height", "width"} or n
    do_rescale: bool | None = True
    rescale_factor: float = 1 / 255
    do_normalize: bool | None = True
    image_mean: tuple[float, ...] = OPENAI_CLIP_MEAN
    image_std: tuple[float, ...] = OPENAI_CLIP_STD
    do_convert_rgb: bool | None = True  # False leaves 1, 3 or 4 channels, with as many means
    alpha: str = "white"
    crop_rounding: str = "floor"

    inert: ClassVar[dict[str, tuple]] = {"use_square_size": (False,), "do_pad": (False, None),
                                         "pad_size": (None,)}
    metadata: ClassVar[frozenset[str]] = frozenset(
        "image_processor_type feature_extractor_type processor_class default_to_square data_format "
        "input_data_format device return_tensors disable_grouping image_seq_length".split()
    )

    def check(self) -> None:
        """Sizes are whole numbers of pixels; the named choices exist."""
        if isinstance(self.size, int):
            object.__setattr__(self, "size", {"shortest_edge": self.size})
        if isinstance(self.crop_size, int):
            object.__setattr__(self, "crop_size", {"height": self.crop_size, "width": self.crop_size})
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            _check_numbers(name, getattr(self, name))
        _check_numbers("rescale_factor", (self.rescale_factor,))
        _check_size("size", self.size, ({"shortest_edge"}, {"height", "width"}))
        _check_size("crop_size", self.crop_size, ({"height", "width"},))
        known = {"resample": tuple(FILTERS), "alpha": ("white", "drop", "drop_after_resize"),
                 "crop_rounding": ("floor", "round")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"{name} = {shown(getattr(self, name))} is not one of "
                                  f"{', '.join(map(repr, values))}")

    @classmethod
    def openai(cls, n: int = 224) -> CLIPImageProcessor:
        """What OpenAI's clip.load returns as `preprocess`, for a model that reads n x n pixels."""
        return cls(size=n, crop_size=n, alpha="drop_after_resize", crop_rounding="round")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, subfolder: str | None = None,
                        **options: Any) -> CLIPImageProcessor:
        """Reads preprocessor_config.json, or the image part of transformers 5's processor_config.json.

        options override fields; upstream's other ones: see miniclip.picture_habits.
        """
        habits = {name: options.pop(name) for name in list(options) if name not in cls.field_names()}
        settle("CLIPImageProcessor.from_pretrained", habits, PICTURE_IDLE, LOADING_REFUSED)
        folder = os.path.join(folder, subfolder) if subfolder else os.fspath(folder)
        need_folder(folder)
        for name in ("preprocessor_config.json", "processor_config.json"):
            path = os.path.join(folder, name)
            if os.path.exists(path):
                values = read_json(path)
                values = values.get("image_processor", values)
                if isinstance(values, dict) and (name.startswith("pre") or "image_mean" in values):
                    return cls.from_dict({**values, **options}, path)
        raise ConfigError(f"{folder}: no preprocessor_config.json or processor_config.json with an image "
                          "processor")

    def save_pretrained(self, folder: str | os.PathLike, **habits: Any) -> list[str]:
        """Writes preprocessor_config.json, which transformers 4 and 5 read, and returns its path;
        ours alone are alpha, crop_rounding."""
        settle("CLIPImageProcessor.save_pretrained", habits, SAVING_IDLE, SAVING_REFUSED)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "preprocessor_config.json")
        write_json(path, {"image_processor_type": "CLIPImageProcessor", **self.to_dict()})
        return [path]

    def __call__(
        self,
        images: Any,
        return_tensors: str | None = "pt",
        *,
        input_data_format: str | None = None,
        data_format: str | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Encoding:
        """One picture or a list -> pixel_values float32 [N, 3, n, n], on `device`.

        return_tensors: "pt", "np", or None for a list of [3, n, n]. input_data_format: the layout of arrays
        and tensors, "channels_first" or "channels_last", in place of a guess. data_format: the result's.
        options: fields of this processor, for this call. Raises ImageError, ConfigError.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ImageError(f"return_tensors = {return_tensors!r} is not None, 'pt' or 'np'")
        processor = self.changed(options)
        pictures = [processor.process(image, input_data_format) for image in _flat(images)]
        if data_format == "channels_last":
            pictures = [picture.permute(1, 2, 0) for picture in pictures]
        pictures = [picture.to(device) for picture in pictures]
        if return_tensors is None:
            return Encoding(pixel_values=pictures)
        if len({p.shape for p in pictures}) > 1:
            raise ImageError(f"pictures of sizes {[list(p.shape[1:]) for p in pictures[:5]]} make no "
                             "batch")
        batch = torch.stack(pictures)
        return Encoding(pixel_values=batch.numpy() if return_tensors == "np" else batch)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **options: Any) -> Encoding:
        """The same as a call."""
        return self(images, return_tensors, **options)

    def process(self, image: Any, layout: str | None = None) -> Tensor:
        """One picture -> float32 [3, n, n]. layout: of an array or tensor, see array_to_tensor."""
        x = self._resized(image, layout)                                              # uint8 [3, H', W']
        if self.do_center_crop:
            x = center_crop(x, self.crop_size["height"], self.crop_size["width"], self.crop_rounding)
        x = (x.double() * self.rescale_factor).float() if self.do_rescale else x.float()
        if self.do_normalize:
            mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
            if not len(mean) == len(std) == len(x):
                raise ImageError(f"a picture of {len(x)} channels, but {len(mean)} in image_mean and "
                                 f"{len(std)} in image_std")
            x = (x - mean[:, None, None]) / std[:, None, None]
        return x

    def _resized(self, image: Any, layout: str | None) -> Tensor:
        """Any kind of picture -> RGB uint8 [3, H', W'], resized: Pillow pictures by Pillow,
        the rest by resize()."""
        name = "a picture"
        if isinstance(image, (str, os.PathLike)):
            name, image = os.fsdecode(image), open_picture(image)
        if _is_pillow(image):
            if not self.do_convert_rgb and image.mode not in ("L", "RGB", "RGBA"):
                raise ImageError(f"a Pillow picture of mode {image.mode} needs do_convert_rgb=True")
            if self.do_convert_rgb and self.alpha != "drop_after_resize":
                image = pillow_to_rgb(image, self.alpha)
            if self.do_resize:
                height, width = self._target(image.height, image.width, name)
                # as torchvision: no mixing of indices
                resample = 0 if image.mode in ("1", "P") else self.resample
                image = image.resize((width, height), resample=resample)
            return pillow_to_tensor(image.convert("RGB") if self.do_convert_rgb else image)
        if not isinstance(image, Tensor) and type(image).__module__ != "numpy":
            raise ImageError(f"{type(image).__name__} is not a picture: give a Pillow image, a path, a "
                             "tensor or array")
        x = array_to_tensor(image, layout)
        x = tensor_to_rgb(x, self.alpha) if self.do_convert_rgb else x
        return resize(x, *self._target(*x.shape[1:], name), self.resample) if self.do_resize else x

    def _target(self, H: int, W: int, name: str) -> tuple[int, int]:
        """Height and width to resize to. Raises ImageError where a long thin picture would take gigabytes."""
        if not H * W:
            raise ImageError(f"{name}: {W}x{H} pixels, which are none")
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        n = self.size["shortest_edge"]
        height, width = (n, n * W / H) if H <= W else (n * H / W, n)
        if height * width > MOST_PIXELS:
            raise ImageError(f"{name}: {W}x{H} pixels: resized to a shortest edge of {n} it would have more "
                             f"than the limit of {MOST_PIXELS}; cut it")
        return int(height), int(width)


def _check_size(name: str, size: Any, allowed: tuple[set, ...]) -> None:
    whole = isinstance(size, dict) and all(type(v) is int and 0 < v <= MOST_EDGE for v in size.values())
    if not whole or set(size) not in allowed:
        raise ConfigError(f"{name} = {shown(size)} is not a number of pixels from 1 to {MOST_EDGE} or "
                          f"one of {[sorted(a) for a in allowed]}")


def _check_numbers(name: str, values: tuple) -> None:
    if len(values) > 4 or not all(abs(v) <= MOST_FACTOR for v in values):             # NaN is refused, too
        raise ConfigError(f"{name} = {shown(values)}: at most one number a channel, each of at most "
                          f"{MOST_FACTOR:,}")


def _flat(images: Any) -> list[Any]:
    """One picture, a batch or lists of lists -> a list of pictures."""
    if isinstance(images, (list, tuple)):
        return [picture for image in images for picture in _flat(image)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


class CLIPProcessor(ProcessorHabits):
    """An image processor and a tokenizer in one: `processor(text=[...], images=[...], padding=True)`."""

    def __init__(self, image_processor: CLIPImageProcessor | None = None,
                 tokenizer: CLIPTokenizer | None = None):
        self.image_processor = image_processor or CLIPImageProcessor()
        self.tokenizer = tokenizer

    def __call__(
        self, text: Any = None, images: Any = None, return_tensors: str | None = "pt", *,
        text_kwargs: dict[str, Any] | None = None, images_kwargs: dict[str, Any] | None = None,
        common_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> Encoding:
        """input_ids, attention_mask [N, S] for the text, pixel_values [M, 3, n, n] for the pictures.

        Pictures may come first, as in transformers 5: what is a picture is told by its kind. A path is taken
        for a text unless it is named, images="a.png".
        options go to the tokenizer (padding, truncation, max_length) or, if they are its fields, to the image
        processor; text_kwargs and images_kwargs to the one or the other, common_kwargs as options. Raises
        ValueError if both text and images are missing, or for an option that is given twice.
        """
        if is_picture(text):
            text, images = images, text
        if text is None and images is None:
            raise ValueError("CLIPProcessor: text and images are both missing")
        if text is not None and self.tokenizer is None:
            raise ValueError("CLIPProcessor: text was given, but the processor has no tokenizer")
        options = once(common_kwargs, options)
        return_tensors = options.pop("return_tensors", return_tensors)
        of_images, of_text = self.sorted(options)
        out = Encoding()
        if text is not None:
            chosen = {"return_tensors": return_tensors, **once(of_text, text_kwargs)}
            out.update(self.tokenizer(text, **chosen))
        if images is not None:
            chosen = {"return_tensors": return_tensors, **once(of_images, images_kwargs)}
            out.update(self.image_processor(images, **chosen))
        return out

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> CLIPProcessor:
        """Reads both parts from one local folder. options: fields of the image processor, or options of
        CLIPTokenizer.from_pretrained."""
        of_images, of_text = cls.sorted(options)
        both = {name: of_text[name] for name in of_text if name == "subfolder"}
        return cls(CLIPImageProcessor.from_pretrained(folder, **of_images, **both),
                   CLIPTokenizer.from_pretrained(folder, **of_text))

    def save_pretrained(self, folder: str | os.PathLike, **habits: Any) -> list[str]:
        """Writes both parts into one folder; the paths of the files."""
        paths = self.image_processor.save_pretrained(folder, **habits)
        return paths + list(self.tokenizer.save_pretrained(folder, **habits) if self.tokenizer else ())

    def decode(self, ids: Any, **options: Any) -> str:
        """Text of one row of ids; options as the tokenizer's."""
        return self.tokenizer.decode(ids, **options)

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        """Texts of many rows of ids."""
        return self.tokenizer.batch_decode(rows, **options)

    @staticmethod
    def sorted(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of the image processor, and those of the tokenizer, which are all others."""
        names = {*CLIPImageProcessor.field_names(), "input_data_format", "data_format", "device"}
        return ({name: value for name, value in options.items() if name in names},
                {name: value for name, value in options.items() if name not in names})


def once(*options: dict[str, Any] | None) -> dict[str, Any]:
    """All options in one. Raises ValueError for one that is given twice."""
    joined: dict[str, Any] = {}
    for given in options:
        if twice := joined.keys() & (given or {}).keys():
            raise ValueError(f"CLIPProcessor: {', '.join(sorted(twice))} is given twice")
        joined.update(given or {})
    return joined


def is_picture(value: Any) -> bool:
    """Whether it is a Pillow picture, a tensor or an array, or a list that starts with one."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return _is_pillow(value) or isinstance(value, Tensor) or type(value).__module__ == "numpy"
