"""weights.py against the safetensors library and against folders that diffusers and transformers write."""

import random
import struct

import pytest
import torch

from miniclip import weights
from miniclip.weights import WeightsError, load_file, load_folder, save_file

safetensors = pytest.importorskip("safetensors.torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)


def tensors_of_every_dtype():
    generator = torch.Generator().manual_seed(0)
    known = [dtype for dtype in weights.DTYPES.values() if dtype in safetensors._TYPES.values()]
    tensors = {str(dtype): (torch.rand(3, 5, generator=generator) * 4).to(dtype) for dtype in known}
    return {**tensors, "empty": torch.empty(0, 4), "scalar": torch.tensor(3.0),
            "漢\n字\"": torch.ones(2, 1, 2)}


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def test_our_dtypes_are_theirs():
    assert set(safetensors._TYPES.items()) - {("F4", None)} <= set(weights.DTYPES.items())


def test_both_directions_and_the_very_bytes(tmp_path):
    tensors = tensors_of_every_dtype()
    save_file(tensors, tmp_path / "ours.safetensors", {"format": "pt"})
    safetensors.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    same(safetensors.load_file(tmp_path / "ours.safetensors"), tensors)
    same(load_file(tmp_path / "theirs.safetensors"), tensors)
    ours = load_file(tmp_path / "theirs.safetensors")
    assert list(ours) == list(safetensors.load_file(tmp_path / "ours.safetensors"))


def test_what_we_accept_the_library_accepts_and_reads_alike(tmp_path):
    rng = random.Random(3)
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16)},
              tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    path = tmp_path / "mutant.safetensors"
    path.write_bytes(whole)
    accepted = 0
    for _ in range(3000):
        mutant = bytearray(whole)
        digits = [i for i in range(8, 8 + struct.unpack("<Q", whole[:8])[0]) if chr(mutant[i]).isdigit()]
        for _ in range(rng.randint(1, 2)):
            at = rng.choice(digits) if rng.random() < 0.7 else rng.randrange(8, len(mutant))
            mutant[at] = rng.choice(b"0123456789") if rng.random() < 0.7 else rng.randrange(32, 127)
        with open(path, "r+b") as file:  # in place: opening with "wb" flushes to disk on ext4, each time
            file.write(mutant)
        try:
            ours = load_file(path)
        except WeightsError:
            continue
        accepted += 1
        same(ours, safetensors.load_file(path))
    assert accepted > 100


VAE = dict(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=4,
)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
@pytest.mark.parametrize("safe", [True, False])
def test_folders_written_by_diffusers(tmp_path, variant, max_shard_size, safe):
    theirs = diffusers.AutoencoderKL(**VAE).half()
    theirs.save_pretrained(tmp_path, variant=variant, max_shard_size=max_shard_size, safe_serialization=safe)
    assert (len(list(tmp_path.iterdir())) > 2) == (max_shard_size == "20KB")
    same(load_folder(tmp_path, "diffusion_pytorch_model", variant), theirs.state_dict())


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "10KB"])
def test_folders_written_by_transformers(tmp_path, variant, max_shard_size):
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    theirs = transformers.CLIPTextModel(config)
    theirs.save_pretrained(tmp_path, variant=variant, max_shard_size=max_shard_size)
    ours = load_folder(tmp_path, "model", variant)
    assert sorted(t.shape for t in ours.values()) == sorted(t.shape for t in theirs.state_dict().values())
    bare = {name.removeprefix("text_model."): tensor for name, tensor in theirs.state_dict().items()}
    same({name.removeprefix("text_model."): tensor for name, tensor in ours.items()}, bare)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", [10**10, 20_000])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_our_shards_open_in_diffusers(tmp_path, variant, max_shard_size, kind):
    theirs = diffusers.AutoencoderKL(**VAE)
    theirs.save_config(tmp_path)
    weights._save_shards(theirs.state_dict(), str(tmp_path), "diffusion_pytorch_model", variant,
                         max_shard_size, kind)
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path, variant=variant,
                                                    use_safetensors=kind == "safetensors")
    same(again.state_dict(), theirs.state_dict())
