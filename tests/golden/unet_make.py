"""Writes unet_keys.json, the keys and shapes of real UNets,
from diffusers: python -m tests.golden.unet_make"""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch

from miniclip.weights import write_json
from tests.parity.test_unet import FULL


def main() -> None:
    tables = {}
    for name, (count, config) in FULL.items():
        with torch.device("meta"):
            model = diffusers.UNet2DConditionModel(**config)
        keys = {key: list(value.shape) for key, value in model.state_dict().items()}
        tables[name] = {"config": config, "parameters": count, "keys": "\n".join(
            f"{key} {'x'.join(map(str, shape))}" for key, shape in keys.items())}
    write_json(Path(__file__).parent / "unet_keys.json", tables)


if __name__ == "__main__":
    main()
