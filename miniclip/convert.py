"""Checkpoints of other projects -> our models: OpenAI's archives, OpenCLIP's files,
the tutorial's best.pt, folders.

Read after weights.py. `load(path)` takes them all; `python -m miniclip.convert FILE FOLDER` writes a folder.
Papers: none. Source of the key names: clip/model.py of OpenAI, open_clip/model.py,
transformers' modeling_clip.py.
Mirrors: build_model of OpenAI, convert_clip_original_pytorch_to_hf.py of transformers.
Shapes: D width, L layers, E shared width, p patch side, n picture side.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from miniclip.bert import ChineseCLIPModel, DistilBertConfig
from miniclip.command import run
from miniclip.config import CLIPConfig, CLIPResNetConfig, CLIPTextConfig, CLIPVisionConfig, ConfigError
from miniclip.files import LOCAL_ONLY, WeightsError, is_zip, open_zip, read_json, reason, shown
from miniclip.model import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from miniclip.resnet import CLIPResNetModel
from miniclip.simple import SimpleCLIPConfig, SimpleCLIPModel
from miniclip.weights import (
    MAX_TENSORS,
    check_views,
    class_named,
    listed,
    load_file,
    load_pickle,
    load_strict,
)

# What neither the tensors nor their shapes tell: how wide a head is. The rest is checked against the file.
# name: E, picture (n, p, D, L, head width), text (D, L, heads)
VIT = {
    "ViT-S-32": (384, (224, 32, 384, 12, 64), (384, 12, 6)),
    "ViT-S-16": (384, (224, 16, 384, 12, 64), (384, 12, 6)),
    "ViT-M-32": (512, (224, 32, 512, 12, 64), (512, 12, 8)),
    "ViT-M-16": (512, (224, 16, 512, 12, 64), (512, 12, 8)),
    "ViT-B-32": (512, (224, 32, 768, 12, 64), (512, 12, 8)),
    "ViT-B-32-256": (512, (256, 32, 768, 12, 64), (512, 12, 8)),
    "ViT-B-16": (512, (224, 16, 768, 12, 64), (512, 12, 8)),
    "ViT-B-16-plus-240": (640, (240, 16, 896, 12, 64), (640, 12, 10)),
    "ViT-L-14": (768, (224, 14, 1024, 24, 64), (768, 12, 12)),
    "ViT-L-14-336": (768, (336, 14, 1024, 24, 64), (768, 12, 12)),
    "ViT-L-16": (768, (224, 16, 1024, 24, 64), (768, 12, 12)),
    "ViT-H-14": (1024, (224, 14, 1280, 32, 80), (1024, 24, 16)),
    "ViT-H-14-378": (1024, (378, 14, 1280, 32, 80), (1024, 24, 16)),
    "ViT-g-14": (1024, (224, 14, 1408, 40, 88), (1024, 24, 16)),
    "ViT-bigG-14": (1280, (224, 14, 1664, 48, 104), (1280, 32, 20)),
}
# name: E, picture (n, w, blocks a stage), text (D, L, heads)
RESNET = {
    "RN50": (1024, (224, 64, (3, 4, 6, 3)), (512, 12, 8)),
    "RN101": (512, (224, 64, (3, 4, 23, 3)), (512, 12, 8)),
    "RN50x4": (640, (288, 80, (4, 6, 10, 6)), (640, 12, 10)),
    "RN50x16": (768, (384, 96, (6, 8, 18, 8)), (768, 12, 12)),
    "RN50x64": (1024, (448, 128, (3, 15, 36, 10)), (1024, 12, 16)),
}

# OpenAI's names of tensors outside the blocks -> transformers'. Order matters: the first that fits is taken.
OUTSIDE = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
)
INSIDE = (
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)
TRANSPOSED = ("visual.proj", "text_projection")  # x @ P there, Linear here
# numbers and masks
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids")


# ------------------------------------------------------------------------------------------------- key tables


def from_openai(state_dict: dict[str, Tensor], source: str = "checkpoint") -> dict[str, Tensor]:
    """OpenAI's or OpenCLIP's ViT keys -> ours; either tower may be missing.
    q, k and v are cut out of in_proj. Raises WeightsError for tensors that cannot be cut or turned."""
    converted = {}
    for key, tensor in state_dict.items():
        if key.rsplit(".", 1)[-1] in NO_WEIGHTS:
            continue
        name = _renamed(key, OUTSIDE, INSIDE)
        if ".attn.in_proj_" in name:
            before, _, kind = name.partition(".attn.in_proj_")
            if tensor.ndim == 0 or len(tensor) % 3:
                raise WeightsError(f"{source}: {shown(key)} {list(tensor.shape)} cannot be cut into q, k, v")
            for letter, part in zip("qkv", tensor.tensor_split(3), strict=True):
                converted[f"{before}.self_attn.{letter}_proj.{kind}"] = part
        elif key in TRANSPOSED and tensor.ndim != 2:
            raise WeightsError(f"{source}: {key} {list(tensor.shape)} is no matrix")
        else:
            converted[name] = tensor.T if key in TRANSPOSED else tensor
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def to_openai(state_dict: dict[str, Tensor], source: str = "checkpoint") -> dict[str, Tensor]:
    """The inverse: CLIPModel's state dict -> OpenAI's keys, which OpenCLIP reads too. Raises WeightsError for
    tensors that cannot be put together or turned."""
    outside, inside = ([(b, a) for a, b in table] for table in (OUTSIDE, INSIDE))
    converted: dict[str, Any] = {}
    for key, tensor in state_dict.items():
        name = _renamed(key, outside, inside)
        match = re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if match:
            parts = converted.setdefault(f"{match[1]}.attn.in_proj_{match[3]}", {})
            parts[match[2]] = tensor
        else:
            if name in TRANSPOSED and tensor.ndim != 2:
                raise WeightsError(f"{source}: {shown(key)} {list(tensor.shape)} is no matrix")
            converted[name] = tensor.T if name in TRANSPOSED else tensor

    def whole(name: str, value: Tensor | dict[str, Tensor]) -> Tensor:
        if not isinstance(value, dict):
            return value.contiguous()
        if len({(part.shape, part.dtype) for part in value.values()}) > 1 or value.keys() != {*"qkv"}:
            raise WeightsError(f"{source}: {shown(name)} would need q, k and v of one shape and type, got "
                               f"{shown({k: list(part.shape) for k, part in value.items()})}")
        if not value["q"].ndim:
            raise WeightsError(f"{source}: {shown(name)} would be made of single numbers")
        return torch.cat([value["q"], value["k"], value["v"]])

    return {name: whole(name, value) for name, value in converted.items()}


def _renamed(key: str, outside: Any, inside: Any) -> str:
    for old, new in outside:
        if key.startswith(old):
            key = new + key[len(old) :]
            break
    for old, new in inside:
        key = key.replace(old, new)
    return key


# ------------------------------------------------------------------------------------------ reading the files


class _Module:
    """Stands for any class of the archive: only its attributes are kept."""

    def __init__(self, *args: Any):
        self.values: dict = {}

    def __setstate__(self, state: Any) -> None:
        self.values = state if isinstance(state, dict) else {}


class _Reader(pickle._Unpickler):
    """Unpickles the module tree of a TorchScript archive.
    It can make modules, tensors and lists, nothing else.

    Python's own reader, not the one in C, which takes 16 bytes of memory for each number that a "put" skips.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(root + "data.pkl"))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Hook of Unpickler: what a name in the file stands for. Raises WeightsError for others."""
        if module.split(".")[0] == "__torch__":
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle" and name.startswith(("build_", "restore_type_tag")):
            # lists of numbers, and type names
            return lambda value, *rest: value
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise WeightsError(f"the archive asks for {shown(f'{module}.{name}')}, which a checkpoint has no use "
                           "for")

    def persistent_load(self, pid: Any) -> Tensor:
        """("storage", dtype, key, device, count) -> a flat tensor;
        the device it was saved on does not matter."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not re.fullmatch(r"\d+", key):
            raise WeightsError(f"the archive names a storage {shown(pid)}")
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}data/{key}"))
            if len(raw) != count * dtype.itemsize:
                raise WeightsError(f"storage {key} has {len(raw)} bytes, not {count} of {dtype}")
            self.storages[key] = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return self.storages[key]


STORAGES = {
    "HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *rest: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)                           # refuses what lies outside


def read_archive(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive, as OpenAI publishes its models,
    without torch.jit and without its code.

    Raises WeightsError for anything that is not such an archive.
    """
    path = os.fspath(path)
    with open_zip(path) as archive:
        try:
            root = next(name for name in archive.namelist() if name.count("/") == 1
                        and name.endswith("/data.pkl"))
            tree = _Reader(archive, root.removesuffix("data.pkl")).load()
            found = {name: value for name, value in _walk(tree) if isinstance(value, Tensor)}
        except Exception as error:  # a hostile pickle can raise anything; none may pass as something else
            raise WeightsError(f"{path}: not a readable TorchScript archive: {reason(error)}") from None
    check_views(found, os.path.getsize(path), path)
    return found


