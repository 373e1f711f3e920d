"""docs/compatibility.md, made from upstream's own signatures: python -m tests.parity.compatibility

Each public method and argument of the classes that both libraries have gets a row: it works, does nothing, or
is left out with a reason, which comes from the code (miniclip/habits.py, minidiff/habits.py and the like). A
name that is none of these is an error, here and in test_compatibility.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import miniclip
import minidiff

PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"
Row = tuple[str, str, str]                              # name or name(argument=), status, reason
WORKS, IDLE, OUT = "works", "does nothing", "left out"


def families() -> dict[str, list[tuple[type, type]]]:
    """Heading -> pairs of our class and upstream's."""
    import diffusers
    import transformers

    def pairs(ours: Any, theirs: Any, names: str) -> list[tuple[type, type]]:
        return [(getattr(ours, name), getattr(theirs, name)) for name in names.split()]

    samplers = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
    return {
        "Samplers": pairs(minidiff, diffusers, " ".join(samplers)),
        "UNet and VAE": pairs(minidiff, diffusers, "UNet2DConditionModel AutoencoderKL"),
        "Pipelines": pairs(minidiff, diffusers, " ".join(
            name for name in minidiff.__all__ if name.endswith("Pipeline"))),
        "CLIP models": pairs(miniclip, transformers, "CLIPModel CLIPTextModel CLIPTextModelWithProjection "
                                                     "CLIPVisionModel CLIPVisionModelWithProjection"),
        "CLIP configs": pairs(miniclip, transformers, "CLIPConfig CLIPTextConfig CLIPVisionConfig"),
        "Tokenizers": pairs(miniclip, transformers, "CLIPTokenizer BertTokenizer"),
        "Processors": pairs(miniclip, transformers, "CLIPImageProcessor CLIPProcessor"),
    }


def public_names(theirs: type) -> list[str]:
    """What a user may call or read: not Python's, not nn.Module's; __init__ and __call__ count."""
    common = set(dir(object)) | (set(dir(nn.Module)) if issubclass(theirs, nn.Module) else set())
    names = [name for name in dir(theirs) if not name.startswith("_") and name not in common]
    names += ["forward"] if issubclass(theirs, nn.Module) else ["__call__"] if hasattr(theirs, "__call__") else []
    return ["__init__", *sorted(set(names))]
