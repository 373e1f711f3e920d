"""What users of the big libraries type out of habit: options that do nothing here, and names that are left
out on purpose, each with what to do instead.

Not needed to understand a model: nothing here computes. docs/compatibility.md is made of these tables.
Mirrors: the options of transformers' and diffusers' from_pretrained and save_pretrained, and their methods.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

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
})
LOADING_REFUSED = table({
    "device_map max_memory offload_folder offload_state_dict offload_buffers": "load, then .to(device)",
    "quantization_config load_in_8bit load_in_4bit": "weights are floating-point numbers here",
    "output_loading_info ignore_mismatched_sizes": "loading is strict: every tensor fits, or it is an error",
    "from_flax from_tf": "convert the weights to safetensors first",
    "state_dict": "build the model from its config, then load_state_dict",
})
SAVING_IDLE = table({
    "is_main_process save_function save_peft_format token": "files are written by this process",
})
SAVING_REFUSED = table({"push_to_hub repo_id": "upload the folder with huggingface_hub",
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
