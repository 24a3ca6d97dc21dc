"""A GPU for tests on machines without one: tensors that say `cuda:0`, hold their numbers on the CPU, and mix with no
tensor of the CPU where CUDA's would not.

    with pretended_gpu():
        model.to("cuda")                        its parameters become `GpuTensor`s
        model(torch.tensor([[1, 2]]))           RuntimeError: … cuda:0 and cpu, as on a GPU
        model(torch.tensor([[1, 2]]).cuda())    computed, by the code that asks `x.device.type` and finds "cuda"

Two layers. A TorchFunctionMode sees what names a device (`torch.zeros(…, device=)`, `x.to`, `x.cpu`) and what leaves
tensors for Python. Below it `GpuTensor.__torch_dispatch__` sees every operation: it compares devices, computes on the
tensors inside and wraps what comes out. To C++ all lies on the CPU, so autocast is asked there by that name.

Not emulated: kernels, streams, several devices, NCCL. What runs is the CPU's kernel for the operation that CUDA's code
path asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
LIKE = {torch.Tensor.new_tensor, torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.Tensor.new_ones,
        torch.Tensor.new_full}  # fmt: skip


class GpuTensor(torch.Tensor):
    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor, requires_grad: bool = False) -> GpuTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inside.size(), strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype,
            requires_grad=requires_grad,
        )  # fmt: skip
        made.inside = inside
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GpuTensor({self.inside!r})"

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inside"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> GpuTensor:
        return GpuTensor(inner["inside"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inside.__reduce_ex__(protocol)  # as `torch.load` with map_location="cpu" gives it back

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse_mixture(func, args, kwargs)
        result = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
        return return_and_correct_aliasing(func, args, kwargs, tree_map(wrapped, result))


def unwrapped(value: Any) -> Any:
    return value.inside if isinstance(value, GpuTensor) else value


def wrapped(value: Any) -> Any:
    """A conjugate that is only marked as one is made: the mark would stay inside."""
    if not isinstance(value, torch.Tensor) or isinstance(value, GpuTensor):
        return value
    return GpuTensor(value.resolve_conj().resolve_neg())


def refuse_mixture(func: Any, args: Any, kwargs: Any) -> None:
    """CUDA takes numbers of the CPU, copies from and to it, and indices from it."""
    if func in COPIES or (func in INDEXED and isinstance(args[0], GpuTensor)):
        args, kwargs = (args[0], *args[2:]) if func in INDEXED else (), {}
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        if not isinstance(tensor, GpuTensor) and tensor.dim():
            raise RuntimeError(
                f"{func}: expected all tensors on the same device, found cuda:0 and cpu, {list(tensor.shape)}"
            )


class _NamedDevices(TorchFunctionMode):
    """Moves what names a device, and makes on the CPU what would be made on the GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        own = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func is torch.Tensor.cuda:
            return moved(own, GPU)
        if func is torch.Tensor.cpu:
            return moved(own, torch.device("cpu"))
        if func is torch.Tensor.to:
            return self._to(own, *args[1:], **kwargs)
        if isinstance(own, GpuTensor) and func in (torch.Tensor.tolist, torch.Tensor.data_ptr):
            return func(own.inside)
        if isinstance(own, GpuTensor) and func is torch.Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func in LIKE and isinstance(own, GpuTensor):
            kwargs.setdefault("device", GPU)
            args = (own.inside, *args[1:])
        asked = kwargs.get("device")
        if asked is None:
            return func(*args, **kwargs)
        if on_gpu(asked):
            return moved(func(*args, **kwargs | {"device": "cpu"}), GPU)
        return func(*tree_map(unwrapped, args), **kwargs)

    def _to(self, own: Any, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
        """`x.to(device, dtype)`, `x.to(dtype)` or `x.to(other)`, each by position or by name."""
        named = [*args, *(kwargs[name] for name in ("device", "dtype", "other") if kwargs.get(name) is not None)]
        dtypes = [value.dtype if isinstance(value, torch.Tensor) else value for value in named]
        dtype = next((value for value in dtypes if isinstance(value, torch.dtype)), own.dtype)
        devices = [value.device if isinstance(value, torch.Tensor) else value for value in named]
        device = next((value for value in devices if isinstance(value, str | torch.device)), own.device)
        return moved(own.to(dtype=dtype, copy=copy) if dtype != own.dtype or copy else own, device)


def on_gpu(device: Any) -> bool:
    return torch.device(device).type == "cuda"


def moved(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    if isinstance(tensor, GpuTensor) == on_gpu(device):
        return tensor
    return _Move.apply(tensor)


class _Move(torch.autograd.Function):
    """A copy on the other device."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.inside.clone() if isinstance(tensor, GpuTensor) else GpuTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _Move.apply(gradient)


def _by_its_name_in_cpp(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(device_type, …)` asked of the CPU."""
    return lambda device_type="cpu", *args, **kwargs: function("cpu", *args, **kwargs)


def _in_the_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """A mode is off in the function that it has been asked about: here, in gradients that are written in Python."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with _NamedDevices():
            return function(*args, **kwargs)

    return called


@contextmanager
def pretended_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(mock.patch.object(torch, name, _by_its_name_in_cpp(getattr(torch, name))))
        cuda = {
            "is_available": lambda: True,
            "set_device": lambda *_: None,
            "get_device_capability": lambda *_: capability,
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *_: None,
        }
        for name, answer in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        run = torch.autograd._engine_run_backward
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", _in_the_mode(run)))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        stack.enter_context(_NamedDevices())
        yield
