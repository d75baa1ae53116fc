"""How much memory tensors hold while operators run: what a dry run predicts, fake tensors included."""

import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from unittest import mock

import torch
from torch.distributed.tensor._op_schema import OpSchema
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves

_PROPAGATE = "_propagate_tensor_meta_non_cached"
"""By which a DTensor finds the shape of a result: with tensors of whole shapes, which nobody holds (2.13)."""


class LiveMemory(TorchDispatchMode):
    """Adds up the storages of `held` and of all that operators make, for as long as they live.

    What operators take and free inside of themselves is not seen.
    """

    supports_higher_order_operators = True

    def __init__(self, held: Iterable[torch.Tensor]):
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.bytes = self.peak = 0
        self._seeing = True
        for tensor in held:
            self._see(tensor.untyped_storage())

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Compiled code may run inside of it."""
        return True

    def __enter__(self):
        resize, propagate = torch.UntypedStorage.resize_, getattr(ShardingPropagator, _PROPAGATE)

        def resize_and_see(storage: torch.UntypedStorage, size: int):
            resize(storage, size)
            self._see(storage)

        def propagate_unseen(propagator: ShardingPropagator, schema: OpSchema):
            self._seeing = False
            try:
                return propagate(propagator, schema)
            finally:
                self._seeing = True

        self._patches = ExitStack()
        # FSDP frees and refills gathered weights so, and no operator tells of it.
        self._patches.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", resize_and_see))
        self._patches.enter_context(mock.patch.object(ShardingPropagator, _PROPAGATE, propagate_unseen))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # what a DTensor does by itself comes here
        result = func(*args, **(kwargs or {}))
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as it does with real tensors; of fake ones it makes new ones
        for leaf in tree_leaves(result) if self._seeing else ():
            if isinstance(leaf, torch.Tensor) and not is_traceable_wrapper_subclass(leaf):
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._gone, key)
        self.bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.bytes)

    def _gone(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)
