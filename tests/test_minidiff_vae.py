"""AutoencoderKL without upstream: shapes, keys, tiles, the Gaussian, folders, errors."""

import pytest
import torch

from miniclip.config import ConfigError
from miniclip.weights import WeightsError, load_file, save_file
from minidiff.vae import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussianDistribution, blend

torch.set_num_threads(1)

SMALL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(**SMALL).eval()


def test_shapes(vae):
    x = torch.rand(2, 3, 16, 24)
    latents = vae.encode(x).latent_dist
    assert latents.mean.shape == latents.sample().shape == latents.mode().shape == (2, 4, 8, 12)
    assert latents.kl().shape == latents.nll(latents.mean).shape == (2,)
    out = vae.decode(latents.mode())
    assert out.sample.shape == x.shape and out[0] is out["sample"] is out.sample
    assert vae(x).sample.shape == x.shape
    assert vae.encode(torch.rand(1, 3, 33, 17)).latent_dist.mean.shape == (1, 4, 16, 8)  # rounded down
    assert torch.equal(vae.decode(latents.mode(), return_dict=False)[0], out.sample)


def test_stable_diffusions_size():
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    keys = list(vae.state_dict())
    assert vae.num_parameters() == 83_653_863 and len(keys) == 248
    assert keys[0] == "encoder.conv_in.weight" and keys[-1] == "post_quant_conv.bias"
    assert vae.state_dict()["decoder.mid_block.attentions.0.to_out.0.weight"].shape == (512, 512)


def test_the_gaussian():
    parameters = torch.zeros(1, 2, 1, 1)
    parameters[0, 0], parameters[0, 1] = 3.0, torch.log(torch.tensor(4.0))
    gaussian = DiagonalGaussianDistribution(parameters)
    assert gaussian.mean.item() == 3 and gaussian.std.item() == pytest.approx(2)
    assert gaussian.kl().item() == pytest.approx(0.5 * (9 + 4 - 1 - 1.3862944))
    assert gaussian.kl(gaussian).item() == 0
    normal = torch.distributions.Normal(3.0, 2.0)
    assert gaussian.nll(torch.ones(1, 1, 1,
                                   1)).item() == pytest.approx(-normal.log_prob(torch.tensor(1.0)).item())
    wild = DiagonalGaussianDistribution(torch.tensor([0.0, 1e4]).view(1, 2, 1, 1))
    assert torch.isfinite(wild.std).all() and wild.logvar.item() == 20


def test_samples_follow_the_generator(vae):
    latents = vae.encode(torch.rand(1, 3, 16, 16)).latent_dist
    a, b = (latents.sample(torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(a, b) and not torch.equal(a, latents.sample(torch.Generator().manual_seed(2)))


def test_slicing_changes_nothing(vae):
    x = torch.rand(3, 3, 16, 16)
    whole = vae.encode(x).latent_dist.mean
    vae.enable_slicing()
    assert torch.allclose(vae.encode(x).latent_dist.mean, whole, atol=1e-6)


def test_tiles(vae):
    x = torch.rand(1, 3, 40, 56)
    plain = vae.encode(x).latent_dist.mean
    vae.enable_tiling()
    tiled = vae.encode(x).latent_dist.mean
    assert tiled.shape == plain.shape and not torch.equal(tiled, plain)
    small = torch.rand(1, 3, 16, 16)
    inside = vae.encode(small).latent_dist.mean  # no larger than a tile: not tiled
    vae.disable_tiling()
    assert torch.equal(vae.encode(small).latent_dist.mean, inside)
    assert torch.equal(vae.encode(x).latent_dist.mean, plain)


def test_tiles_of_a_local_model_are_seamless(vae):
    """Were the decoder only a doubling of size, tiles would change nothing, whatever the picture's size."""
    vae.enable_tiling()
    for size in ((20, 33), (8, 9), (50, 7)):
        z = torch.rand(1, 4, *size)
        doubled = vae._tiled(lambda t: t.repeat_interleave(2, -1).repeat_interleave(2, -2), z, 8, 16)
        assert torch.allclose(doubled, z.repeat_interleave(2, -1).repeat_interleave(2, -2), atol=1e-6)


def test_blend():
    before, tile = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    faded = blend(before, tile, 2, dim=-1)
    assert faded[0, 0, 0].tolist() == [0.0, 0.5, 1.0, 1.0] and tile.min() == 1
    assert blend(before, tile, 2, dim=-2)[0, 0, :, 0].tolist() == [0.0, 0.5, 1.0, 1.0]


def test_gradient_checkpointing_changes_nothing(vae):
    x = torch.rand(1, 3, 16, 16)
    gradients = []
    for checkpointing in (False, True):
        vae.enable_gradient_checkpointing(checkpointing)
        assert vae.is_gradient_checkpointing == checkpointing
        loss = vae(x).sample.square().mean()
        gradients.append(torch.autograd.grad(loss, vae.encoder.conv_in.weight)[0])
    assert torch.allclose(*gradients)


def test_folder_round_trip_and_legacy_names(tmp_path, vae):
    vae.save_pretrained(tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path)
    assert again.config == vae.config and not again.training
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for k, v in state.items()}
    save_file(state, path)
    old = AutoencoderKL.from_pretrained(tmp_path)
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) and torch.equal(tensor, old.state_dict()[name])
    state.pop("decoder.conv_in.bias")
    save_file(state, path)
    with pytest.raises(WeightsError, match="1 missing: decoder.conv_in.bias"):
        AutoencoderKL.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"norm_num_groups": 3}, "norm_num_groups = 3 does not divide 8"),
        ({"block_out_channels": (8,)}, "down_block_types"),
        ({"up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")}, "AttnUpDecoderBlock2D"),
        ({"latent_channels": 0}, "latent_channels = 0"),
        ({"act_fn": "tanh"}, "act_fn"),
        ({"depth": 3}, "unknown field 'depth'"),
    ],
)
def test_configs_that_are_refused(changes, word):
    with pytest.raises(ConfigError, match=word.replace("(", r"\(")):
        AutoencoderKL(**{**SMALL, **changes})


def test_inputs_that_are_refused(vae):
    with pytest.raises(ValueError, match=r"\[1, 4, 8, 8\]"):
        vae.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="latents"):
        vae.decode(torch.zeros(4, 8, 8))


def test_config_defaults_are_upstreams():
    config = AutoencoderKLConfig()
    assert config.scaling_factor == 0.18215 and config.force_upcast and config.latent_channels == 4


@pytest.mark.parametrize("fields", [
    {"layers_per_block": 10**6}, {"layers_per_block": 0}, {"latent_channels": -4}, {"norm_num_groups": 0},
    {"block_out_channels": [0]}, {"block_out_channels": [2**40]}, {"scaling_factor": 0}, {"sample_size": -1},
    {"scaling_factor": float("nan")}, {"latents_std": [0.0]}, {"latents_mean": [1e30] * 4},
    {"down_block_types": ["DownEncoderBlock2D"] * 10**6},
])  # fmt: skip
def test_a_config_that_asks_for_too_much_or_nothing(fields):
    with pytest.raises(ConfigError) as caught:
        AutoencoderKLConfig.from_dict(fields, "config.json")
    assert len(str(caught.value)) < 500 and next(iter(fields)) in str(caught.value)
