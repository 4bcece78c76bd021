"""A second device on top of the CPU, as strict as an accelerator, for machines that have none.

A tensor "on" it holds a CPU tensor, on which every operation is run; that it is elsewhere is enforced:

- operations between tensors of both places are refused (CPU tensors of no dimension pass, as on CUDA);
- float64 is refused, as on MPS;
- random numbers for it from a generator of the CPU are refused, as on CUDA;
- whatever makes the host wait for the device is counted by `host_syncs`: values read, copies either way, and operations
  whose result's size depends on values.

Autograd works through it. No speed and no kernel of a real accelerator is claimed of it.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
import torch.utils.backend_registration as registration
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

import lnfree_interp

DEVICE = "virtual"
PACKAGE = str(Path(lnfree_interp.__file__).parent)
aten = torch.ops.aten

# Operations that a real device cannot finish without telling the host something.
SYNCING = {
    aten._local_scalar_dense: "value read",
    aten.equal: "equal",
    aten.nonzero: "nonzero",
    aten.masked_select: "masked_select",
    aten._unique: "unique",
    aten._unique2: "unique",
    aten.unique_dim: "unique",
    aten.unique_consecutive: "unique",
    aten.unique_dim_consecutive: "unique",
    aten.bincount: "bincount",
}
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
JOINING = (aten.cat, aten.stack)

_counters: list[Counter[str]] = []


class _Type(type(Tensor)):
    """TransformerLens asks whether a tensor's type == torch.Tensor, which an accelerator's would be."""

    def __eq__(cls, other):
        return other is cls or other is Tensor

    __hash__ = type(Tensor).__hash__


class VirtualTensor(Tensor, metaclass=_Type):
    """A tensor that says it is on the virtual device; `held` is the CPU tensor behind it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, device=f"{DEVICE}:0", **layout)

    def __init__(self, held: Tensor):
        if held.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{_place()}: the virtual device has no {held.dtype}, as MPS has none")
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, *args, **(kwargs or {}))

    # What Tensor itself does without dispatching.
    def tolist(self):
        return self.cpu().tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    def __repr__(self, **_):
        return f"{type(self).__name__}({self.held!r})"

    def __deepcopy__(self, memo):
        return self.detach().clone().requires_grad_(self.requires_grad)


def _run(func, *args, **kwargs):
    """Any operation that has to do with the device, on the tensors held."""
    packet = func.overloadpacket
    if packet in (aten.copy_, aten._copy_from, aten._to_copy):
        return _copied(func, args, kwargs)
    there: list[VirtualTensor] = []
    here: list[Tensor] = []
    held_args = _opened(args, there, here)
    held_kwargs = dict(zip(kwargs, _opened(kwargs.values(), there, here)))
    if there and here:
        _check_mixed(func, args, here)
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{_place()}: {func} draws for the virtual device from a generator of the CPU")
    if packet in SYNCING:
        _count(SYNCING[packet])
    elif packet is aten.repeat_interleave and isinstance(args[0], Tensor) and kwargs.get("output_size") is None:
        _count("repeat_interleave")
    elif packet in INDEXING:
        _count_masks(packet, args)
    if kwargs.get("device") is not None:
        held_kwargs["device"] = "cpu"
    result = func(*held_args, **held_kwargs)
    if torch.Tag.inplace_view in func.tags:  # squeeze_ and the like: the shell takes the new shape too
        with no_dispatch():
            func(*args, **kwargs)
    if isinstance(result, (list, tuple)):
        return type(result)(_closed(x, there) for x in result)
    return _closed(result, there)


def _opened(values, there: list[VirtualTensor], here: list[Tensor]) -> list:
    """Arguments with the tensors held in place of those on the device; what tensors there are, by place."""
    opened = []
    for x in values:
        if isinstance(x, VirtualTensor):
            there.append(x)
            x = x.held
        elif isinstance(x, Tensor):
            here.append(x)
        elif isinstance(x, (list, tuple)):
            x = _opened(x, there, here)
        opened.append(x)
    return opened


