"""Writes clip_keys.json and clip_outputs.json from transformers, so that tests need no transformers.

Run by hand after a change of upstream: python tests/golden/clip_make.py
clip_keys.json: key and shape of every tensor of published models, run-length packed by layer.
clip_outputs.json: what transformers computes with weights that a formula fills, to 9 digits.
"""

import json
import os
import re

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
TEXT = dict(hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=40, vocab_size=50,
            max_position_embeddings=10, eos_token_id=49, bos_token_id=48, projection_dim=16)  # fmt: skip
VISION = dict(hidden_size=20, num_attention_heads=2, num_hidden_layers=3, intermediate_size=36, image_size=12,
              patch_size=4, projection_dim=16, hidden_act="gelu")  # fmt: skip
IDS = [[48, 5, 9, 49, 49, 49], [48, 1, 2, 3, 4, 49], [48, 7, 49, 0, 0, 0]]


def text(width, layers, heads, act="quick_gelu", projection=None):
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                intermediate_size=4 * width,
                hidden_act=act, projection_dim=projection or width)  # fmt: skip


def vision(width, layers, heads, patch, act="quick_gelu"):
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                intermediate_size=4 * width,
                patch_size=patch, hidden_act=act)  # fmt: skip


PUBLISHED = {
    "openai/clip-vit-base-patch32": ("CLIPModel", text(512, 12, 8), vision(768, 12, 12, 32), 512),
    "openai/clip-vit-large-patch14": ("CLIPModel", text(768, 12, 12), vision(1024, 24, 16, 14), 768),
    "stable-diffusion-v1-5/text_encoder": ("CLIPTextModel", text(768, 12, 12), None, 768),
    "stable-diffusion-2-1/text_encoder": ("CLIPTextModel", text(1024, 23, 16, "gelu"), None, 512),
    "stable-diffusion-xl-base-1.0/text_encoder_2": (
        "CLIPTextModelWithProjection", text(1280, 32, 20, "gelu"), None, 1280),
}  # fmt: skip


def build(package, kind, text_values, vision_values, projection):
    if kind == "CLIPModel":
        return package.CLIPModel(
            package.CLIPConfig(text_config=text_values, vision_config=vision_values,
                               projection_dim=projection)
        )
    return getattr(package, kind)(package.CLIPTextConfig(**{**text_values, "projection_dim": projection}))


def packed(state_dict, prefix=""):
    """Key -> shape, the layers of a tower folded into one entry "layers.0-11.rest" if they are all alike."""
    folded = {}
    for key, tensor in state_dict.items():
        match = re.fullmatch(r"(.*layers\.)(\d+)(\..*)", prefix + key)
        name = match[1] + "*" + match[3] if match else prefix + key
        entry = folded.setdefault(name, {"shape": list(tensor.shape), "layers": 0})
        assert entry["shape"] == list(tensor.shape)
        entry["layers"] += bool(match)
    return {name: [*e["shape"], f"x{e['layers']}"] if e["layers"] else e["shape"]
            for name, e in folded.items()}


def fill(model):
    """Every tensor from a formula of its place in the sorted list of names."""
    with torch.no_grad():
        for number, (name, p) in enumerate(sorted(model.named_parameters())):
            if p.ndim:
                steps = torch.arange(p.numel(), dtype=torch.float64)
                wave = torch.sin(steps * 0.37 + number) * 0.25 + (0.8 if "norm" in name and "weight" in name
                                                                  else 0)
                p.copy_(wave.view(p.shape))
    return model.double().eval()


def pixels():
    return torch.cos(torch.arange(3 * 3 * 12 * 12, dtype=torch.float64) * 0.11).view(3, 3, 12, 12)


def outputs(model):
    out = model(input_ids=torch.tensor(IDS), pixel_values=pixels(), return_loss=True,
                output_hidden_states=True)
    text_out, vision_out = out.text_model_output, out.vision_model_output
    return {
        "loss": out.loss,
        "logits_per_image": out.logits_per_image,
        "text_embeds": out.text_embeds,
        "image_embeds": out.image_embeds,
        "text_last": text_out.last_hidden_state[:, :, 0],
        "vision_last": vision_out.last_hidden_state[:, :, 0],
        "text_hidden_1": text_out.hidden_states[1][:, :, 1],
        "vision_hidden_2": vision_out.hidden_states[2][:, :, 1],
    }


def main():
    import transformers

    keys = {}
    for name, spec in PUBLISHED.items():
        with torch.device("meta"):
            model = build(transformers, *spec)
        prefix = "text_model." if spec[0] == "CLIPTextModel" else ""  # as every published file has it
        keys[name] = packed(model.state_dict(), prefix)
    with open(os.path.join(HERE, "clip_keys.json"), "w", encoding="utf-8") as file:
        file.write(json.dumps(keys, indent=0) + "\n")
    model = fill(build(transformers, "CLIPModel", TEXT, VISION, 16))
    numbers = {k: [round(x, 12) for x in v.flatten().tolist()] for k, v in outputs(model).items()}
    with open(os.path.join(HERE, "clip_outputs.json"), "w", encoding="utf-8") as file:
        file.write(json.dumps(numbers, indent=0) + "\n")


if __name__ == "__main__":
    main()
