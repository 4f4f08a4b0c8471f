"""Count the memory that a piece of work took and still holds."""

from typing import Any
from weakref import ref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Alive(TorchDispatchMode):
    """Know the memory that was taken in this mode, by its address."""

    def __enter__(self) -> "Alive":
        self.storages: dict[int, Any] = {}
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)}
        for each in tree_iter(made):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in given:
                self.storages[each.untyped_storage()._cdata] = ref(each.untyped_storage())
        return made

    def num_bytes(self) -> int:
        """Return what of it is still held."""
        held = [storage() for storage in self.storages.values()]
        return sum(storage.nbytes() for storage in held if storage is not None)
