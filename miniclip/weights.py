"""Weight files and model folders: safetensors, tensors in pickles, shards, strict loading.

Read after files.py and config.py; it knows no model. Every model that reads or writes a folder inherits from
`ModelFolder`.
Source: the format description in the safetensors repository; folder layouts as diffusers and transformers
write them.
Mirrors: diffusers/models/modeling_utils.py, model_loading_utils.py; safetensors/torch.py; its tensor.rs for
the checks.
Legend: a safetensors file is [8 bytes: n, little-endian][n bytes: JSON header][data]; offsets count from the
data's start.
"""

from __future__ import annotations

import ctypes
import glob
import json
import math
import mmap as mmap_module
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miniclip.config import Config, ConfigError
from miniclip.files import (
    MissingWeights,
    WeightsError,
    atomic_write,
    name_of,
    need_folder,
    open_file,
    parse_json,
    read_json,
    read_pickle,
    shown,
    write_json,
)
from miniclip.habits import (
    LOADING_IDLE,
    LOADING_REFUSED,
    SAVING_IDLE,
    SAVING_REFUSED,
    LeftOut,
    settle,
)

MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound
MAX_TENSORS = 50_000  # in one file; Stable Diffusion XL whole has 2,515
MAX_DIMS = 32
MOST_NUMBERS = 100_000_000_000  # parameters; 2.6 billion in the UNet of SDXL
MOST_TIED = 4  # names that share their bytes, on average
SLACK = 2**20  # bytes, for the rest of what a small file may have
FIELDS = {"dtype", "shape", "data_offsets"}
ERRORS_SHOWN = 5  # names listed per kind of mismatch before "and N more"

# In the order of safetensors' own Dtype enum: its writer sorts by it, descending, and so do we.
DTYPES = {
    name: getattr(torch, torch_name)
    for name, torch_name in (
        ("BOOL", "bool"), ("U8", "uint8"), ("I8", "int8"),
        ("F8_E5M2", "float8_e5m2"), ("F8_E4M3", "float8_e4m3fn"),
        ("F8_E4M3FNUZ", "float8_e4m3fnuz"), ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
        ("I16", "int16"), ("U16", "uint16"), ("F16", "float16"), ("BF16", "bfloat16"),
        ("I32", "int32"), ("U32", "uint32"), ("F32", "float32"), ("C64", "complex64"),
        ("F64", "float64"), ("I64", "int64"), ("U64", "uint64"),
    )
    if hasattr(torch, torch_name)  # older torch lacks some
}  # fmt: skip
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}


# ------------------------------------------------------------------------------------------------ safetensors


