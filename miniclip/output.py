"""ModelOutput: what every model and sampler of both packages returns, read by attribute, key or place.

Read when you meet it; nothing comes before. Mirrors: transformers' and diffusers' ModelOutput and BaseOutput.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass
class ModelOutput:
    """Read a field as `out.name`, `out["name"]` or `out[0]`; fields that are None do not count as present."""

    def keys(self) -> list[str]:
        """Names of the fields that are not None, in order."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]

    def values(self) -> list[Any]:
        """The fields that are not None, in order."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """(name, value) of the fields that are not None."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def to_tuple(self) -> tuple:
        """The present fields in order, nested outputs as tuples: what `return_dict=False` returns."""
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())

    def __getitem__(self, key: int | slice | str) -> Any:
        if not isinstance(key, str):
            return tuple(self.values())[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: str) -> bool:
        return key in self.keys()

    def __len__(self) -> int:
        return len(self.keys())
