"""AutoencoderKL against diffusers': random small configurations, keys, numbers, gradients, tiles, files."""

import random

import pytest
import torch

from minidiff.vae import AutoencoderKL
from tests.parity.compare import relative_error

diffusers = pytest.importorskip("diffusers")
torch.set_num_threads(1)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def random_config(seed):
    rng = random.Random(seed)
    levels = rng.randint(1, 3)
    return {
        "in_channels": rng.choice([1, 3]),
        "out_channels": rng.choice([1, 3]),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [4 * rng.randint(1, 4) for _ in range(levels)],
        "layers_per_block": rng.randint(1, 3),
        "act_fn": rng.choice(["silu", "mish", "gelu", "relu"]),
        "latent_channels": rng.choice([1, 4, 16]),
        "norm_num_groups": rng.choice([1, 2, 4]),
        "sample_size": rng.choice([8, 16]),
        "scaling_factor": 0.13025,
        "shift_factor": rng.choice([None, 0.1]),
        "latents_mean": rng.choice([None, [0.5, 1.0]]),
        "force_upcast": rng.choice([True, False]),
        "use_quant_conv": rng.choice([True, False]),
        "use_post_quant_conv": rng.choice([True, False]),
        "mid_block_add_attention": rng.random() < 0.7,
    }


def pair(seed, dtype=torch.float64, **changes):
    """The same random model in diffusers and here."""
    config = {**random_config(seed), **changes}
    torch.manual_seed(seed)
    theirs = diffusers.AutoencoderKL(**config).to(dtype)
    for parameter in theirs.parameters():  # the initial norms are 1 and 0: they would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.3)
    ours = AutoencoderKL(**config).to(dtype)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape
                                                                  for k, v in theirs.state_dict().items()}
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    # in training upstream lays out memory differently: other rounding
    return ours.eval(), theirs.eval(), config


def difference(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return relative_error(ours, theirs)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(12))
def test_numbers(seed, dtype):
    ours, theirs, config = pair(seed, dtype)
    size = [(16, 16), (20, 12), (17, 23)][seed % 3]  # odd sizes too
    x = torch.rand(2, config["in_channels"], *size, dtype=dtype) * 2 - 1
    with torch.no_grad():
        a, b = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
        assert difference(a.parameters, b.parameters) <= TOLERANCE[dtype]
        for name in ("mean", "std", "var", "logvar"):
            assert difference(getattr(a, name), getattr(b, name)) <= 20 * TOLERANCE[dtype]
        z = [d.sample(torch.Generator().manual_seed(5)) for d in (a, b)]
        assert difference(*z) <= 20 * TOLERANCE[dtype]
        z = b.mode()
        assert difference(ours.decode(z).sample, theirs.decode(z).sample) <= TOLERANCE[dtype]


@pytest.mark.parametrize("sample_posterior", [True, False])
def test_forward_and_gradients(sample_posterior):
    ours, theirs, config = pair(3)
    x = torch.rand(2, config["in_channels"], 16, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for model in (ours, theirs):
        generator = torch.Generator().manual_seed(1)
        y = model(x, sample_posterior=sample_posterior, generator=generator).sample
        loss = y.square().mean() + model.encode(x).latent_dist.kl().mean()
        results.append((y, *torch.autograd.grad(loss, [x, *model.parameters()])))
    # some gradients vanish: a key's bias cancels in the softmax
    scale = max(b.abs().max() for b in results[1][1:])
    assert difference(results[0][0], results[1][0]) <= 1e-12
    assert all((a - b).abs().max() <= 1e-12 * scale for a, b in zip(*results))


def test_distribution():
    a, b = (torch.randn(2, 6, 3, 3, dtype=torch.float64) * 9 for _ in range(2))
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Theirs

    from minidiff.vae import DiagonalGaussianDistribution as Ours

    a[0, 3], a[0, 4] = 100, -100  # beyond both clamps
    ours, theirs = Ours(a), Theirs(a)
    z = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    assert difference(ours.kl(), theirs.kl()) <= 1e-14
    assert difference(ours.kl(Ours(b)), theirs.kl(Theirs(b))) <= 1e-14
    assert difference(ours.nll(z), theirs.nll(z)) <= 1e-14


@pytest.mark.parametrize("size", [(24, 24), (9, 40), (33, 17), (8, 8), (52, 28)])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_tiling_and_slicing(size, levels):
    ours, theirs, config = pair(
        1,
        block_out_channels=[8] * levels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        sample_size=16,
    )
    for model in (ours, theirs):
        model.enable_tiling()
        model.enable_slicing()
    x = torch.rand(2, config["in_channels"], *size, dtype=torch.float64)
    z = torch.randn(2, config["latent_channels"], size[0] // 2, size[1] // 2, dtype=torch.float64)
    with torch.no_grad():
        assert difference(ours.encode(x).latent_dist.parameters,
                          theirs.encode(x).latent_dist.parameters) <= 1e-12
        assert difference(ours.decode(z).sample, theirs.decode(z).sample) <= 1e-12
        ours.disable_tiling(), theirs.disable_tiling()
        assert difference(ours.decode(z).sample, theirs.decode(z).sample) <= 1e-12


def test_folders_both_ways(tmp_path):
    ours, theirs, _ = pair(2, torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    read_here = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    read_there = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert read_here.config == ours.config
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, read_here.state_dict()[name])
        assert torch.equal(tensor, read_there.state_dict()[name])
    for name, value in read_here.config.to_dict().items():
        assert read_there.config[name] == value


def test_legacy_attention_names(tmp_path):
    """A file of the first generation opens in both, with the same numbers."""
    ours, theirs, _ = pair(2, torch.float32, mid_block_add_attention=True)
    ours.save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        for new, legacy in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{legacy}.")
        state[name] = tensor
    assert sum("proj_attn" in name for name in state) == 4
    from miniclip.weights import save_file

    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    for model in (AutoencoderKL.from_pretrained(tmp_path), diffusers.AutoencoderKL.from_pretrained(tmp_path)):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])


def test_full_size_on_meta():
    config = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    }
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(**config), diffusers.AutoencoderKL(**config)
    assert ours.num_parameters() == theirs.num_parameters() == 83_653_863 and len(ours.state_dict()) == 248
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [(k, v.shape)
                                                                    for k, v in theirs.state_dict().items()]
