"""ModelOutput: what every model and sampler of both packages returns, read by attribute, key or place.

Read when you meet it; nothing comes before. Mirrors: transformers' and diffusers' ModelOutput and BaseOutput.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(eq=False, repr=False)
class ModelOutput(dict):
    """Read a field as `out.name`, `out["name"]` or `out[0]`; pass all as `**out`.

    It is the dict of its fields, in order, but for those that are None: they are attributes only, and take no
    place. Setting an attribute sets the entry, and the other way round. Equality is a dict's.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is None:
            self.pop(name, None)
        else:
            super().__setitem__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __getitem__(self, key: int | slice | str) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"

    def to_tuple(self) -> tuple:
        """The present fields in order, nested outputs as tuples: what `return_dict=False` returns."""
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())
