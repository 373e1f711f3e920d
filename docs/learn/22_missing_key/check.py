"""By load_strict; then every value against the tower that the weights came from."""

import torch
from compare import same

from miniclip import CLIPVisionConfig, CLIPVisionModel
from miniclip.files import WeightsError
from miniclip.weights import load_strict


def check(answer) -> None:
    """A tiny tower, its weights spoilt in three ways."""
    config = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                              image_size=8, patch_size=4)
    wanted = {name: torch.randn_like(tensor) for name, tensor in CLIPVisionModel(config).state_dict().items()}
    spoilt = {name.replace("layrnorm", "layernorm"): tensor.clone() for name, tensor in wanted.items()}
    table = "vision_model.embeddings.position_embedding.weight"
    spoilt[table] = spoilt[table][None]
    spoilt["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    model = CLIPVisionModel(config)
    mended = answer.mend(spoilt)
    assert isinstance(mended, dict), f"mend returns a {type(mended).__name__}, not a dict"
    try:
        load_strict(model, mended, "the checkpoint")
    except WeightsError as error:
        raise AssertionError(str(error)) from None
    for name, tensor in model.state_dict().items():
        same(tensor, wanted[name], name, 0.0)
