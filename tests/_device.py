"""A second device, emulated on the CPU, which refuses to mix its tensors with those of the CPU, as CUDA does.

A tensor on the emulated device wraps a tensor of the CPU, and every operation runs on the wrapped tensors. So
the results are bit for bit those of the CPU. Only CPU tensors without dimensions may be mixed with tensors on the
device, as on CUDA. A conversion to numpy without a copy to the CPU is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("meta")
"""Label of the emulated device. torch has no kernels with data for this type, so every result is emulated."""


class OnDevice(Tensor):
    """A tensor on the emulated device."""

    wrapped: Tensor

    @staticmethod
    def __new__(cls, wrapped: Tensor) -> OnDevice:
        assert type(wrapped) is Tensor
        tensor: OnDevice = Tensor._make_wrapper_subclass(
            cls, wrapped.shape, wrapped.stride(), wrapped.storage_offset(), dtype=wrapped.dtype, device=DEVICE
        )  # fmt: skip
        tensor.wrapped = wrapped
        return tensor

    def __init__(self, wrapped: Tensor) -> None:
        pass

    def numpy(self, *, force: bool = False) -> Any:
        """Return a numpy array if `force` is set, which copies to the CPU.

        Raises:
            TypeError: without `force`, as for a tensor on CUDA.
        """
        if not force:
            raise TypeError(
                "can't convert a tensor on the emulated device to numpy: use .cpu() first"
            )
        return self.detach().cpu().numpy()

    def __array__(self, *args: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run_on_device(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """A context in which tensors can be created on the emulated device and copied to it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run_on_device(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """A context in which numbers of Python become tensors on the device: torch does this without an operation."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            return func(*args, **kwargs)
        device = kwargs.get("device")
        if func is Tensor.new_tensor:
            like, *args = args
            func, kwargs = torch.tensor, {"dtype": like.dtype, **kwargs}
            device = like.device if device is None else device
        if device is None:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": None}).to(device)


@contextmanager
def emulated_device() -> Iterator[None]:
    """Let tensors be created on the emulated device."""
    with _FromData(), _Operations():
        yield


def run_on_device(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation of torch on the wrapped tensors, and label its results with their device.

    Raises:
        RuntimeError: if the operation mixes tensors on the device with CPU tensors that have dimensions.
    """
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    assert all(t.device.type == "cpu" for t in tensors if not isinstance(t, OnDevice)), func
    wanted = kwargs.get("device")
    if wanted is not None:
        on_device = wanted.type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
        leaves, spec = tree_flatten((args, kwargs))
    else:
        on_device = bool(there)
    copies = func.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten._to_copy)
    if there and not copies:
        mixed = [t for t in tensors if not isinstance(t, OnDevice) and t.dim()]
        if mixed:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found {DEVICE.type} and cpu"
            )
    if func.overloadpacket is torch.ops.aten.copy_:
        on_device = isinstance(args[0], OnDevice)
    if on_device and kwargs.get("generator") is not None:
        raise RuntimeError(
            f"{func}: expected a {DEVICE.type} device type for generator but found cpu"
        )
    plain = tree_unflatten(
        [leaf.wrapped if isinstance(leaf, OnDevice) else leaf for leaf in leaves], spec
    )
    result = func(*plain[0], **plain[1])
    known = {
        id(tensor.wrapped): tensor for tensor in there
    }  # in-place operations return their argument

    def labelled(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        return OnDevice(value) if on_device else value

    return tree_map(labelled, result)
