"""How much memory a call holds."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """``peak``: the most bytes that were alive at once of the memory that was allocated inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        given = {StorageWeakRef(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self._sizes = {ref: size for ref, size in self._sizes.items() if not ref.expired()}
        fresh = {StorageWeakRef(storage): storage.nbytes() for storage in _storages(result)}
        self._sizes |= {ref: size for ref, size in fresh.items() if ref not in given}
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result


def _storages(tree: object) -> list[torch.UntypedStorage]:
    leaves = tree_leaves(tree)
    tensors = [x.untyped_storage() for x in leaves if isinstance(x, Tensor)]
    return tensors + [x for x in leaves if isinstance(x, torch.UntypedStorage)]
