"""weights.py: what it writes it reads; what is broken or hostile gives one WeightsError and nothing else."""

import json
import os
import pickle
import random
import struct
import time
import tracemalloc
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from miniclip import (
    BertTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    SimpleCLIPConfig,
    SimpleCLIPModel,
    files,
    weights,
)
from miniclip.config import Config, ConfigError
from miniclip.weights import ModelFolder, WeightsError, load_file, load_folder, load_pickle, save_file
from minidiff import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel

torch.set_num_threads(1)


def raw_file(path, header, data=b"", length=None):
    """A safetensors file with any header: a dict, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def overwrite(path, content):
    """New content in place: to open a file with "wb" ten thousand times costs ten thousand flushes on
    ext4."""
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate()


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **extra):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **extra}


def refused(call, *words):
    """The call raises WeightsError, in one short line that holds the words."""
    with pytest.raises(WeightsError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1200
    for word in words:
        assert str(word) in message, message
    return message


# ------------------------------------------------------------------------------------------------ round trips


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.rand(3, 5, generator=generator) * 4).to(dtype) for name, dtype in weights.DTYPES.items()
    }
    base = torch.arange(24.0).view(4, 6)
    views = {"transposed": base.T, "strided": base[:, ::2], "shared": base,
             "expanded": torch.ones(1).expand(7)}
    return {**tensors, **views, "empty": torch.empty(0, 4), "scalar": torch.tensor(3.0),
            "漢字": torch.ones(1)}


@pytest.mark.parametrize("mmap", [True, False])
def test_round_trip_of_every_dtype_and_layout(tmp_path, mmap):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "note": "春"})
    loaded = load_file(tmp_path / "a.safetensors", mmap=mmap)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].view(-1).view(torch.uint8),
                           tensor.contiguous().view(-1).view(torch.uint8))


def test_bytes_do_not_depend_on_the_order_of_the_dict(tmp_path):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(dict(reversed(tensors.items())), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_mapped_tensors_can_be_written_without_touching_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(4)}, path)
    before = path.read_bytes()
    loaded = load_file(path, mmap=True)["x"]
    loaded += 1
    assert loaded.tolist() == [1] * 4 and path.read_bytes() == before
    save_file({"x": loaded}, path)  # over the file that is mapped
    assert load_file(path)["x"].tolist() == [1] * 4


def test_unaligned_data_is_read(tmp_path):
    data = struct.pack("<ff", 1.5, -2.0)
    header = json.dumps({"x": entry()}).encode()
    for pad in range(8):
        path = raw_file(tmp_path / "x.safetensors", header + b" " * pad, data)
        x = load_file(path, mmap=True)["x"]
        assert x.tolist() == [1.5, -2.0] and x.data_ptr() % 4 == 0


@pytest.mark.parametrize("mmap", [True, False])
def test_cast_while_reading(tmp_path, mmap):
    tensors = some_tensors()
    save_file(tensors, tmp_path / "a.safetensors")
    for name, tensor in load_file(tmp_path / "a.safetensors", mmap=mmap, dtype=torch.float64).items():
        floating = tensors[name].is_floating_point()
        assert tensor.dtype == (torch.float64 if floating else tensors[name].dtype)
        assert torch.equal(tensor, tensors[name].double() if floating else tensors[name])


def test_plain_read_where_mapping_fails(tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise OSError("no mapping here")

    save_file({"x": torch.arange(3)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(weights.mmap_module, "mmap", failing)
    assert load_file(tmp_path / "x.safetensors", mmap=True)["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "tensor", [torch.empty(2, device="meta"), torch.eye(2).to_sparse(),
               torch.zeros(1, dtype=torch.complex128), 3.0]
)
def test_what_has_no_plain_bytes_is_not_written(tmp_path, tensor):
    refused(lambda: save_file({"odd": tensor}, tmp_path / "x.safetensors"), "odd")
    assert not os.listdir(tmp_path)


def test_big_endian_machines_are_refused(tmp_path, monkeypatch):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(weights.sys, "byteorder", "big")
    refused(lambda: load_file(tmp_path / "x.safetensors"), "little-endian")


# --------------------------------------------------------------------------------------- atomic writing, JSON


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.json"
    weights.write_json(path, {"春": 1})
    with pytest.raises(KeyboardInterrupt), weights.atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert weights.read_json(path) == {"春": 1} and os.listdir(tmp_path) == ["a.json"]
    assert "春" in path.read_text(encoding="utf-8")


def test_writing_into_a_missing_folder_or_over_a_folder(tmp_path):
    refused(lambda: weights.write_json(tmp_path / "none" / "a.json", {}), "none")
    (tmp_path / "folder").mkdir()
    refused(lambda: weights.write_json(tmp_path / "folder", {}), "folder")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' appears twice"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[1]", "object"),
        (b"", "not JSON"),
        (b"<<<<<<< HEAD\n{}", "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1", "not JSON"),
        (b"[" * 100_000, "deeply"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "deeply"),
        (b'{"a": ' + b"9" * 1_000_000 + b"}", "too large"),
        (b'{"a": [' + b"1," * 2_100_000 + b"1]}", "elements"),
    ],
)
def test_broken_json(tmp_path, text, word):
    (tmp_path / "config.json").write_bytes(text)
    refused(lambda: weights.read_json(tmp_path / "config.json"), "config.json", word)


def test_brackets_in_texts_nest_nothing(tmp_path):
    value = {"[" * 100: ["{" * 100 + '"\\' * 5, "\\", "]" * 3, {"a": [[1], []]}]}
    weights.write_json(tmp_path / "a.json", value)
    assert weights.read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("text", [
    b"{" + b",".join(b'"%d":1' % (i // 2) for i in range(600_000)) + b"}",      # 300,000 keys twice
    b"[" * 2_000_000, b"[}" * 1_000_000, b'{"a":0.' + b"9" * 10_000_000 + b"}]",
])  # fmt: skip
def test_hostile_json_takes_linear_time(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    began = time.monotonic()
    message = refused(lambda: weights.read_json(tmp_path / "a.json"), "a.json")
    assert time.monotonic() - began < 10 and len(message) < 400


def test_messages_quote_a_little(tmp_path):
    name = '"' + "n" * 10**6 + '"'
    for text in (f"{{{name}: 1, {name}: 2}}", f'{{"width": {name}}}', f"{{{name}: 1}}"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json") as caught:
            Tiny.from_pretrained(tmp_path)
        assert len(str(caught.value)) < 700
    assert files.shown([[1] * 10**6])[-3:] == "..." and len(files.shown("x" * 10**6, 80)) == 80
    assert files.shown(10**6000) == "a int" and files.shown("春") == "'春'"


def test_json_that_people_have(tmp_path):
    # a BOM; DPM-Solver's -inf
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": -Infinity, "b": 1e-5, "c": null}')
    assert weights.read_json(tmp_path / "a.json") == {"a": float("-inf"), "b": 1e-5, "c": None}
    (tmp_path / "b.json").write_bytes(b" " * (files.MAX_JSON_BYTES + 1))
    refused(lambda: weights.read_json(tmp_path / "b.json"), "bytes is refused")


# ---------------------------------------------------------------------------------------- hostile safetensors

HOSTILE = {
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, "overlaps"),
    "same bytes twice": ({"a": entry(), "b": entry()}, "overlaps"),
    "hole": ({"a": entry(), "b": entry(offsets=(12, 20))}, "hole"),
    "hole in front": ({"a": entry(offsets=(4, 12))}, "hole"),
    "out of range": ({"a": entry(shape=(4,), offsets=(0, 16))}, "cut off"),
    "far out of range": ({"a": entry(dtype="U8", shape=(2**46,), offsets=(0, 2**46))}, "cut off"),
    "padding": ({"a": entry(shape=(1,), offsets=(0, 4))}, "padded"),
    "begin after end": ({"a": entry(offsets=(8, 0))}, "data_offsets"),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, "data_offsets"),
    "float offset": ({"a": entry(offsets=(0, 8.0))}, "data_offsets"),
    "one offset": ({"a": entry(offsets=(8,))}, "data_offsets"),
    "bool offset": ({"a": entry(shape=(0,), offsets=(False, False))}, "data_offsets"),
    "wrong count": ({"a": entry(shape=(3,))}, "does not take 8 bytes"),
    "absurd shape": ({"a": entry(shape=(2**62, 2**62))}, "shape"),
    "shape that wraps to 8 bytes": ({"a": entry(shape=(2**32, 2**32 + 1, 2))}, "shape"),
    "absurd shape of nothing": ({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, "shape"),
    "thousand dimensions": ({"a": entry(shape=(1,) * 1000)}, "shape"),
    "negative shape": ({"a": entry(shape=(-2, -1))}, "shape"),
    "shape is text": ({"a": {**entry(), "shape": "2"}}, "shape"),
    "unknown dtype": ({"a": entry(dtype="F7")}, "dtype 'F7'"),
    "dtype is a list": ({"a": entry(dtype=["F32"])}, "dtype"),
    "extra field": ({"a": entry(evil=1)}, "expected dtype, shape and data_offsets"),
    "missing field": ({"a": {"dtype": "F32"}}, "expected dtype, shape and data_offsets"),
    "entry is a number": ({"a": 3}, "expected dtype, shape and data_offsets"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry()}, "__metadata__"),
    "metadata is a list": ({"__metadata__": [], "a": entry()}, "__metadata__"),
    "header is a list": (b"[]", "does not begin"),
    "header starts with a space": (b' {"a":{}}', "does not begin"),
    "duplicate tensor": (b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), "appears twice"),
    "not UTF-8": (b'{"a\xff\xfe": 1}', "UTF-8"),
    "not JSON": (b"{\x00\x00\x00}", "not JSON"),
    "nested without end": (b'{"a":' * 100_000, "deeply"),
    "arrays without end": (b'{"a":' + b"[" * 100_000, "deeply"),
    "number of a megabyte": (b'{"a":{"shape":[' + b"9" * 1_000_000 + b"]}}", "too large"),
    "name of a megabyte": ({"n" * 1_000_000: 3}, "expected dtype"),
    "control characters": ({"\n\x1b[2J\ud800": 3}, "expected dtype"),
    "half a surrogate pair": ({"a\ud800": entry()}, "surrogate"),
    "nested metadata": (b'{"__metadata__":{"a":' + b"[" * 900 + b"]" * 900 + b"}}", "deeply"),
    "60,000 tensors": ({f"{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(60_000)}, "50000 tensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("mmap", [True, False])
def test_hostile_header(tmp_path, case, mmap):
    header, word = HOSTILE[case]
    path = raw_file(tmp_path / "x.safetensors", header, bytes(8))
    message = refused(lambda: load_file(path, mmap=mmap), "x.safetensors")
    # the folder's name holds the word too
    assert word in message.split("x.safetensors")[1] and message.isprintable()


@pytest.mark.parametrize("length", [0, 1, 10**6, 100_000_001, 2**63, 2**64 - 1])
def test_wrong_header_length(tmp_path, length):
    path = raw_file(tmp_path / "x.safetensors", {"a": entry()}, bytes(8), length=length)
    refused(lambda: load_file(path), "x.safetensors")


def test_truncation_at_every_byte(tmp_path):
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.int64)},
              tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(lambda: load_file(path), "cut.safetensors")


def test_header_of_a_billion_tensors_costs_neither_time_nor_memory(tmp_path):
    one = b'"%09d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    many = b"{" + b"".join(one % i for i in range(600_000)) + b"}"
    path = raw_file(tmp_path / "x.safetensors", many)
    claimed = raw_file(tmp_path / "y.safetensors", b"{" + one % 0, length=60 * 10**9)
    tracemalloc.start()
    began = time.monotonic()
    refused(lambda: load_file(path), "more than 50000 tensors")
    refused(lambda: load_file(claimed), "header length 60000000000")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - began < 3 and peak < 2.5 * len(many)


def test_what_is_not_a_file(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    refused(lambda: load_file(tmp_path / "folder.safetensors"), "not a regular file")
    refused(lambda: load_file(tmp_path / "nothing.safetensors"), "nothing.safetensors", "cannot be read")
    refused(lambda: load_file(str(tmp_path) + "\0x"), "null")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for a writer, for ever
        refused(lambda: load_file(tmp_path / "pipe.safetensors"), "not a regular file")


def test_fuzzed_headers_load_or_raise_weights_error(tmp_path):
    """10,000 seeded mutations of a whole file: bytes, digits, structure.
    Nothing but WeightsError may come out."""
    rng = random.Random(20)
    good = tmp_path / "good.safetensors"
    save_file({"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16)}, good,
              {"format": "pt"})
    whole = good.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = whole[8 : 8 + length], whole[8 + length :]
    tokens = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"-1", b"1e999", b"null", b"NaN",
              b"99999999999999999999", b"\xff",
              # fmt: skip
              b"\\ud800", b'"F64"', b"[]", b"{}", b"0", b"\\", b"true", b"18446744073709551616", b"\x00"]
    path = tmp_path / "fuzz.safetensors"
    path.touch()
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(10_000):
        mutant = bytearray(header)
        for _ in range(rng.randint(1, 3)):
            at, way = rng.randrange(len(mutant) + 1), rng.randrange(5)
            if way == 0 and at < len(mutant):
                mutant[at] = rng.randrange(256)
            elif way == 1:
                mutant[at : at + rng.randrange(8)] = rng.choice(tokens)
            elif way == 2:
                del mutant[at : at + rng.randrange(1, 12)]
            elif way == 3:
                digits = [i for i, c in enumerate(mutant) if 48 <= c <= 57]
                if digits:
                    mutant[rng.choice(digits)] = rng.choice(b"0123456789")
            else:
                other = rng.randrange(len(mutant) + 1)
                mutant[at:at] = mutant[other : other + rng.randrange(60)]
        claimed = len(mutant) if rng.random() < 0.9 else rng.choice([0, len(mutant) + 1, 2**rng.randrange(64),
                                                                     length])
        overwrite(path, struct.pack("<Q", claimed) + mutant
                  + (data if rng.random() < 0.9 else data[: rng.randrange(32)]))
        try:
            load_file(path, mmap=rng.random() < 0.5)
            outcomes["loaded"] += 1
        except WeightsError:
            outcomes["refused"] += 1
    assert outcomes["loaded"] > 50 and outcomes["refused"] > 5_000  # both ways were really walked


# ---------------------------------------------------------------------------------------------------- pickles


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("ran-by-a-pickle",))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "b": Evil()}, "evil.bin", _use_new_zipfile_serialization=zipped)
    refused(lambda: load_pickle("evil.bin"), "evil.bin", "never run")
    with open("plain.bin", "wb") as file:
        pickle.dump(Evil(), file)
    refused(lambda: load_pickle("plain.bin"), "plain.bin", "never run")
    assert not os.path.exists("ran-by-a-pickle")
    pickle.loads(pickle.dumps(Evil()))  # the trap itself works
    assert os.path.exists("ran-by-a-pickle")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_tensors(tmp_path, zipped):
    tensors = {"a": torch.arange(3), "b": nn.Parameter(torch.ones(2))}
    torch.save(tensors, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "b.ckpt",
               _use_new_zipfile_serialization=zipped)
    for name in ("a.bin", "b.ckpt"):
        loaded = load_pickle(tmp_path / name)
        assert loaded["a"].tolist() == [0, 1, 2] and not loaded["b"].requires_grad


@pytest.mark.parametrize("content", [3, [torch.ones(1)], {"a": 3}, {3: torch.ones(1)},
                                     {"a": torch.eye(2).to_sparse()}])
def test_pickles_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "a.bin")
    refused(lambda: load_pickle(tmp_path / "a.bin"), "a.bin")


def test_broken_pickles(tmp_path):
    torch.save({"a": torch.arange(100.0)}, tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    for cut in (0, 1, 10, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.bin").write_bytes(whole[:cut])
        refused(lambda: load_pickle(tmp_path / "cut.bin"), "cut.bin")


def test_zip_bomb(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50 * 2**20))
    refused(lambda: load_pickle(tmp_path / "bomb.bin"), "claims to hold more")


def test_broken_archives_are_one_line(tmp_path):
    """Bytes of the directory and of the end, where zipfile raises nearly anything."""
    torch.save({"a": torch.arange(4.0)}, tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    rng, path = random.Random(0), tmp_path / "broken.bin"
    for _ in range(1000):
        broken = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(whole) * 2 // 3, len(whole))] = rng.choice((0, 1, 64, 255))
        path.write_bytes(broken)
        try:
            load_pickle(path)
        except WeightsError as error:
            assert "\n" not in str(error) and len(str(error)) < 600 and "broken.bin" in str(error)


def test_tensors_larger_than_their_file(tmp_path):
    """A stride of 0: 1.8 KB stand for 1.8 GB in half precision, and 3.6 GB when they are cast."""
    torch.save({"a": torch.ones(1, 1, dtype=torch.half).expand(30_000, 30_000)}, tmp_path / "model.bin")
    refused(lambda: load_pickle(tmp_path / "model.bin"), "'a' [30000, 30000]", "1800000000 bytes")
    table = torch.ones(5, 3)
    torch.save({"a": table, "b": table, "c": table.T, "row": torch.ones(1).expand(9)}, tmp_path / "tied.bin")
    assert load_pickle(tmp_path / "tied.bin")["c"].shape == (3, 5)


# ---------------------------------------------------------------------------------------------------- folders


@dataclass(frozen=True)
class TinyConfig(Config):
    width: int = 4
    name: str = "春"


class Tiny(ModelFolder, nn.Module):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first = nn.Linear(3, config.width)
        self.norm = nn.BatchNorm1d(config.width)  # buffers, one of them an integer
        self.second = nn.Linear(config.width, 2, bias=False)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Tiny(TinyConfig(width=5))


def equal(one, two):
    one, two = one.state_dict(), two.state_dict()
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def test_folder_round_trip(tmp_path, tiny):
    tiny.save_pretrained(tmp_path / "deep" / "folder")
    loaded = Tiny.from_pretrained(tmp_path / "deep", subfolder="folder")
    assert equal(tiny, loaded) and loaded.config == tiny.config
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
    assert sorted(os.listdir(tmp_path / "deep" / "folder")) == ["config.json",
                                                                "diffusion_pytorch_model.safetensors"]
    written = weights.read_json(tmp_path / "deep" / "folder" / "config.json")
    assert written == {"_class_name": "Tiny", "_diffusers_version": "0.30.0", "width": 5, "name": "春"}
    assert tiny.num_parameters() == 20 + 10 + 10 and str(loaded.device) == "cpu"
    tiny.second.requires_grad_(False)
    assert tiny.num_parameters(only_trainable=True) == 30


def test_dtypes(tmp_path, tiny):
    tiny.half().save_pretrained(tmp_path, variant="fp16")
    assert Tiny.from_pretrained(tmp_path, variant="fp16").dtype == torch.float32
    for dtype in (torch.float16, "float16", "torch.float16"):
        loaded = Tiny.from_pretrained(tmp_path, variant="fp16", torch_dtype=dtype)
        assert loaded.dtype == torch.float16 and loaded.norm.num_batches_tracked.dtype == torch.int64
    for wrong in (16, "int8", "fp16", torch.int8, "nn"):
        refused(lambda w=wrong: Tiny.from_pretrained(tmp_path, variant="fp16", torch_dtype=w), "torch_dtype")
    refused(lambda: Tiny.from_pretrained(tmp_path),
            "Error no file named diffusion_pytorch_model.bin found in directory")


def test_sharded_folder_and_saving_over_it(tmp_path, tiny):
    tiny.save_pretrained(tmp_path, max_shard_size=48)
    files = sorted(os.listdir(tmp_path))
    assert "diffusion_pytorch_model.safetensors.index.json" in files and len(files) > 4
    assert equal(tiny, Tiny.from_pretrained(tmp_path))
    torch.manual_seed(1)
    other = Tiny(TinyConfig(width=5))
    other.save_pretrained(tmp_path)  # the old index would win over the new file
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert equal(other, Tiny.from_pretrained(tmp_path)) and not equal(other, tiny)
    tiny.save_pretrained(tmp_path, max_shard_size=48)
    assert "diffusion_pytorch_model.safetensors" not in os.listdir(tmp_path)
    assert equal(tiny, Tiny.from_pretrained(tmp_path))


def test_variants_live_side_by_side(tmp_path, tiny):
    tiny.save_pretrained(tmp_path, max_shard_size=48)
    torch.manual_seed(1)
    other = Tiny(TinyConfig(width=5))
    other.save_pretrained(tmp_path, variant="ema", max_shard_size=48)
    index = "diffusion_pytorch_model.safetensors.index.ema.json"
    assert equal(tiny, Tiny.from_pretrained(tmp_path))
    assert equal(other, Tiny.from_pretrained(tmp_path, variant="ema"))
    # the older name
    os.rename(tmp_path / index, tmp_path / "diffusion_pytorch_model.safetensors.ema.index.json")
    assert equal(other, Tiny.from_pretrained(tmp_path, variant="ema"))


@pytest.mark.parametrize(("stem", "file"), [("diffusion_pytorch_model",) * 2, ("model", "pytorch_model")])
def test_order_of_resolution(tmp_path, stem, file):
    torch.save({"a": torch.tensor(1)}, tmp_path / f"{file}.bin")
    assert load_folder(tmp_path, stem)["a"] == 1
    save_file({"a": torch.tensor(2)}, tmp_path / f"{stem}.safetensors")
    assert load_folder(tmp_path, stem)["a"] == 2
    save_file({"a": torch.tensor(3)}, tmp_path / "shard.safetensors")
    weights.write_json(tmp_path / f"{stem}.safetensors.index.json",
                       {"weight_map": {"a": "shard.safetensors"}})
    assert load_folder(tmp_path, stem)["a"] == 3


@pytest.mark.parametrize(
    "file",
    ["../../etc/passwd", "../secret.safetensors", "/etc/passwd", "..\\secret.safetensors",
     "C:secret.safetensors",
     ".", "", "sub/secret.safetensors", "config.json", 3, None, ["a.safetensors"], "a\0.safetensors"],
)  # fmt: skip
def test_index_that_leaves_its_folder(tmp_path, file):
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    weights.write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": file}})
    refused(lambda: load_folder(folder, "model"), "index.json", "'a'")


def test_index_that_lies(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "s.safetensors")
    weights.write_json(index, {"weight_map": {"a": "s.safetensors"}})
    refused(lambda: load_folder(tmp_path, "model"), "'b'", "does not place")
    weights.write_json(index, {"weight_map": {n: "s.safetensors" for n in "abc"}})
    refused(lambda: load_folder(tmp_path, "model"), "lack c")
    weights.write_json(index, {"weight_map": {"a": "gone.safetensors"}})
    refused(lambda: load_folder(tmp_path, "model"), "gone.safetensors")
    for wrong in ({}, {"weight_map": []}, {"weight_map": None}):
        weights.write_json(index, wrong)
        refused(lambda: load_folder(tmp_path, "model"), "weight_map")


def test_a_config_asks_for_more_than_the_files_hold(tmp_path, tiny):
    """Known before anything is read: here the file is not even one of tensors."""
    tiny.save_pretrained(tmp_path)
    weights.write_json(tmp_path / "config.json", {"width": 10**7})
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    refused(lambda: Tiny.from_pretrained(tmp_path), "asks for 80000000 numbers", "safetensors has 7 bytes")
    weights.write_json(tmp_path / "diffusion_pytorch_model.safetensors.index.json",
                       {"weight_map": {"a": "gone.safetensors", "b": "diffusion_pytorch_model.safetensors"}})
    refused(lambda: Tiny.from_pretrained(tmp_path), "asks for 80000000 numbers", "have 7 bytes")
    with pytest.raises(ConfigError, match="asks for 240000000000 parameters"):
        Tiny.from_config({"width": 3 * 10**10})


def test_a_folder_of_another_model_says_whose_it_is(tmp_path):
    """A run of train.train_clip: config.json beside model/ holds the run's flags, not a model's config."""
    weights.write_json(tmp_path / "config.json", {"data": "data/herbs", "steps": 150})
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
            "vocab_size": 9}
    config = SimpleCLIPConfig(text_config=text, image_layers=(1, 1, 1, 1), image_width=4, projection_dim=8)
    SimpleCLIPModel(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="the folder of a run") as caught:
        CLIPModel.from_pretrained(tmp_path)
    assert f"{tmp_path / 'model'} (SimpleCLIPModel)" in str(caught.value)
    with pytest.raises(ConfigError, match="model: the folder of a SimpleCLIPModel; as a CLIPModel: "):
        CLIPModel.from_pretrained(tmp_path / "model")
    assert SimpleCLIPModel.from_pretrained(tmp_path / "model").config == config


def test_folders_that_are_not_there(tmp_path):
    refused(lambda: Tiny.from_pretrained(tmp_path / "none"), "none", "no such folder")
    for kind in (Tiny, UNet2DConditionModel, AutoencoderKL, StableDiffusionPipeline, DDPMScheduler, CLIPModel,
                 CLIPTokenizer, BertTokenizer, CLIPImageProcessor):
        refused(lambda: kind.from_pretrained("openai/clip"),  # noqa: B023
                "openai/clip: no such folder", "local folders only", "nothing is ever downloaded")
    (tmp_path / "file").touch()
    refused(lambda: Tiny.from_pretrained(tmp_path / "file"), "a file, not a folder")
    refused(lambda: Tiny.from_pretrained(tmp_path), "config.json")
    weights.write_json(tmp_path / "config.json", {"width": 4})
    refused(lambda: Tiny.from_pretrained(tmp_path),
            "Error no file named diffusion_pytorch_model.bin found in directory")
    (tmp_path / "diffusion_pytorch_model.safetensors").mkdir()
    refused(lambda: Tiny.from_pretrained(tmp_path), "not a regular file")


# --------------------------------------------------------------------------------------------- strict loading


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_one_error_lists_everything(tiny, device):
    state = tiny.state_dict()
    state["extra.weight"] = state.pop("first.bias")
    state["second.weight"] = torch.zeros(2, 7)
    with torch.device(device):
        model = Tiny(TinyConfig(width=5))
    before = [p.clone() for p in model.parameters()]
    names = list(state)
    refused(
        lambda: weights.load_strict(model, state, "here"),
        "here", "1 missing: first.bias", "1 unexpected: extra.weight",
        "1 of another shape: second.weight [2, 7] for [2, 5]",
    )  # fmt: skip
    assert list(state) == names
    if device == "cpu":  # nothing was taken
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_error_lists_are_bounded(tiny):
    message = refused(lambda: weights.load_strict(tiny, {f"x{i}\n" * 99: torch.ones(1) for i in range(1000)},
                                                  "here"))
    assert "and 995 more" in message


def test_ignored_names(tiny):
    state = {**tiny.state_dict(), "a.position_ids": torch.ones(1), "position_ids": torch.ones(1)}
    weights.load_strict(tiny, state, "here", ignore=("position_ids",))
    refused(lambda: weights.load_strict(tiny, {**state, "my_position_ids": torch.ones(1)}, "x",
                                        ["position_ids"]), "my_")


def test_no_tensor_is_left_on_meta(tmp_path, tiny):
    class Leaky(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("table", torch.zeros(3), persistent=False)

    tiny.save_pretrained(tmp_path)
    refused(lambda: Leaky.from_pretrained(tmp_path), "table")
    for tensor in Tiny.from_pretrained(tmp_path).state_dict().values():
        assert not tensor.is_meta


def test_unknown_config_field_is_named(tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    weights.write_json(tmp_path / "config.json", {"width": 5, "depth": 3})
    with pytest.raises(ValueError, match="config.json.*'depth'"):
        Tiny.from_pretrained(tmp_path)


def test_from_config():
    assert Tiny.from_config({"width": 6, "_class_name": "X"}).first.out_features == 6
    assert Tiny.from_config(TinyConfig(width=7)).first.out_features == 7
