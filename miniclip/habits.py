"""What users of the big libraries type out of habit: options that do nothing here, and names that are left
out on purpose, each with what to do instead.

Not needed to understand a model: nothing here computes. docs/compatibility.md is made of these tables.
Mirrors: the options of transformers' and diffusers' from_pretrained and save_pretrained, and their methods.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from miniclip.files import read_json, write_json

Kind = TypeVar("Kind", bound=type)
Table = dict[str, str]


def table(groups: Mapping[str, str]) -> Table:
    """{"a b": reason} -> {"a": reason, "b": reason}."""
    return {name: reason for names, reason in groups.items() for name in names.split()}


DOWNLOADS = "nothing is downloaded: folders are read from this disk"

LOADING_IDLE = table({
    "cache_dir force_download proxies local_files_only token revision mirror": DOWNLOADS,
    "resume_download use_auth_token": DOWNLOADS,
    "low_cpu_mem_usage _fast_init": "always so: a model is built without memory, then filled",
    "use_safetensors": "safetensors are taken first, and code in a pickle is never run",
    "attn_implementation": "attention is torch's fused kernel; output_attentions=True writes it out",
    "weights_only trust_remote_code": "code from a folder is never run",
    "disable_mmap": "a file is mapped where the system can, and read where it cannot",
})
LOADING_REFUSED = table({
    "device_map max_memory offload_folder offload_state_dict offload_buffers": "load, then .to(device)",
    "quantization_config load_in_8bit load_in_4bit": "weights are floating-point numbers here",
    "output_loading_info ignore_mismatched_sizes": "loading is strict: every tensor fits, or it is an error",
    "from_flax from_tf": "convert the weights to safetensors first",
    "fusion_config distributed_config tp_plan": "load, then compile or shard the model",
    "state_dict": "build the model from its config, then load_state_dict",
})
SAVING_IDLE = table({
    "is_main_process save_function save_peft_format token": "files are written by this process",
    "save_original_format": "always so: names of tensors are those of the first files",
})
SAVING_REFUSED = table({"push_to_hub repo_id": "upload the folder with huggingface_hub",
                        "use_flashpack": "weights are written as safetensors, or as pickles",
                        "distributed_checkpoint": "gather the weights first, then save",
                        "state_dict": "load_state_dict first, then save"})


def settle(where: str, given: Mapping[str, Any], idle: Table, refused: Table) -> None:
    """Lets options of `idle` pass, and those of `refused` where they ask for nothing (None, False).

    Raises ValueError with the reason for another value of a refused one, and TypeError, as Python does, for
    an option that is in neither.
    """
    for name, value in given.items():
        if name in refused and value not in (None, False):
            raise ValueError(f"{where}: {name} is not supported; {refused[name]}")
        if name not in refused and name not in idle:
            raise TypeError(f"{where} got an unexpected keyword argument {name!r}")


class LeftOut:
    """Mixin: a method of upstream that is not here says, when it is looked up, what to do instead.

    It is an AttributeError all the same, so hasattr tells the truth. A field of `config` is found as an
    attribute, as it once was upstream, with a FutureWarning.
    """

    left_out: ClassVar[Table] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)        # nn.Module finds its parameters here
        except AttributeError:
            config = vars(self).get("config", {})
        if name in config and not name.startswith("_"):
            warnings.warn(f"{type(self).__name__}.{name} is old: read .config.{name}", FutureWarning,
                          stacklevel=2)
            return config[name]
        kinds = [kind for kind in type(self).__mro__ if name in vars(kind).get("left_out", ())]
        if kinds:
            raise AttributeError(f"{type(self).__name__}.{name} is left out: {kinds[0].left_out[name]}")
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")


# ------------------------------------------------------------------ transformers' configs and models

ROTARY = "CLIP's positions are learned vectors, nothing rotates"
SPREAD = "one device holds the model; see train/towers.py for DDP and FSDP2"
LABELS = "CLIPForImageClassification is not here; train a linear layer on get_image_features"
ADAPTERS = "train/lora.py trains LoRA, and train/merge_lora.py merges it"

SWITCHES = ("output_attentions", "output_hidden_states", "return_dict")
CONFIG_LEFT_OUT = table({
    "push_to_hub": "save_pretrained, then upload the folder with huggingface_hub",
    "register_for_auto_class is_custom_code is_remote_code name_or_path": "code from a folder is never run",
    "id2label label2id num_labels problem_type": LABELS,
    "rope_scaling rope_parameters convert_rope_params_to_dict nested_rope_parameter_keys": ROTARY,
    "standardize_rope_params validate_rope ignore_keys_at_rope_validation default_theta": ROTARY,
    "default_rope_type": ROTARY,
    "validate_architecture validate_token_ids validate_layer_type validate": "the constructor checks",
    "validate_output_attentions": "the constructor checks",
    "sub_configs_defaults": "read config.sub_configs",
    "per_layer_config per_layer_attributes is_heterogeneous get_mtp_config": "all layers are alike",
    "allow_global_per_layer_attribute_access": "all layers are alike",
    "serialize_explicit_per_layer_config": "all layers are alike",
    "base_model_tp_plan base_model_pp_plan base_model_ep_plan base_model_fsdp_plan": SPREAD,
    "attribute_map base_config_key default_config_fields extra_config_files": "names have no alias",
    "extra_files": "config.json is all there is of a config",
    "dict_dtype_to_str": "to_json_string writes the names of dtypes",
    "get_config_dict": "from_pretrained(folder).to_dict()",
    "update_from_string": "dataclasses.replace(config, name=value) makes a changed copy",
    "use_return_dict": "read config.return_dict",
})

MODEL_LEFT_OUT = table({
    "push_to_hub add_model_tags model_tags": "save_pretrained, then upload the folder with huggingface_hub",
    "register_for_auto_class is_custom_code is_remote_code": "code from a folder is never run",
    "generate generation_config generation_config_class get_compiled_call": "CLIP generates no text",
    "post_init initialize_weights": "the constructor draws the weights, and init_weights() draws them anew",
    "set_output_embeddings": "CLIP has no output embeddings",
    "get_encoder set_encoder get_decoder set_decoder": "read model.text_model or model.vision_model",
    "get_position_embeddings resize_position_embeddings":
        "pictures: interpolate_pos_encoding=True in the forward call; texts: truncate",
    "get_parameter_or_buffer": "model.get_parameter(name), model.get_buffer(name)",
    "retrieve_modules_from_names": "model.get_submodule(name)",
    "named_non_persistent_buffers": "there are none: every tensor is in the state dict",
    "input_modalities": "read model.main_input_name",
    "dummy_inputs": "any ids and pictures do, e.g. torch.zeros(1, 3, 224, 224)",
    "warn_if_padding_and_no_attention_mask": "CLIP reads the end token, which sees no padding after it",
    "loss_function": "return_loss=True in the forward call, or miniclip.model.clip_loss",
    "dequantize": "weights are floating-point numbers here",
    "get_correct_attn_implementation can_record_outputs": "output_attentions=True in the forward call",
    "get_experts_implementation set_experts_implementation": "CLIP has no experts",
    "get_correct_experts_implementation": "CLIP has no experts",
    "set_use_kernels use_kernels is_backend_compatible": "torch.compile(model)",
    "get_expanded_tied_weights_keys mark_tied_weights_as_initialized get_init_context": "no weights are tied",
    "add_adapter load_adapter set_adapter delete_adapter active_adapters enable_adapters": ADAPTERS,
    "disable_adapters get_adapter_state_dict enable_peft_hotswap": ADAPTERS,
    "tp_plan tp_size pp_plan ep_plan fsdp_plan fsdp_size init_parallel_plans maybe_distribute_model": SPREAD,
    "prepare_distribute_model supports_tp_plan supports_pp_plan supports_context_parallel": SPREAD,
    "save_distributed_checkpoint gather_sharded_state_dict_for_save should_save_on_this_rank": SPREAD,
    "barrier_after_gathered_checkpoint_save is_distributed_loading_by_transformers": SPREAD,
})
CHECKPOINTING_IDLE = table({"use_reentrant": "recomputed without reentry either way: the same gradients"})
CHECKPOINTING_REFUSED = table({
    "every_n_layers": "every block is recomputed", "offload": "what is kept stays on the device",
    "context_fn determinism_check debug": "call torch.utils.checkpoint yourself",
})
BOTH_TOWERS = ("each tower has its own: model.text_model.embeddings.token_embedding, "
               "model.vision_model.embeddings.patch_embedding")
PAIR_LEFT_OUT = table({
    "set_input_embeddings": BOTH_TOWERS,
    "resize_token_embeddings": "resize a CLIPTextModel, and put its text_model into this one",
})


def with_changes(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config with some fields changed; a dict changes fields of the tower's config that stands there."""
    changes = {name: with_changes(getattr(config, name), value) if isinstance(value, dict) else value
               for name, value in changes.items()}
    return dataclasses.replace(config, **changes) if changes else config


