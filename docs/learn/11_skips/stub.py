"""Which channel counts meet on the way up? docs/learn/11_skips/page.md"""


def widths_in(channels: tuple[int, ...], n: int) -> list[int]:
    """Channels that each resnet on the way up reads. channels: from the top down; n: layers_per_block."""
    raise NotImplementedError
