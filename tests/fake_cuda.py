"""A GPU that is not there: memory of the CPU that counts as the GPU's, so that the program runs as on a GPU.

torch's FakeTensorMode needs no GPU either, but a backward pass through its GPU tensors needs a driver, and they hold no
numbers. Here kernels of the CPU compute, so that results can be compared with those of a run on the CPU. Which memory
is the GPU's is noted at its storage, which views, saved activations and gradients share.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _device
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion import noise_levels, pool
from models import learners

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# what a GPU cannot do without an answer to the host: a number, or how large a result is
ANSWERS = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2",
    "unique_consecutive", "unique_dim", "bincount", "repeat_interleave",
}  # fmt: skip
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}  # and by a mask, whose True entries are counted
H100 = {0: (9, 0)}  # cards: their compute capability

_makes_on_gpu = ContextVar("makes_on_gpu", default=False)  # where tensors that are made from nothing are


def on_gpu(tensor: Tensor) -> bool:
    """Return whether the memory of a tensor counts as the GPU's."""
    with torch._C.DisableTorchFunction():
        return getattr(tensor.untyped_storage(), "on_gpu", False)


def put(out: Any, gpu: bool) -> Any:
    """Note that the memory of all tensors in `out` is the GPU's or the CPU's. Return `out`."""
    with torch._C.DisableTorchFunction():
        for each in tensors_in(out):
            each.untyped_storage().on_gpu = gpu
    return out