class ConfigHabits(LeftOut):
    """Mixin of CLIP's configs: transformers' files, strings and names.

    Upstream's fields of which one value alone is allowed read as that value (`config.is_encoder_decoder`);
    metadata that was given or set can be read, but is not compared, and not written.
    """

    left_out = CONFIG_LEFT_OUT
    arguments_left_out: ClassVar[dict[str, Table]] = {
        "update": {"config_dict": "dataclasses.replace(config, name=value) makes a changed copy"},
    }
    model_type: ClassVar[str]
    sub_configs: ClassVar[dict[str, type]] = {}

    def __getattr__(self, name: str) -> Any:
        inert = type(self).inert
        return inert[name][0] if name in inert else super().__getattr__(name)

    def keep_aside(self, aside: dict[str, Any]) -> None:
        """Metadata that came with a config, or was set later, becomes plain attributes."""
        vars(self).update(aside)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, subfolder: str = "", **options: Any):
        """Reads config.json of a local folder; a tower's config also out of a whole CLIP's.

        options: fields to change (`vocab_size=20`, `text_config={"vocab_size": 20}`), and loading options of
        upstream, which do nothing or raise. Raises WeightsError for a file, ConfigError for a field.
        """
        changes = {f.name: options.pop(f.name) for f in dataclasses.fields(cls) if f.name in options}
        settle(f"{cls.__name__}.from_pretrained", options, LOADING_IDLE, LOADING_REFUSED)
        config = cls.from_json_file(os.path.join(folder, subfolder, "config.json"))
        return with_changes(config, changes)

    def save_pretrained(self, folder: str | os.PathLike, **options: Any) -> None:
        """Writes config.json into a folder, which is made if it is not there."""
        settle(f"{type(self).__name__}.save_pretrained", options, SAVING_IDLE, SAVING_REFUSED)
        os.makedirs(folder, exist_ok=True)
        self.to_json_file(os.path.join(folder, "config.json"), use_diff=False)

    @classmethod
    def from_json_file(cls, path: str | os.PathLike):
        """Reads a JSON file of any name, as strictly as from_pretrained."""
        return cls.from_dict(read_json(path), os.fspath(path))

    def to_json_file(self, path: str | os.PathLike, use_diff: bool = True) -> None:
        """Writes what to_json_string returns."""
        write_json(path, self.to_diff_dict() if use_diff else self.to_dict())

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON of the fields that are not at their default; of all with use_diff=False."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict of model_type and all fields."""
        return {"model_type": self.model_type, **super().to_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        """to_dict, but for what is at its default; model_type stays."""
        usual = type(self)().to_dict()
        return {k: v for k, v in self.to_dict().items() if k == "model_type" or v != usual[k]}

    def get_text_config(self, decoder: Any = None, encoder: Any = None):
        """A tower's config is its own text config, as upstream has it."""
        return self


def lenient(kind: Kind) -> Kind:
    """Class decorator above `@dataclass(frozen=True)`: what shapes no weight need not be frozen.

    The constructor takes metadata and upstream's older names as from_dict does, so that
    `CLIPConfig(**json.load(file))` works. The switches of ModelConfig, metadata and names with "_" in front
    may be set at any time; a field of the model may not, since a model that is built no longer reads it.
    """
    make, frozen = kind.__init__, kind.__setattr__
    names = [f.name for f in dataclasses.fields(kind)]
    places = [f.name for f in dataclasses.fields(kind) if not f.kw_only]

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        aside: dict[str, Any] = {}
        if not given.keys() <= set(names):
            given.update(zip(places, args, strict=False))
            (given, aside), args = kind.sort_fields(given, kind.__name__), ()
        make(self, *args, **given)
        self.keep_aside(aside)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name in SWITCHES and isinstance(value, bool):
            self.keep_aside({name: value})
            dict.__setitem__(self, name, value)
        elif name.startswith("_") or name in kind.metadata and name not in SWITCHES:
            self.keep_aside({name: value})
        elif name in names:
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r} (to {value!r}): "
                                                  "dataclasses.replace(config, ...) makes a changed copy")
        else:
            frozen(self, name, value)

    kind.__init__, kind.__setattr__ = __init__, __setattr__
    return kind
