"""What calls return: fields by attribute, by name and by place, as diffusers' outputs are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils._pytree import register_pytree_node


class Output:
    """Base of dataclasses: `out.sample`, `out["sample"]`, `out[0]`, and the methods of a mapping by field names.

    A field that is None is left out, so that places are those of the tuple that `return_dict=False` gives.
    """

    __dataclass_fields__: dict[str, Any]

    def __init_subclass__(cls) -> None:
        """torch.export, FSDP and DistributedDataParallel find the tensors in one."""
        super().__init_subclass__()

        def taken_apart(out: Output) -> tuple[list[Any], list[str]]:
            names = list(out.__dataclass_fields__)
            return [getattr(out, name) for name in names], names

        def put_together(values: Iterable[Any], names: list[str]) -> Output:
            return cls(**dict(zip(names, values)))

        name = f"{cls.__module__}.{cls.__name__}"
        register_pytree_node(cls, taken_apart, put_together, serialized_type_name=name)

    def keys(self) -> list[str]:
        return [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.keys(), self.values()))

    def to_tuple(self) -> tuple:
        return tuple(self.values())

    def __getitem__(self, key: int | slice | str) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()
