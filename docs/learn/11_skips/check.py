"""Against UNets without memory."""

from compare import same

from miniclip.weights import skip_init
from minidiff import UNet2DConditionModel


def check(answer) -> str:
    """Stable Diffusion's channels, the demo's, and one level alone."""
    for channels, n in (((320, 640, 1280, 1280), 2), ((32, 64, 128), 1), ((32, 64, 96), 3), ((64,), 2)):
        levels = len(channels)
        with skip_init():
            unet = UNet2DConditionModel(block_out_channels=channels, layers_per_block=n,
                                        down_block_types=("DownBlock2D",) * levels,
                                        up_block_types=("UpBlock2D",) * levels)
        wanted = [resnet.conv1.in_channels for block in unet.up_blocks for resnet in block.resnets]
        found = answer.widths_in(channels, n)
        assert len(found) == len(wanted), f"{channels}, {n}: {len(found)} resnets, not {len(wanted)}"
        same(found, wanted, f"{channels}, {n}", 0.0, {"from the lowest level to the top": wanted[::-1]})
    return "the UNet of Stable Diffusion reads from 2560 channels down to 640"