def _walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of each attribute of each module, in order. A module may stand in several places, so
    what a small file may name is bounded."""

    def walk(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
        if not isinstance(module, _Module) or depth > 20 or len(prefix) > 1000:
            raise WeightsError("the archive holds no tree of modules")
        for name, value in module.values.items():
            yield prefix + name, value
            if isinstance(value, _Module):
                yield from walk(value, f"{prefix}{name}.", depth + 1)

    for count, entry in enumerate(walk(tree, "", 0)):
        if count > MAX_TENSORS:
            raise WeightsError(f"the archive's modules name more than {MAX_TENSORS} tensors and modules")
        yield entry


def read_any(path: str | os.PathLike) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file of any kind, and whether it is a TorchScript archive (then it is OpenAI's)."""
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise WeightsError(f"{path}: no such file or folder; {LOCAL_ONLY}")
    if path.endswith(".safetensors"):
        return _unwrapped(load_file(path)), False
    if is_zip(path):
        with open_zip(path) as archive:
            scripted = any(re.fullmatch(r"[^/]+/constants\.pkl", name) for name in archive.namelist())
        if scripted:
            return read_archive(path), True
    return _unwrapped(load_pickle(path)), False


def _unwrapped(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix of distributed training, and with OpenCLIP's "text." tower at the top,
    where OpenAI has it."""
    if state_dict and all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}
    if "text.token_embedding.weight" in state_dict:
        state_dict = {key.removeprefix("text."): tensor for key, tensor in state_dict.items()}
    return state_dict


# --------------------------------------------------------------------------------------------------- families


def load(path: str | os.PathLike, name: str | None = None) -> nn.Module:
    """Any checkpoint -> a model in float32, in eval mode.

    path: a folder of transformers or of ours; OpenAI's .pt;
    an OpenCLIP file, for which `name` says which model it is ("ViT-H-14", "ViT-B-32-quickgelu", ...), since
    neither head counts nor activations are in the file; the tutorial's best.pt.
    Raises WeightsError that says what was looked for.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return _load_folder(path)
    state_dict, archive = read_any(path)
    return from_tensors(state_dict, archive, path, name)


def from_tensors(state_dict: dict[str, Tensor], archive: bool, path: str, name: str | None) -> nn.Module:
    """The model of a file's tensors, whose shapes alone are looked at. archive: a TorchScript one, OpenAI's.
    Raises WeightsError, ConfigError."""
    if "image_encoder.model.conv1.weight" in state_dict:
        return _filled(SimpleCLIPModel, simple_config(state_dict, path), state_dict, path)
    if "vision_model.embeddings.class_embedding" in state_dict:
        config = clip_config(to_openai(state_dict, path), name, archive, path)
        return _filled(CLIPModel, config, state_dict, path)
    if "visual.layer1.0.conv1.weight" in state_dict:
        config = resnet_config(state_dict, name, archive, path)
        text = from_openai({k: v for k, v in state_dict.items() if not k.startswith("visual.")}, path)
        visual = {k: v for k, v in state_dict.items() if k.startswith("visual.")
                  and k != "visual.input_resolution"}
        return _filled(CLIPResNetModel, config, {**text, **visual}, path)
    if "visual.class_embedding" in state_dict and "token_embedding.weight" in state_dict:
        config = clip_config(state_dict, name, archive, path)
        return _filled(CLIPModel, config, from_openai(state_dict, path), path)
    wanted = {
        "OpenAI or OpenCLIP ViT": "visual.class_embedding",
        "OpenAI or OpenCLIP ResNet": "visual.layer1.0.conv1.weight",
        "transformers": "vision_model.embeddings.class_embedding",
        "the tutorial": "image_encoder.model.conv1.weight",
    }  # fmt: skip
    looked = ", ".join(f"{key} ({family})" for family, key in wanted.items())
    raise WeightsError(f"{path}: family not known; looked for {looked}; the {len(state_dict)} tensors begin "
                       f"{listed(list(state_dict)[:3])}")


def _filled(kind: type, config: Any, state_dict: dict[str, Tensor], source: str) -> nn.Module:
    with torch.device("meta"):
        model = kind(config)
    load_strict(model, model.convert_keys(state_dict), source, getattr(kind, "ignored_keys", ()))
    return model.eval()


FOLDERS = {
    "clip": CLIPModel, "clip_resnet": CLIPResNetModel, "simple_clip": SimpleCLIPModel,
    "chinese_clip": ChineseCLIPModel,
    "CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
    "CLIPVisionModel": CLIPVisionModel, "CLIPVisionModelWithProjection": CLIPVisionModelWithProjection,
}  # fmt: skip


def _load_folder(folder: str) -> nn.Module:
    return class_of(read_json(os.path.join(folder, "config.json")), folder).from_pretrained(folder)


def class_of(values: dict[str, Any], folder: str) -> type:
    """By "architectures" of config.json where it names one of our classes, else by model_type."""
    kind = FOLDERS.get(class_named(values)) or FOLDERS.get(str(values.get("model_type")))
    if kind is None:
        said = (f"model_type {shown(values.get('model_type'))}, architectures "
                f"{shown(values.get('architectures'))}")
        raise WeightsError(f"{folder}: config.json says {said}; known are {', '.join(FOLDERS)}")
    return kind


def _named(name: str | None, archive: bool, table: dict, source: str) -> tuple[tuple | None, str]:
    """The row of a named config, and the activation. OpenAI's archives need no name: all their heads are 64
    wide."""
    if name is None and archive:
        return None, "quick_gelu"
    known = ", ".join(table)
    if name is None:
        raise WeightsError(
            f"{source}: head count and activation are not in the file and cannot be inferred; give a name, "
            f"one of {known}, with -quickgelu if it was trained so (OpenAI's were)"
        )
    base = name.removesuffix("-quickgelu")
    if base not in table:
        raise WeightsError(f"{source}: name {shown(name)} is not one of {known}, each with or without "
                           "-quickgelu")
    return table[base], "quick_gelu" if archive or base != name else "gelu"


def size(state_dict: dict[str, Tensor], name: str, axis: int, source: str) -> int:
    """One side of a tensor, from which a config is read."""
    if name not in state_dict:
        raise WeightsError(f"{source}: tensor {name} is missing, so its config cannot be derived")
    shape = list(state_dict[name].shape)
    if axis >= len(shape) or shape[axis] < 1:
        raise WeightsError(f"{source}: the tensor {name} has the shape {shape}, so its config cannot be "
                           "derived")
    return shape[axis]


def made(kind: type, fields: dict[str, Any], source: str) -> Any:
    """A config read off a file's shapes; its errors name the file."""
    try:
        return kind(**fields)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _layers(state_dict: dict[str, Tensor], prefix: str) -> int:
    return len({k[len(prefix) :].split(".")[0] for k in state_dict if k.startswith(prefix)})


def _text_config(state_dict: dict[str, Tensor], heads: int | None, act: str, source: str) -> CLIPTextConfig:
    """The text tower's config from OpenAI keys. The end token is the last id, as in OpenAI's vocabulary."""
    vocab, D = (size(state_dict, "token_embedding.weight", axis, source) for axis in (0, 1))
    return made(CLIPTextConfig, dict(
        vocab_size=vocab, hidden_size=D, num_attention_heads=heads or max(D // 64, 1), hidden_act=act,
        intermediate_size=size(state_dict, "transformer.resblocks.0.mlp.c_fc.weight", 0, source),
        num_hidden_layers=_layers(state_dict, "transformer.resblocks."),
        max_position_embeddings=size(state_dict, "positional_embedding", 0, source),
        projection_dim=size(state_dict, "text_projection", 1, source),
        bos_token_id=vocab - 2, eos_token_id=vocab - 1,
    ), source)  # fmt: skip


def _agree(name: str | None, stated: tuple, read: tuple, source: str) -> None:
    if stated != read:
        raise WeightsError(f"{source}: {name} has sizes {stated}, but the file's tensors have {read}")


def clip_config(state_dict: dict[str, Tensor], name: str | None, archive: bool, source: str) -> CLIPConfig:
    """The config of a ViT model from its OpenAI keys and, for head widths and activation, its name."""
    row, act = _named(name, archive, VIT, source)
    D, channels, p = (size(state_dict, "visual.conv1.weight", axis, source) for axis in (0, 1, 2))
    n = p * math.isqrt(size(state_dict, "visual.positional_embedding", 0, source) - 1)
    L, E = _layers(state_dict, "visual.transformer.resblocks."), size(state_dict, "visual.proj", 1, source)
    text = _text_config(state_dict, row and row[2][2], act, source)
    if row:
        read = (E, (n, p, D, L), (text.hidden_size, text.num_hidden_layers))
        _agree(name, (row[0], row[1][:4], row[2][:2]), read, source)
    vision = made(CLIPVisionConfig, dict(
        hidden_size=D, num_channels=channels, patch_size=p, image_size=n, num_hidden_layers=L,
        projection_dim=E, hidden_act=act, num_attention_heads=max(D // (row[1][4] if row else 64), 1),
        intermediate_size=size(state_dict, "visual.transformer.resblocks.0.mlp.c_fc.weight", 0, source),
    ), source)  # fmt: skip
    return made(CLIPConfig, dict(text_config=text, vision_config=vision, projection_dim=E), source)


def resnet_config(state_dict: dict[str, Tensor], name: str | None, archive: bool,
                  source: str) -> CLIPResNetConfig:
    """The config of a ResNet model from its OpenAI keys;
    the name is needed for the text tower's activation."""
    row, act = _named(name, archive, RESNET, source)
    text = _text_config(state_dict, row and row[2][2], act, source)
    stages = tuple(_layers(state_dict, f"visual.layer{i}.") for i in (1, 2, 3, 4))
    w = size(state_dict, "visual.layer1.0.conv1.weight", 0, source)
    n = 32 * math.isqrt(size(state_dict, "visual.attnpool.positional_embedding", 0, source) - 1)
    if row:
        read = (text.projection_dim, (n, w, stages), (text.hidden_size, text.num_hidden_layers))
        _agree(name, (row[0], row[1], row[2][:2]), read, source)
    return made(CLIPResNetConfig, dict(text_config=text, vision_layers=stages, vision_width=w, image_size=n,
                                       projection_dim=text.projection_dim), source)


def simple_config(state_dict: dict[str, Tensor], source: str) -> SimpleCLIPConfig:
    """The tutorial's best.pt: ResNet-50 of timm, DistilBERT with heads of 64, two projection heads."""
    prefix = "text_encoder.model."
    vocab, D = (size(state_dict, prefix + "embeddings.word_embeddings.weight", axis, source)
                for axis in (0, 1))
    text = made(DistilBertConfig, dict(
        vocab_size=vocab, dim=D, n_heads=max(D // 64, 1),
        n_layers=_layers(state_dict, prefix + "transformer.layer."),
        hidden_dim=size(state_dict, prefix + "transformer.layer.0.ffn.lin1.weight", 0, source),
        max_position_embeddings=size(state_dict, prefix + "embeddings.position_embeddings.weight", 0, source),
    ), source)  # fmt: skip
    return made(SimpleCLIPConfig, dict(
        text_encoder="distilbert", text_config=text, logit_scale_init_value=0.0,
        image_layers=tuple(_layers(state_dict, f"image_encoder.model.layer{i}.") for i in (1, 2, 3, 4)),
        image_width=size(state_dict, "image_encoder.model.conv1.weight", 0, source),
        projection_dim=size(state_dict, "image_projection.projection.weight", 0, source),
    ), source)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status, 2 after a mistake of the user."""
    parser = argparse.ArgumentParser("python -m miniclip.convert",
                                     description="Reads a CLIP checkpoint of any family, writes a model "
                                                 "folder.")
    parser.add_argument("file", help="OpenAI's .pt, an OpenCLIP file, the tutorial's best.pt, or a folder")
    parser.add_argument("folder", help="where config.json and model.safetensors go")
    parser.add_argument("--name", help="which OpenCLIP model the file is, e.g. ViT-B-32 or "
                                       "ViT-B-32-quickgelu")
    arguments = parser.parse_args(argv)

    def convert() -> None:
        model = load(arguments.file, arguments.name)
        model.save_pretrained(arguments.folder)
        print(f"{type(model).__name__}, {model.num_parameters() / 1e6:.2f} M parameters -> "
              f"{arguments.folder}")

    return run("convert", convert)


if __name__ == "__main__":
    sys.exit(main())
