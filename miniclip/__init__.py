from miniclip.bert import BertConfig, ChineseCLIPConfig, ChineseCLIPModel, DistilBertConfig
from miniclip.config import CLIPConfig, CLIPResNetConfig, CLIPTextConfig, CLIPVisionConfig, ConfigError
from miniclip.image import CLIPImageProcessor, CLIPProcessor, ImageError
from miniclip.image_text import ImageTextModel
from miniclip.model import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from miniclip.resnet import CLIPResNetModel
from miniclip.simple import SimpleCLIPConfig, SimpleCLIPModel
from miniclip.tokenizer import CLIPTokenizer, TokenizerError
from miniclip.weights import WeightsError
from miniclip.wordpiece import BertTokenizer

__all__ = [
    "BertConfig",
    "BertTokenizer",
    "CLIPConfig",
    "CLIPImageProcessor",
    "CLIPModel",
    "CLIPProcessor",
    "CLIPResNetConfig",
    "CLIPResNetModel",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "CLIPVisionConfig",
    "CLIPVisionModel",
    "CLIPVisionModelWithProjection",
    "ChineseCLIPConfig",
    "ChineseCLIPModel",
    "ConfigError",
    "DistilBertConfig",
    "ImageError",
    "ImageTextModel",
    "SimpleCLIPConfig",
    "SimpleCLIPModel",
    "TokenizerError",
    "WeightsError",
]
