"""Estimates the peak memory of operators without allocating it."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(call: Callable[[], object]) -> int:
    """A lower bound of the peak bytes of the tensors that `call` creates; nothing is computed or allocated.

    `call` runs under torch's `FakeTensorMode`: tensors have a shape, a dtype and a device, but no data. Workspace
    inside operators and fragmentation of the allocator are not counted; attention counts as its output only, as its
    fused kernels store nothing else.
    """
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        FakeTensorMode(allow_non_fake_inputs=True),
        _Fused(),
        _Counting() as counting,
    ):
        call()
    peak: int = counting.peak
    return peak


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._now: int = 0
        self._alive = set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()  # the same object for all live views of a storage
                if id(storage) not in self._alive:
                    self._alive.add(id(storage))
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._gone, id(storage), storage.nbytes())
        self.peak = max(self.peak, self._now)
        return made

    def _gone(self, storage: int, nbytes: int) -> None:
        self._alive.discard(storage)
        self._now -= nbytes


class _Fused(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            return named["query"].new_empty(*named["query"].shape[:-1], named["value"].shape[-1])
        return func(*args, **(kwargs or {}))
