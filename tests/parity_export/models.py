"""Small models of every kind that can be exported, random weights, as folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from miniclip.bert import ChineseCLIPConfig, ChineseCLIPModel
from miniclip.config import CLIPConfig, CLIPResNetConfig, CLIPTextConfig
from miniclip.image import CLIPImageProcessor
from miniclip.image_text import ImageTextModel, Preset, build_image_text
from miniclip.model import CLIPModel
from miniclip.resnet import CLIPResNetModel
from miniclip.tokenizer import CLIPTokenizer
from miniclip.wordpiece import BertTokenizer
from minidiff.objective import straight_paths
from minidiff.samplers import LCMScheduler
from minidiff.schedule import Sampler
from minidiff.text_to_image import ImageFormat, build_text_to_image
from minidiff.text_to_image import Preset as WriterPreset
from minidiff.upscaler import build_upscaler
from tests.test_minidiff_pipeline import make

CAPTIONS = ["人蔘", "韓國人蔘", "枸杞", "a herb shop"]
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPS = {"norm_num_groups": 8}     # of 32 channels: PyTorch refuses to norm a single number


def run(folder: Path) -> None:
    """A run of train_diffusion with an upscaler."""
    preset = WriterPreset((16, 32), (False, True), 1, 32, 1)
    model = build_text_to_image(preset, ImageFormat(16, 1, 2), CAPTIONS)
    model.upscaler = build_upscaler(1)
    model.save(folder)


def flow_run(folder: Path) -> None:
    """A run that learned rectified flow: its timesteps are no whole numbers."""
    save_run(folder, straight_paths())


def distilled_run(folder: Path) -> None:
    """A run of train.distill, which draws by LCM."""
    save_run(folder, LCMScheduler(prediction_type="v_prediction", original_inference_steps=5))


def save_run(folder: Path, scheduler: Sampler) -> None:
    """A run without an upscaler."""
    preset = WriterPreset((16, 32), (False, True), 1, 32, 1)
    build_text_to_image(preset, ImageFormat(16, 1, 2), CAPTIONS, scheduler).save(folder)


def sd(folder: Path) -> None:
    """Stable Diffusion's parts and layout."""
    make(**GROUPS).save_pretrained(folder)


def sdxl(folder: Path) -> None:
    """Two text encoders, a pooled text and sizes."""
    make(xl=True, **GROUPS).save_pretrained(folder)


def save_clip(folder: Path, model: nn.Module, tokenizer: CLIPTokenizer | BertTokenizer,
              processor: CLIPImageProcessor) -> None:
    """A CLIP with tokenizer and processor."""
    ImageTextModel(model.eval(), tokenizer, processor, CAPTIONS).save(folder)


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Of a small text tower."""
    return CLIPTextConfig.for_tokenizer(tokenizer, **TEXT)


def clip(folder: Path) -> None:
    """CLIP as transformers has it."""
    tokenizer = CLIPTokenizer.of_captions(CAPTIONS, 600, spare=16)
    config = CLIPConfig(text_config=text_config(tokenizer), vision_config=VISION, projection_dim=16)
    save_clip(folder, CLIPModel(config), tokenizer, CLIPImageProcessor(size=32, crop_size=32))


def clip_resnet(folder: Path) -> None:
    """OpenAI's ResNet, its rules for texts and pictures."""
    tokenizer = CLIPTokenizer.train(CAPTIONS, 600, rules="openai")
    config = CLIPResNetConfig(text_config=text_config(tokenizer), vision_layers=(1, 1, 1, 1), vision_width=8,
                              image_size=32, projection_dim=16)
    save_clip(folder, CLIPResNetModel(config), tokenizer, CLIPImageProcessor.openai(32))


def chinese_clip(folder: Path) -> None:
    """BERT in place of CLIP's text tower; pictures are distorted to a square."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    signs = [*special, *sorted(set("".join(CAPTIONS)) - {" "}), "##e", "##r", "##b"]
    tokenizer = BertTokenizer({sign: i for i, sign in enumerate(signs)}, model_max_length=52)
    config = ChineseCLIPConfig(text_config={**TEXT, "vocab_size": len(signs), "max_position_embeddings": 52},
                               vision_config=VISION, projection_dim=16)
    square = {"height": 32, "width": 32}
    save_clip(folder, ChineseCLIPModel(config), tokenizer,
              CLIPImageProcessor(size=square, do_center_crop=False, resample=2))


def simple_clip(folder: Path) -> None:
    """A run of train_clip."""
    torch.manual_seed(0)
    build_image_text(Preset("resnet", 8, (1, 1, 1, 1), 0, 32, 1, 16), 32, CAPTIONS).save(folder)


DIFFUSION = {"run": run, "flow_run": flow_run, "distilled_run": distilled_run, "sd": sd, "sdxl": sdxl}
CLIPS = {"clip": clip, "clip_resnet": clip_resnet, "chinese_clip": chinese_clip, "simple_clip": simple_clip}
MAKERS = {**DIFFUSION, **CLIPS}
