"""What users of transformers' image processors and processors type besides a call, and what is left out.

Not needed to understand pictures. docs/compatibility.md is made of these tables.
Mirrors: transformers' ImageProcessingMixin, BaseImageProcessor, ProcessorMixin.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from miniclip.habits import LOADING_IDLE, LeftOut, Table, settle, table
from miniclip.weights import read_json, write_json

PICTURE_IDLE: Table = {**LOADING_IDLE, **table({
    "use_fast backend processor_class image_processor_type feature_extractor_type": "there is one of them",
    "default_to_square image_seq_length": "CLIP's size is the shortest edge",
    "_from_auto _from_pipeline _commit_hash": "AutoImageProcessor's own",
})}
CALL_IDLE: Table = table({
    "disable_grouping": "pictures are processed one by one",
    "default_to_square image_seq_length": "CLIP's size is the shortest edge",
    "do_pad pad_size": "None and False are all there is",
})
CALL_REFUSED: Table = table({"do_pad pad_size": "pictures are cropped to one size, not padded"})


class PictureHabits(LeftOut):
    """Mixin of CLIPImageProcessor."""

    model_input_names = ("pixel_values",)
    arguments_left_out: ClassVar[dict[str, Table]] = {
        "preprocess": {"image_like_kwargs": "give each option by its own name"},
    }
    left_out: ClassVar[Table] = table({
        "resize rescale normalize center_crop convert_to_rgb":
            "ask for it in a call, with do_...=True, and False for the rest; or see miniclip.image",
        "rescale_and_normalize process_image": "call the processor: processor(image)",
        "pad": "pictures are cropped to one size, not padded",
        "fetch_images": "nothing is downloaded: open the file, or give its path",
        "backend default_to_square": "there is one implementation; a size in one number is the shortest edge",
        "push_to_hub": "upload the folder with huggingface_hub",
        "register_for_auto_class": "code from a folder is never run",
        "get_image_processor_dict": "from_pretrained(folder).to_dict()",
        "valid_kwargs": "field_names() lists them",
    })  # fmt: skip

    @classmethod
    def field_names(cls) -> list[str]:
        """The options of the processor."""
        return [field.name for field in dataclasses.fields(cls)]

    def changed(self, options: Mapping[str, Any]) -> Any:
        """This processor with other values of some fields; None keeps the value. Raises ConfigError."""
        habits = {name: value for name, value in options.items() if name not in self.field_names()}
        settle(type(self).__name__, habits, CALL_IDLE, CALL_REFUSED)
        new = {name: value for name, value in options.items() if value is not None and name not in habits}
        return type(self).from_dict({**self.to_dict(), **new}, f"{type(self).__name__}(...)") if new else self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config", **options: Any) -> Any:
        """Strict reading of a JSON object; options override its fields."""
        return super().from_dict({**values, **options}, source)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        """Reads one JSON file."""
        return cls.from_dict(read_json(json_file), os.fspath(json_file))

    def to_json_string(self) -> str:
        """The fields as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes the fields as one JSON file."""
        write_json(json_file_path, self.to_dict())


MULTIMODAL = "CLIP's text holds no placeholders of images"
CHECKED = "a call checks what it is given"


class ProcessorHabits(LeftOut):
    """Mixin of CLIPProcessor."""

    left_out: ClassVar[Table] = table({
        "apply_chat_template parse_response": "CLIP's text tower does not chat",
        "feature_extractor": "it is called image_processor",
        "video_processor": "give the frames as images",
        "push_to_hub": "upload the folder with huggingface_hub",
        "register_for_auto_class": "code from a folder is never run",
        "audio_token_ids image_token_ids video_token_ids all_special_multimodal_tokens": MULTIMODAL,
        "replace_audio_token replace_image_token replace_video_token create_mm_token_type_ids": MULTIMODAL,
        "get_text_with_replacements return_mm_token_type_ids return_text_replacement_offsets": MULTIMODAL,
        "check_argument_for_proper_class validate_init_kwargs validate_inputs prepare_inputs_layout": CHECKED,
        "from_args_and_dict get_processor_dict get_possibly_dynamic_module": "from_pretrained(folder)",
        "skip_tensor_conversion unused_input_names valid_processor_kwargs": CHECKED,
        "post_process_image_text_to_text post_process_multimodal_output": "CLIP writes no text",
        "audio_token_ids image_token_ids video_token_ids all_special_multimodal_tokens "
        "replace_audio_token replace_image_token replace_video_token create_mm_token_type_ids "
        "get_text_with_replacements return_mm_token_type_ids return_text_replacement_offsets":
            "CLIP's texts hold no places for pictures or sound",
        "check_argument_for_proper_class from_args_and_dict get_possibly_dynamic_module get_processor_dict "
        "prepare_inputs_layout skip_tensor_conversion unused_input_names valid_processor_kwargs "
        "validate_init_kwargs validate_inputs": "the constructor and the call check; from_pretrained reads",
    })
    chat_template = None
    arguments_left_out: ClassVar[dict[str, Table]] = {"__call__": table({
        "videos audio": "CLIP reads pictures and texts alone",
    })}

    @staticmethod
    def get_attributes() -> list[str]:
        """The names of its parts."""
        return ["image_processor", "tokenizer"]

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns for a picture and for a text."""
        parts = [part for part in (self.tokenizer, self.image_processor) if part is not None]
        return [name for part in parts for name in part.model_input_names]

    def to_dict(self) -> dict[str, Any]:
        """The image processor's fields; a tokenizer is written by save_pretrained."""
        return {"processor_class": type(self).__name__, "image_processor": self.image_processor.to_dict()}

    def to_json_string(self) -> str:
        """to_dict() as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes to_dict() as one JSON file."""
        write_json(json_file_path, self.to_dict())