def load_file(
    path: str | os.PathLike, mmap: bool = os.name != "nt", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Reads a safetensors file. Tensors come in the order of their bytes in the file.

    With `mmap` they are copy-on-write views of the file: nothing is read until it is touched,
    and writing to a tensor changes memory only. Where mapping fails, and on Windows (a mapped file cannot be
    replaced there), they are read.
    dtype: floating-point tensors of another dtype are read one by one and cast,
    so that memory never holds both.
    Raises WeightsError for whatever is not exactly a safetensors file, and for what the safetensors library
    (0.8) takes all the same: a tensor or a metadata key twice, of which it drops one; fields beside the
    three, a list in their place, `__metadata__` null, blanks before the header (the format has none of
    these); more than 32 axes or 50,000 tensors, or an empty tensor of absurd shape; F8_E8M0 and F4, the types
    of quantized weights.
    """
    path = name_of(path)
    _refuse_big_endian(path)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        start, entries = _read_header(file, size, path)
        mapping = _map(file) if mmap and size > start else None
        tensors = {}
        try:
            for name, kind, shape, begin, _ in entries:
                wanted = dtype if dtype is not None and kind.is_floating_point else kind
                if mapping is None or wanted is not kind:
                    tensors[name] = _read_tensor(file, start + begin, kind, shape, path).to(wanted)
                else:
                    tensors[name] = _mapped_tensor(mapping, start + begin, kind, shape)
            return tensors
        except (MemoryError, RuntimeError) as error:
            raise WeightsError(f"{path}: cannot be loaded: {error}") from None


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The `__metadata__` of a safetensors file; empty if it has none. Raises WeightsError."""
    path = name_of(path)
    with open_file(path) as file:
        header, _ = _parse_header(file, os.fstat(file.fileno()).st_size, path)
    return _metadata(header, path)


def _read_header(file: BinaryIO, size: int, path: str) -> tuple[int, list[tuple]]:
    """Where the data begins, and (name, dtype, shape, begin, end) of each tensor in the order of the data."""
    header, start = _parse_header(file, size, path)
    return start, check_header(header, size - start, path)


def _parse_header(file: BinaryIO, size: int, path: str) -> tuple[dict[str, Any], int]:
    """The header's JSON, and where the data begins."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise WeightsError(f"{path}: {size} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise WeightsError(f"{path}: header length {length} does not fit (file {size} bytes, at most "
                           f"{MAX_HEADER_BYTES})")
    raw = file.read(length)
    if raw[:1] != b"{" or len(raw) < length:
        raise WeightsError(f"{path}: not a safetensors file, the header does not begin with "
                           f"'{{' or is cut off")
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise WeightsError(f"{path}: more than {MAX_TENSORS} tensors in a file are refused")
    return parse_json(raw, path), 8 + length


def _metadata(header: dict[str, Any], source: str) -> dict[str, str]:
    """The entry `__metadata__`, which leaves the header."""
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{source}: __metadata__ must map strings to strings")
    return metadata


def check_header(header: dict[str, Any], data_bytes: int, source: str) -> list[tuple]:
    """Holds a parsed header against the format: every tensor well-formed,
    and the tensors tile the data exactly."""
    _metadata(header, source)
    entries = sorted((_entry(name, info, source) for name, info in header.items()),
                     key=lambda entry: entry[3:])
    expected = 0
    for name, _, _, begin, end in entries:
        if begin != expected:
            problem = "overlaps the tensor before it" if begin < expected else "leaves a hole before it"
            raise WeightsError(f"{source}: tensor {shown(name)} at bytes {begin}:{end} {problem} "
                               f"({expected})")
        expected = end
    if expected != data_bytes:
        raise WeightsError(f"{source}: the tensors end at byte {expected}, the data at {data_bytes}: cut off "
                           "or padded")
    return entries


def _entry(name: str, info: Any, source: str) -> tuple[str, torch.dtype, list[int], int, int]:
    """One tensor of the header, checked by itself."""

    def wrong(problem: str) -> WeightsError:
        return WeightsError(f"{source}: tensor {shown(name)}: {problem}")

    if not isinstance(info, dict) or info.keys() != FIELDS:
        raise wrong(f"expected dtype, shape and data_offsets, got {shown(info)}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"dtype {shown(dtype)} is not one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMS or math.prod(n or 1 for n in shape) >= 2**48:
        raise wrong(f"shape {shown(shape)} is not one that a tensor can have")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets {shown(offsets)} is not a pair begin <= end")
    begin, end = offsets
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise wrong(f"{dtype} of shape {shown(shape)} does not take {end - begin} bytes")
    if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
        raise wrong("its name is no text: half of a surrogate pair")
    return name, DTYPES[dtype], shape, begin, end


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _map(file: BinaryIO) -> mmap_module.mmap | None:
    try:
        return mmap_module.mmap(file.fileno(), 0, access=mmap_module.ACCESS_COPY)
    except (OSError, ValueError, MemoryError):
        return None


def _mapped_tensor(mapping: mmap_module.mmap, offset: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    count = math.prod(shape)
    if count == 0:  # frombuffer refuses empty
        return torch.empty(shape, dtype=dtype)
    if offset % dtype.itemsize:  # unaligned: the kernels may not read it in place
        unaligned = bytearray(mapping[offset : offset + count * dtype.itemsize])
        return torch.frombuffer(unaligned, dtype=dtype).view(shape)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset).view(shape)


def _read_tensor(file: BinaryIO, offset: int, dtype: torch.dtype, shape: list[int], path: str) -> Tensor:
    file.seek(offset)
    content = bytearray(math.prod(shape) * dtype.itemsize)
    if file.readinto(content) != len(content):
        raise WeightsError(f"{path}: cut off while it was being read")
    return torch.frombuffer(content, dtype=dtype).view(shape) if content else torch.empty(shape, dtype=dtype)


def save_file(tensors: dict[str, Tensor], path: str | os.PathLike,
              metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, atomically; equal tensors give equal bytes,
    whatever their order in the dict.

    Views and tensors that share memory are written out in full, each under its name.
    Raises WeightsError for a tensor that has no plain bytes (meta, sparse,
    quantized) or a dtype the format lacks.
    """
    path = name_of(path)
    _refuse_big_endian(path)
    for name, tensor in tensors.items():
        _check_writable(name, tensor, path)
    # wide types first keeps every tensor aligned
    rank = {dtype: -i for i, dtype in enumerate(DTYPES.values())}
    names = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        info = {"dtype": NAME_OF_DTYPE[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = {**info, "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in names:
            write_bytes(file, tensors[name])


def _check_writable(name: Any, tensor: Any, path: str) -> None:
    if not isinstance(name, str) or name == "__metadata__" or not isinstance(tensor, Tensor):
        raise WeightsError(f"{path}: {shown(name)} -> {type(tensor).__name__} is not a named tensor")
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.dtype not in NAME_OF_DTYPE:
        kind = "on the meta device" if tensor.is_meta else f"{tensor.layout} of {tensor.dtype}"
        raise WeightsError(f"{path}: tensor {shown(name)} cannot be written: it is {kind}")


def write_bytes(file: BinaryIO, tensor: Tensor) -> None:
    """A tensor's numbers, row after row."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    count = tensor.numel() * tensor.element_size()
    if count:
        file.write(memoryview((ctypes.c_char * count).from_address(tensor.data_ptr())))


def _refuse_big_endian(path: str) -> None:
    if sys.byteorder != "little":
        raise WeightsError(f"{path}: safetensors files are little-endian, this machine is "
                           f"{sys.byteorder}-endian")


# ---------------------------------------------------------------------------------------------------- pickles


def load_pickle(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads the tensors of a .bin, .pt or .ckpt file;
    a dict under the key "state_dict" is taken as the content."""
    content = read_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    tensors = _plain_tensors(content, name_of(path))
    check_views(tensors, os.path.getsize(path), name_of(path))
    return tensors


def check_views(tensors: dict[str, Tensor], size: int, source: str) -> None:
    """Raises WeightsError where tensors are larger than the bytes that a file of this size holds for them:
    with a stride of 0 one number stands for any count of them. Tied tensors may share what they have."""
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors.values())}
    held = min(sum(storages.values()), size)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if needed > MOST_TIED * held + SLACK:
        largest = max(tensors, key=lambda name: tensors[name].numel())
        raise WeightsError(f"{source}: its tensors would take {needed} bytes, but it holds {held} for them; "
                           f"the largest is {shown(largest, 120)} {shown(list(tensors[largest].shape), 80)}")


def _plain_tensors(content: Any, path: str) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise WeightsError(f"{path}: {shown(name)} is a {type(tensor).__name__}, not a dense tensor")
        if tensor.is_meta:
            raise WeightsError(f"{path}: tensor {shown(name)} has no data")
    return {name: tensor.detach() for name, tensor in content.items()}


# ---------------------------------------------------------------------------------------------------- folders


def load_folder(
    folder: str | os.PathLike, stem: str, variant: str | None = None, dtype: torch.dtype | None = None,
    numbers: int = 0
) -> dict[str, Tensor]:
    """Reads the weights of a model folder: index of shards, else one safetensors file, else one pickle.

    stem: "diffusion_pytorch_model" (diffusers) or "model" (transformers, whose pickles say "pytorch_model").
    variant: e.g. "fp16", read from `<stem>.fp16.safetensors` and `<stem>.safetensors.index.fp16.json`.
    dtype: what floating-point tensors are cast to.
    numbers: how many the model has that is to be filled; smaller files are refused before they are read.
    """
    folder = name_of(folder)
    need_folder(folder)
    pickle_stem = _pickle_stem(stem)
    dot = f".{variant}" if variant else ""
    indices = [f"{s}.{kind}.index{dot}.json" for s, kind in ((stem, "safetensors"), (pickle_stem, "bin"))]
    single = [f"{stem}{dot}.safetensors", f"{pickle_stem}{dot}.bin"]
    older = [f"{stem}.safetensors{dot}.index.json"] if variant else []
    for name in [indices[0], *older, single[0], indices[1], single[1]]:
        path = os.path.join(folder, name)
        if os.path.lexists(path):
            if name.endswith(".json"):
                return _load_shards(folder, name, dtype, numbers)
            _refuse_small(folder, [name], numbers)
            return _load_any(path, dtype)
    tried = ", ".join([*indices[:1], *single])
    raise MissingWeights(f"Error no file named {single[1]} found in directory {folder} (looked for {tried})")


def _load_any(path: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        return load_file(path, dtype=dtype)
    tensors = load_pickle(path)
    for name, tensor in tensors.items():  # one at a time, so that memory never holds two whole copies
        tensors[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    return tensors


def _refuse_small(folder: str, files: Iterable[str], numbers: int) -> None:
    """Raises WeightsError where files are too small for a model: every number takes a byte at least."""
    paths = [os.path.join(folder, file) for file in files]
    held = sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
    if numbers > held + SLACK:
        raise WeightsError(f"{folder}: config.json asks for {numbers} numbers, but {listed(list(files))} "
                           f"{'has' if len(paths) == 1 else 'have'} {held} bytes")


def _load_shards(folder: str, index: str, dtype: torch.dtype | None, numbers: int) -> dict[str, Tensor]:
    """All shards that an index names. They must lie in the folder itself and hold exactly what the index
    says."""
    path = os.path.join(folder, index)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{path}: weight_map is missing")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", file, re.ASCII):
            raise WeightsError(f"{path}: weight_map[{shown(tensor)}] = {shown(file)} is not a weight file "
                               "in this folder")
    state_dict: dict[str, Tensor] = {}
    files = list(dict.fromkeys(weight_map.values()))
    _refuse_small(folder, files, numbers)
    for file in files:
        shard = _load_any(os.path.join(folder, file), dtype)
        for tensor in shard:
            if weight_map.get(tensor) != file:
                raise WeightsError(f"{path}: {file} holds {shown(tensor)}, which the index does not place "
                                   "there")
        state_dict.update(shard)
    if missing := [tensor for tensor in weight_map if tensor not in state_dict]:
        raise WeightsError(f"{path}: the shards lack {listed(missing)}")
    return state_dict


def _save_shards(state_dict: dict[str, Tensor], folder: str, stem: str, variant: str | None,
                 max_shard_size: int, kind: str) -> None:
    """One file, or shards and their index, of a kind (safetensors or bin); then what an earlier save of
    another size or kind left is removed, since a reader would find it first."""
    dot = f".{variant}" if variant else ""
    stems = {"safetensors": stem, "bin": _pickle_stem(stem)}
    name, index = stems[kind] + dot, f"{stems[kind]}.{kind}.index{dot}.json"
    shards = _split(state_dict, max_shard_size)
    files = [f"{name}-{i + 1:05d}-of-{len(shards):05d}.{kind}" for i in range(len(shards))]
    if len(shards) == 1:
        files = [f"{name}.{kind}"]
    for file, names in zip(files, shards):
        _save_weights({name: state_dict[name] for name in names}, os.path.join(folder, file))
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in state_dict.values())
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        write_json(os.path.join(folder, index), {"metadata": {"total_size": total}, "weight_map": weight_map})
    keep = {*files, index} if len(shards) > 1 else set(files)
    stale = re.compile("|".join(rf"{re.escape(s + dot)}(-\d{{5}}-of-\d{{5}})?\.{k}"
                                rf"|{re.escape(f'{s}.{k}.index{dot}.json')}" for k, s in stems.items()))
    for name in os.listdir(folder):
        if stale.fullmatch(name) and name not in keep:
            os.unlink(os.path.join(folder, name))


def _save_weights(tensors: dict[str, Tensor], path: str) -> None:
    if path.endswith(".safetensors"):
        save_file(tensors, path, {"format": "pt"})
        return
    with atomic_write(path) as file:
        torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, file)


def _pickle_stem(stem: str) -> str:
    """transformers' pickles are called pytorch_model."""
    return "pytorch_model" if stem == "model" else stem


def _split(state_dict: dict[str, Tensor], max_shard_size: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would pass the size;
    a larger tensor gets a shard of its own."""
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name, tensor in state_dict.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    return shards


# ----------------------------------------------------------------------------------------------------- models


def load_strict(model: nn.Module, state_dict: dict[str, Tensor], source: str,
                ignore: Iterable[str] = ()) -> None:
    """Gives a model its tensors, all or none: one WeightsError lists missing,
    unexpected and mis-shaped tensors.

    ignore: names, or last parts of names, that a file may hold without use, e.g. "position_ids".
    A model on the meta device takes the tensors themselves, cast to its dtypes; another model copies them.
    """
    ignore = tuple(ignore)
    wanted = model.state_dict()
    unused = [name for name in state_dict if name not in wanted]
    unexpected = [name for name in unused if not any(name == i or name.endswith("." + i) for i in ignore)]
    missing = [name for name in wanted if name not in state_dict]
    shapes = [
        f"{name} {list(state_dict[name].shape)} for {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if problems := [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]:
        raise WeightsError(f"{source}: tensors do not fit {type(model).__name__}: {'; '.join(problems)}")
    taken = {name: state_dict[name].to(tensor.dtype) for name, tensor in wanted.items()}
    if any(tensor.is_meta for tensor in wanted.values()):
        _assign(model, taken)
        _refuse_meta(model, taken, source)
    else:
        model.load_state_dict(taken)


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """load_state_dict(assign=True) without its hooks and checks,
    which cost a third of the time to load a folder."""
    for path, module in model.named_modules():
        path = path + "." if path else ""
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = nn.Parameter(tensors[path + name], requires_grad=old.requires_grad)
        for name in module._buffers:
            if path + name in tensors:
                module._buffers[name] = tensors[path + name]


FACTORIES = frozenset((torch.empty, torch.zeros, torch.ones, torch.full, torch.randn, torch.rand,
                       torch.tensor))


class _Hollow(TorchFunctionMode):
    """Makes tensors on the meta device and leaves out their first numbers.
    One mode for both: building a model is thousands of small calls, and each mode that they pass through
    costs as much as the call."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            return func(*args, **{**kwargs, "device": "meta"})
        if getattr(func, "__module__", None) == "torch.nn.init" and func.__name__.endswith("_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def skip_init() -> Iterator[None]:
    """Models built inside have shapes but no memory and no first weights: for load_strict to fill."""
    with _Hollow():
        yield


def _refuse_meta(model: nn.Module, taken: dict[str, Tensor], source: str) -> None:
    # parameters are all in the state dict
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in taken]
    if empty:
        raise WeightsError(f"{source}: {type(model).__name__} keeps tensors that no file fills: "
                           f"{listed(empty)}")


def listed(names: list[str]) -> str:
    """The first of some names, as a message lists them."""
    first = ", ".join(name if len(name) <= 120 and name.isprintable() else shown(name, 120)
                      for name in names[:ERRORS_SHOWN])
    return first + (f" and {len(names) - ERRORS_SHOWN} more" if len(names) > ERRORS_SHOWN else "")


def _misplaced(folder: str, values: dict[str, Any], wanted: str, error: ConfigError) -> str:
    """A ConfigError's line, which says first if `folder` is a training run's, or of another class."""
    inside = glob.glob(os.path.join(glob.escape(folder), "model", "**", "config.json"), recursive=True)
    named = class_named(values)
    if inside and named is None:
        models = [f"{os.path.dirname(path)} ({class_named(read_json(path))})" for path in sorted(inside)]
        return f"{folder}: the folder of a run, no {wanted}; the models in it: {', '.join(models)}"
    if named in (None, wanted):
        return str(error)
    return f"{folder}: the folder of a {named}; as a {wanted}: {error}"


def class_named(values: dict[str, Any]) -> str | None:
    """The class that a config.json names, as transformers or as diffusers does."""
    listed = values.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else values.get("_class_name")
    return shown(name)[1:-1] if isinstance(name, str) else None


class ModelFolder(LeftOut):
    """Mixin for nn.Modules that live in a folder: `config.json` beside the weights, as upstream writes it.

    A subclass sets `config_class`, takes a config as its constructor's first argument,
    and keeps it as `self.config`.
    Constructors may hold no buffer outside the state dict: models are built on the meta device before
    loading.
    """

    config_class: ClassVar[type[Config]]
    weights_stem: ClassVar[str] = "diffusion_pytorch_model"
    ignored_keys: ClassVar[tuple[str, ...]] = ()

    config: Config
    parameters: Callable
    state_dict: Callable

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        subfolder: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        **habits: Any,
    ):
        """Reads a model from a local folder; returns it in eval mode, on the CPU.

        dtype: e.g. torch.float16 or "float16"; torch_dtype is its older name. None gives float32 whatever
        the file holds, as diffusers does.
        habits: upstream's other options, which do nothing here or raise; see habits.py.
        Raises WeightsError, or ConfigError from the config;
        never returns a model with a tensor left unfilled.
        """
        settle(f"{cls.__name__}.from_pretrained", habits, LOADING_IDLE, LOADING_REFUSED)
        dtype = _dtype(torch_dtype if dtype is None else dtype)
        folder = os.path.join(name_of(folder), subfolder) if subfolder else name_of(folder)
        source = os.path.join(folder, "config.json")
        values = read_json(source)
        try:
            config = cls.config_from_folder(values, source)
        except ConfigError as error:
            raise ConfigError(_misplaced(folder, values, cls.__name__, error)) from None
        with skip_init():
            model = cls(config)
            model = model if model.dtype == dtype else model.to(dtype)
        tensors = load_folder(folder, cls.weights_stem, variant, dtype, model.num_parameters())
        state_dict = model.convert_keys(tensors)
        load_strict(model, state_dict, folder, cls.ignored_keys)
        return model.eval()

    @classmethod
    def from_config(cls, config: Config | dict[str, Any]):
        """A model with fresh random weights from a config, or from the dict of a config.json.
        Raises ConfigError for one of over 100 billion parameters."""
        config = config if isinstance(config, Config) else cls.config_from_folder(dict(config), "config")
        with skip_init():
            numbers = cls(config).num_parameters()
        if numbers > MOST_NUMBERS:
            raise ConfigError(f"{cls.__name__}: the config asks for {numbers} parameters, more than "
                              f"{MOST_NUMBERS}")
        return cls(config)

    @classmethod
    def config_from_folder(cls, values: dict[str, Any], source: str) -> Config:
        """Hook: what config.json says, as a config."""
        return cls.config_class.from_dict(values, source)

    def convert_keys(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Hook: names of older generations to this model's."""
        return state_dict

    def export_config(self) -> dict[str, Any]:
        """Hook: what save_pretrained writes to config.json."""
        return {"_class_name": type(self).__name__, "_diffusers_version": "0.30.0", **self.config.to_dict()}

    def save_pretrained(
        self, folder: str | os.PathLike, variant: str | None = None,
        max_shard_size: int | str = 10 * 10**9, safe_serialization: bool = True, **habits: Any
    ) -> None:
        """Writes config.json and the weights, in files of at most `max_shard_size` bytes (or "5GB").
        Upstream reads the folder. safe_serialization=False writes pickles, for old readers."""
        settle(f"{type(self).__name__}.save_pretrained", habits, SAVING_IDLE, SAVING_REFUSED)
        folder, max_shard_size = name_of(folder), _bytes(max_shard_size)
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise WeightsError(f"{folder}: cannot be made: {error.strerror or error}") from None
        write_json(os.path.join(folder, "config.json"), self.export_config())
        kind = "safetensors" if safe_serialization else "bin"
        _save_shards(self.state_dict(), folder, self.weights_stem, variant, max_shard_size, kind)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the parameters hold, those of nn.Embedding tables or not; buffers do not count."""
        tables = {m.weight for m in self.modules() if isinstance(m, nn.Embedding) and exclude_embeddings}
        return sum(p.numel() for p in self.parameters()
                   if (p.requires_grad or not only_trainable) and p not in tables)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def dtype(self) -> torch.dtype:
        """That of the first floating-point parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Where the first parameter is; the CPU for a model without any."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))


def _bytes(size: int | str) -> int:
    """"5GB", "200MiB" or a number, as a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", str(size).upper())
    if match is None:
        raise ValueError(f"max_shard_size = {size!r} is no number of bytes, nor like '5GB'")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))


def _dtype(chosen: torch.dtype | str | None) -> torch.dtype:
    dtype = getattr(torch, chosen.removeprefix("torch."), None) if isinstance(chosen, str) else chosen
    dtype = torch.float32 if chosen is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise WeightsError(f"torch_dtype = {shown(chosen)} is not a floating-point dtype such as "
                           "torch.float16")
    return dtype
