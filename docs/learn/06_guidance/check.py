"""Against one step of TextToImage.denoise with a tiny model."""

import torch
from compare import same

from minidiff.objective import straight_paths
from minidiff.text_to_image import ImageFormat, Preset, build_text_to_image


@torch.no_grad()
def check(answer) -> None:
    """A model of flow: its one step from noise is x - prediction, so what it predicted can be read off."""
    tiny = Preset((8, 16), (False, True), 1, 32, 1)
    model = build_text_to_image(tiny, ImageFormat(16, 1, 2), ["春", "夏"], straight_paths()).eval()
    model.unet.conv_out.weight *= 0.01
    x, prompts = 0.5 * torch.randn(2, *model.latent_shape).clamp(-1, 1), ["春", "夏"]
    contexts = [model.conditioning(p)["text"] for p in (["", ""], prompts)]
    calls = []

    def predict(x, t, context):
        calls.append(len(x))
        return model.predict(x, t, {"text": context})

    one = [predict(x, 1000.0, context) for context in contexts]
    for s in (1.5, 0.0, 1.0, 7.5):
        calls.clear()
        found = answer.guided(predict, x, 1000.0, *contexts, s)
        drawn = model.denoise(x, prompts, 1, s)
        same(found, x - model.encode(drawn), f"eps with s = {s}", 1e-5, {
            "that counts from 0: s = 1 has to give the text's prediction": one[1] + s * (one[1] - one[0]),
            "the two changed places": one[1] + s * (one[0] - one[1]),
            "start from the prediction without a text": s * (one[1] - one[0])})
        assert calls == [4], f"predict was called with batches of {calls}: one of 4 is enough"