def _closed(x, there: list[VirtualTensor]):
    """A result as a tensor on the device: the one that was written in place, or a new one."""
    if not isinstance(x, Tensor):
        return x
    for own in there:
        if own.held is x:
            if own.shape != x.shape:
                raise NotImplementedError(f"a tensor on the virtual device grew in place to {list(x.shape)}")
            return own
    return VirtualTensor(x)


def _copied(func, args, kwargs):
    """The copies: from one place to the other they make the host wait, unless they needn't."""
    kwargs = dict(kwargs)
    if func.overloadpacket is aten._to_copy:
        (source,) = args
        to = torch.device(kwargs["device"] or source.device) if "device" in kwargs else source.device
        to_device = to.type == DEVICE
        kwargs["device"] = "cpu"
    else:
        target, source = args[:2] if func.overloadpacket is aten.copy_ else args[1::-1]
        to_device = isinstance(target, VirtualTensor)
    from_device = isinstance(source, VirtualTensor)
    if from_device and not to_device:
        _count("copy to the CPU")
        if (kwargs.get("dtype") if func.overloadpacket is aten._to_copy else target.dtype) == torch.float64:
            raise TypeError(f"{_place()}: copied and cast to float64 at once, MPS casts first; copy, then cast")
    elif to_device and not from_device and not kwargs.get("non_blocking", args[2:] == (True,)):
        _count("copy to the device")
    source = source.held if from_device else source
    if func.overloadpacket is aten._to_copy:
        result = func(source, **kwargs)
        return VirtualTensor(result) if to_device else result
    (target.held if to_device else target).copy_(source)
    return target


def _check_mixed(func, args, here: list[Tensor]) -> None:
    packet = func.overloadpacket
    if packet in INDEXING and isinstance(args[0], VirtualTensor):
        indices = [x for x in args[1] if x is not None and not isinstance(x, VirtualTensor)]
        for _ in indices:
            _count("index on the CPU")
        here = [x for x in here if not any(x is index for index in indices)]
    if any(x.ndim for x in here) or (here and packet in JOINING):
        shapes = [list(x.shape) for x in here]
        raise RuntimeError(f"{_place()}: {func} of tensors on the virtual device and of CPU tensors of shapes {shapes}")


def _count_masks(packet, args) -> None:
    """Indexing by a mask looks for what is true; setting one value there does not."""
    masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
    one_value = packet in INDEXING[1:4] and args[2].numel() == 1
    if masks and not one_value:
        _count("index by a mask")


def _count(what: str) -> None:
    for counter in _counters:
        counter[f"{_place()}: {what}"] += 1


def _place() -> str:
    """The line of the package that asks for it."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside the package"


# ---------------------------------------------------------------------------------------------------------
# What tests use

_setup = getattr(registration, "_setup_privateuseone_for_python_backend", None)
MISSING = None if _setup else f"PyTorch {torch.__version__} cannot have a device written in Python"


@cache
def register() -> tuple[torch.library.Library, ...]:
    """Makes "virtual" a device of PyTorch's; nothing else finds an accelerator by that."""

    class Hooks(registration._DummyPrivateUse1Hook):
        def is_available(self):
            return False

    class Module(registration._DummyBackendModule):
        def is_available(self):
            return False

    _setup(DEVICE, hook=Hooks(), backend_module=Module())
    # Only what begins without a tensor on the device comes here: making one, and copying into it. Those by name have
    # a way of their own that the fallback does not reach, of which making an empty tensor and resizing it is part.
    library, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    for op in (aten.copy_.default, aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default):
        library.impl(op, partial(_run, op), "PrivateUse1")
    fallback.fallback(_run, "PrivateUse1")
    return library, fallback


def on_device(model):
    """The same model on the virtual device."""
    register()
    moved = copy.deepcopy(model)
    for module in moved.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    new = x.detach().to(DEVICE)
                    tensors[name] = torch.nn.Parameter(new, False) if tensors is module._parameters else new
    moved.cfg.device = DEVICE
    return moved


@contextmanager
def host_syncs() -> Iterator[Counter[str]]:
    """Counts what makes the host wait for the device, by the line of the package and what it is."""
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)
