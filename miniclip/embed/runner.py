"""Which text fits a picture: numpy, Pillow and onnxruntime, the graphs beside this file and pipeline.json.

    python runner.py --image herb.png --text 薑 --text 大蒜
    python runner.py --check

Pillow opens pictures and resizes them. Paper: Radford 2021, figure 1 (zero-shot by names).
Shapes: N pictures or texts, T tokens, E width of the shared space, H W a picture's size.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from tokens import Tokenizer

HERE = Path(__file__).resolve().parent


class Pipeline:
    """The graphs of a folder, each opened when it is first asked, and what happens before them."""

    def __init__(self, folder=HERE):
        self.folder = Path(folder)
        self.rules = json.loads((self.folder / "pipeline.json").read_text("utf-8"))
        (rules,) = self.rules["tokenizers"]
        self.tokenizer = Tokenizer(self.folder / rules["folder"], rules)
        self.sessions = {}

    def run(self, name, *inputs):
        """The outputs of a graph, in order."""
        import onnxruntime

        graph = self.rules["graphs"][name]
        if name not in self.sessions:
            self.sessions[name] = onnxruntime.InferenceSession(     # folded, weights would be held twice
                self.folder / graph["file"], providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"])
        return self.sessions[name].run(None, dict(zip(graph["inputs"], inputs)))

    # ---- pictures

    def pixels(self, image):
        """A Pillow picture -> float32 [3, H, W], as the graph takes it."""
        r = self.rules["picture"]
        image = image if r["alpha"] == "drop_after_resize" else to_rgb(image, white=r["alpha"] == "white")
        if r["resize"]:
            nearest = image.mode in ("1", "P")              # indices of a palette do not mix
            resample = 0 if nearest else {"bilinear": 2, "bicubic": 3}[r["resample"]]
            image = image.resize(self.target(*image.size), resample)
        x = np.asarray(image.convert("RGB"))
        x = crop(x, r["crop"]["height"], r["crop"]["width"], r["crop_rounding"]) if r["crop"] else x
        mean, deviation = (np.float32(r[name])[:, None, None] for name in ("mean", "deviation"))
        return ((x.transpose(2, 0, 1) * r["scale"]).astype(np.float32) - mean) / deviation

    def target(self, width, height):
        """Width and height to resize to: given, or so that the shorter edge has a length."""
        resize = self.rules["picture"]["resize"]
        if "height" in resize:
            return resize["width"], resize["height"]
        n = resize["shortest_edge"]
        return (int(n * width / height), n) if height <= width else (n, int(n * height / width))

    # ---- embeddings

    def embed_images(self, images):
        """Pillow pictures -> [N, E] of length 1."""
        return self.run("image", np.stack([self.pixels(image) for image in images]))[0]

    def tokens(self, texts):
        """Ids and mask [N, T]."""
        return [np.array(rows, np.int64) for rows in self.tokenizer(texts)]

    def embed_texts(self, texts):
        """[N, E] of length 1."""
        return self.run("text", *self.tokens(texts))[0]


def to_rgb(image, white):
    """Any mode -> RGB; what is transparent becomes white, or is taken as it is."""
    from PIL import Image

    if white and ("A" in image.getbands() or image.info.get("transparency") is not None):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def crop(x, height, width, rounding):
    """[H, W, 3] -> [height, width, 3] from the middle; what is missing is filled with 0."""
    down, right = max(0, height - x.shape[0]), max(0, width - x.shape[1])
    top, left = ((down + 1) // 2, (right + 1) // 2) if rounding == "floor" else (down // 2, right // 2)
    x = np.pad(x, ((top, down - top), (left, right - left), (0, 0)))
    middle = (lambda n: n // 2) if rounding == "floor" else (lambda n: round(n / 2))
    top, left = middle(x.shape[0] - height), middle(x.shape[1] - width)
    return x[top:top + height, left:left + width]


def check(p):
    """Every stage on its golden input beside its golden output: True if all agree."""
    from PIL import Image

    golden = {file.stem: np.load(file) for file in (p.folder / "golden").glob("*.npy")}
    texts, good = p.rules["golden"]["texts"], True
    image = Image.fromarray(golden["picture"])
    found = dict(zip(("text.ids", "text.mask"), p.tokens(texts)))
    found["image.pixels"] = p.pixels(image)[None]
    found["image.vector"] = p.run("image", golden["image.pixels"])[0]
    found["text.vector"] = p.run("text", golden["text.ids"], golden["text.mask"])[0]
    found["similarity"] = p.embed_images([image]) @ p.embed_texts(texts).T
    for name, value in found.items():
        wanted = golden[name]
        if value.shape != wanted.shape:
            error = np.inf
        else:
            error = np.abs(value - wanted).max() / max(np.abs(wanted).max(), 1e-12)
        fits = error == 0 if wanted.dtype == np.int64 else error <= p.rules["golden"]["tolerance"]
        print(f"{name:<18} {error:.2g} relative{'' if fits else '  TOO FAR'}")
        good = good and fits
    return bool(good)


def main():
    parser = argparse.ArgumentParser(description="Which text fits a picture, by the graphs beside this file.")
    parser.add_argument("--image", action="append", help="a picture file; may be given several times")
    parser.add_argument("--text", action="append", help="a text, many (default: the captions)")
    parser.add_argument("--top", type=int, default=5, help="how many texts a picture (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="compare every stage with its golden vector")
    a, p = parser.parse_args(), Pipeline()
    if a.check:
        return 0 if check(p) else 1
    from PIL import Image, ImageOps

    texts, start = a.text or p.rules["captions"], time.perf_counter()
    if not a.image or not texts:
        parser.error("--image is missing, or there is no --text and pipeline.json has no captions")
    images = [ImageOps.exif_transpose(Image.open(path)) for path in a.image]
    similarity = p.embed_images(images) @ p.embed_texts(texts).T                # [images, texts]
    logits = p.rules["logit_scale"] * similarity
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    for path, row, part in zip(a.image, similarity, share):
        print(path)
        for i in np.argsort(-row)[:a.top]:
            print(f"  {row[i]:7.4f}  {part[i]:6.1%}  {texts[i]}")
    print(f"{time.perf_counter() - start:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