def tensors_in(items: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    if isinstance(items, Tensor):
        return [items]
    if isinstance(items, dict):
        items = items.values()
    elif not isinstance(items, list | tuple):
        return []
    return [found for each in items for found in tensors_in(each)]


def is_gpu(device: torch.device | str | int | None) -> bool | None:
    """Return whether a device is the GPU; None if it is neither that nor the CPU."""
    return {"cuda": True, "cpu": False}.get(torch.device(device).type)


class Generator(torch.Generator):
    """torch.Generator, which would need a driver to make one on the GPU."""

    def __new__(cls, device: torch.device | str = CPU) -> torch.Generator:
        return super().__new__(CudaGenerator if is_gpu(device) else torch._C.Generator)


class CudaGenerator(torch._C.Generator):
    """A generator that says it is on the GPU. It draws what one on the CPU draws."""

    device = GPU


class FakeCuda:
    """What a machine with a GPU does: RuntimeError where an operation mixes devices.

    Attributes:
        waits: each time that the host waits for the GPU: for what, and at which line of the program.
        chosen: the cards that were made the current one. Tensors are all on card 0.
    """

    def __init__(self) -> None:
        self.waits: list[str] = []
        self.chosen: list[int | None] = []

    def wait(self, what: str) -> None:
        """Note that the host waits for the GPU."""
        frame = sys._getframe(1)
        while frame.f_code.co_filename == __file__ or "site-packages" in frame.f_code.co_filename:
            frame = frame.f_back
        self.waits.append(f"{what}, {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")

    def move(self, gpu: bool, non_blocking: bool | None) -> None:
        """Note a copy to the GPU or to the CPU. Only one that is sent ahead does not wait."""
        if not (gpu and non_blocking):
            self.wait("to the GPU" if gpu else "from the GPU")


@contextmanager
def fake_cuda(cards: Mapping[int, tuple[int, int]] = H100, memory: int = 2**33) -> Iterator[FakeCuda]:
    """Put GPUs into this machine. Tables that are kept per device are forgotten before and after.

    cards: number -> compute capability; memory: free bytes of each.
    """
    cuda = FakeCuda()
    _device._device_constructors()  # which torch keeps, before they are replaced
    with pytest.MonkeyPatch.context() as patch, _Made(), _Operations(cuda):
        _patch_tensors(patch, cuda)
        _patch_torch(patch, cuda)
        _patch_answers(patch, cuda, cards, memory)
        try:
            _forget_tables()
            yield cuda
        finally:
            _forget_tables()


def _forget_tables() -> None:
    pool._process.cache_clear()
    noise_levels.shared_process.cache_clear()
    learners.view_draws.cache_clear()


class _Made(TorchFunctionMode):
    """Tensors that a function makes from nothing are where its arguments are, and so must its generator be."""

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        here = any(map(on_gpu, given)) if given else _makes_on_gpu.get()
        generator = kwargs.get("generator")
        if generator is not None and isinstance(generator, CudaGenerator) != here:
            raise RuntimeError(f"{func}: got a generator on {generator.device}, expected one where the result is")
        with _making(here):
            return func(*args, **kwargs)


@contextmanager
def _making(gpu: bool) -> Iterator[None]:
    token = _makes_on_gpu.set(gpu)
    try:
        yield
    finally:
        _makes_on_gpu.reset(token)


class _Operations(TorchDispatchMode):
    """Every operation, those of backward passes too: refuses mixed devices, and notes what waits."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import it: seconds

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given, name = tensors_in((args, kwargs)), func.overloadpacket.__name__
        if name == "copy_":
            gpu = on_gpu(args[0])
            if gpu != on_gpu(args[1]):
                self.cuda.move(gpu, (*args, kwargs.get("non_blocking"))[2])
            return func(*args, **kwargs)
        here = any(map(on_gpu, given)) if given else _makes_on_gpu.get()
        if here and any(each.dim() and not on_gpu(each) for each in given):
            where = ", ".join(f"{tuple(each.shape)} on {each.device}" for each in given)
            raise RuntimeError(f"{func}: expected all tensors on the same device, got {where}")
        if here and (name in ANSWERS or name in BY_INDEX and any(m.dtype in _MASKS for m in tensors_in(args[1]))):
            self.cuda.wait(name)
        out = func(*args, **kwargs)
        return put(out, True) if here else out


_MASKS = (torch.bool, torch.uint8)


def _patch_tensors(patch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    """Have tensors say where they are, and move."""
    base = torch._C.TensorBase

    def to(tensor: Tensor, *args, copy: bool = False, **kwargs) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        was, gpu = on_gpu(tensor), None if device is None else is_gpu(device)
        if gpu is None and device is not None:
            return base.to(tensor, *args, copy=copy, **kwargs)
        moves = gpu is not None and gpu != was
        format_of = {} if layout is None else {"memory_format": layout}
        out = base.to(tensor, dtype or tensor.dtype, copy=copy or moves, **format_of)
        if moves:
            cuda.move(gpu, non_blocking)
            put(out, gpu)
        return out

    def tolist(tensor: Tensor) -> list:
        if on_gpu(tensor):
            cuda.wait("tolist")
        with torch._C.DisableTorchFunction():
            return base.tolist(tensor)

    def numpy(tensor: Tensor, **kwargs) -> Any:
        if on_gpu(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        return base.numpy(tensor, **kwargs)

    def new_tensor(tensor: Tensor, data: Any, **kwargs) -> Tensor:
        return torch.tensor(data, **{"dtype": tensor.dtype, "device": tensor.device, **kwargs})

    for function in (to, tolist, numpy, new_tensor):
        patch.setattr(Tensor, function.__name__, function, raising=False)
    patch.setattr(Tensor, "cpu", lambda tensor: to(tensor, CPU), raising=False)
    patch.setattr(Tensor, "cuda", lambda tensor: to(tensor, GPU), raising=False)
    patch.setattr(Tensor, "pin_memory", lambda tensor: tensor, raising=False)
    patch.setattr(Tensor, "is_cuda", property(on_gpu), raising=False)
    where = base.device.__get__
    patch.setattr(Tensor, "device", property(lambda tensor: GPU if on_gpu(tensor) else where(tensor)), raising=False)


def _patch_torch(patch: pytest.MonkeyPatch, cuda: FakeCuda) -> None:
    """Have torch make tensors and generators on the GPU, and read checkpoints onto it."""

    def maker(make: Callable) -> Callable:
        def make_there(*args, device=None, **kwargs):
            gpu = False if device is None else is_gpu(device)
            if gpu is None or tensors_in((args, kwargs)):
                return make(*args, **kwargs | ({} if device is None else {"device": device}))
            if gpu and make.__name__ in ("tensor", "as_tensor", "asarray"):
                cuda.wait(f"{make.__name__} to the GPU")
            with _making(gpu):
                out = make(*args, **kwargs | ({} if device is None else {"device": CPU}))
            return put(out, True) if gpu else out

        return make_there

    def load(path: Any, map_location: Any = None, **kwargs) -> Any:
        loaded = read(path, map_location=CPU, **kwargs)
        return put(loaded, True) if map_location is not None and is_gpu(map_location) else loaded

    def group(*args) -> dict:
        found = grouped(*args)
        return {(each[0][0][0].device, dtype): each for (_, dtype), each in found.items()}

    read, grouped = torch.load, torch._C._group_tensors_by_device_and_dtype
    for make in _device._device_constructors():
        if getattr(torch, make.__name__, None) is make:
            patch.setattr(torch, make.__name__, maker(make))
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(torch, "load", load)
    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", group)


def _patch_answers(
    patch: pytest.MonkeyPatch, cuda: FakeCuda, cards: Mapping[int, tuple[int, int]], memory: int
) -> None:
    """Have torch.cuda say what it says where there are such cards."""
    answers = dict(
        is_available=lambda: True, current_device=lambda: 0, empty_cache=lambda: None,
        set_device=lambda device: cuda.chosen.append(torch.device(device).index),
        get_device_capability=lambda device=None: cards[torch.device(device).index],
        is_bf16_supported=lambda including_emulation=True: True,  # of any card, as torch emulates it
        get_device_name=lambda device=None: "fake", mem_get_info=lambda device=None: (memory, memory),
        is_current_stream_capturing=lambda: False,
    )  # fmt: skip
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, answer)
