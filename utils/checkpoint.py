"""The one place that saves and loads checkpoints. It refuses what it does not know."""

import os
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from utils.atomic import atomic_file, previous

_SHOWN = 3  # names an error lists before it only counts
_ZIP = b"PK\x03\x04"  # how a zip begins, which is what torch goes by
_CODE = re.compile(r"GLOBAL (\S+)|reduce for unrecognized function|Can only (?:create|build)|Unsupported operand 149")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line: the file, the cause and the mend."""


def save(path: str | os.PathLike, payload: Any, *, keep_old: bool = False) -> None:
    """Save `payload` (tensors, numbers, strings and containers of them) at `path`, whole or not at all.

    Parent folders are made where missing. A save that is killed leaves an older file as it was.
    keep_old: keep that older one beside it, for `load_newest`.
    """
    with atomic_file(path, size=_bytes(payload), keep_old=keep_old) as file:
        torch.save(payload, file)


def load_newest(path: str | os.PathLike, device: str | torch.device = "cpu") -> Any | None:
    """Load `path`, or, where it is damaged, which is said on stderr, or missing, the one kept before it.

    None where neither is there. Raises CheckpointError, of `path`, where none can be used.
    """
    files = [each for each in (Path(path), previous(Path(path))) if each.exists()]
    for number, file in enumerate(files, 1):
        try:
            return load(file, device)
        except CheckpointError as error:
            if number == len(files):
                raise
            print(f"{error}\ngoing on from {files[number]}, the save before it", file=sys.stderr)
    return None


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> Any:
    """Load what `save` wrote, or any checkpoint of plain tensors and containers, onto `device`.

    Torch's zips, its older pickles, and safetensors, which give a bare state dict; the content tells them apart, not
    the name. The file is data, never code: a pickle that would build anything else is refused, without a fallback.

    Raises:
        CheckpointError: the file is missing, unreadable, cut short, no checkpoint, would run code, or claims more
            than it has.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; check the path, or make the file first")
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file; give the path of one checkpoint, such as {path / 'model.pt'}")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # after eight bytes of its length, the header of safetensors
            return load_file(path, device=str(device))
        if start.startswith(_ZIP):
            _check_claims(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles by other programs, refused just below
            return torch.load(path, map_location=device, weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path}: may not be read; change its permissions (chmod u+r)") from error
    except (CheckpointError, torch.OutOfMemoryError):
        raise  # of the latter the file is sound
    except Exception as error:  # a damaged file can raise nearly anything out of the unpickler
        raise CheckpointError(f"{path}: {_cause(str(error), device)}") from error


def _check_claims(path: Path) -> None:
    """Refuse a zip whose records claim more bytes than the file has, which torch would unpack into memory.

    Torch compresses nothing, so that its own records always fit. Then each is held against its checksum, which torch
    writes but does not read.
    """
    with zipfile.ZipFile(path) as archive:
        claimed = sum(record.file_size for record in archive.infolist())
        held = path.stat().st_size
        if claimed > held:
            raise CheckpointError(
                f"{path}: is a zip of records that claim {claimed:,} bytes, expected at most the {held:,} of the file; "
                "get it again from its source, or save it again with torch.save"
            )
        damaged = archive.testzip()
    if damaged:
        raise CheckpointError(f"{path}: {damaged} in it does not match its checksum; copy or download it again")


def _cause(message: str, device: str | torch.device) -> str:
    refused = _CODE.search(message)
    if refused:  # operand 149 opens a frame: a pickle that torch did not write
        what = f"the object {refused[1]}" if refused[1] else "pickled objects"
        return (
            f"holds {what}, and loading that could run code; "
            "save it again as a plain dictionary of tensors, numbers and strings"
        )
    if "TorchScript" in message:
        return "is a TorchScript program, which is code; save its state_dict() with torch.save instead"
    if "deserialize object on" in message or "not available" in message or "No CUDA" in message:
        return f"cannot be put on device {device}; choose a device this machine has, such as cpu"
    allocation = re.search(r"tried to allocate (\d+) bytes", message)
    if allocation:
        return (
            f"asks for {int(allocation[1]):,} bytes of memory, more than there is; "
            "get it again from its source, or use a machine with more memory"
        )
    return "is cut short or is no checkpoint; copy or download it again, or make it again"


def check_state(module: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Check that `state_dict` fits `module`, strictly: every name, every shape, plain tensors only.

    Nothing is copied, and `module` may be on the meta device, where it takes no memory yet.

    Args:
        module: the module to fill later.
        state_dict: parameter and buffer names with their tensors.
        source: what an error names as the origin, usually the file.

    Raises:
        CheckpointError: up to three missing, unexpected and wrong-shape names each.
    """
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise CheckpointError(f"{source}: got {kind}, expected a state dict (names with tensors); check the file")
    expected = module.state_dict()
    missing = [name for name in expected if name not in state_dict]
    unexpected = [str(name) for name in state_dict if name not in expected]
    shared = [name for name in expected if name in state_dict]
    no_tensor = [name for name in shared if not _is_plain(state_dict[name])]
    wrong_shape = [
        f"{name} (got {tuple(state_dict[name].shape)}, expected {tuple(expected[name].shape)})"
        for name in shared
        if name not in no_tensor and state_dict[name].shape != expected[name].shape
    ]
    problems = [
        _few(title, names)
        for title, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("not a tensor of plain numbers", no_tensor),
            ("wrong shape", wrong_shape),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source}: does not fit {type(module).__name__}: {'; '.join(problems)}; "
            "use the settings it was made with, or another checkpoint"
        )


def load_state(module: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Copy `state_dict` into `module`, strictly: as `check_state` has it, and finite numbers only.

    Nothing is copied where anything is wrong. The module keeps its dtype, whatever that of the tensors.
    Arguments as of `check_state`.

    Raises:
        CheckpointError: as of `check_state`, or up to three names of weights that are not finite in the module's dtype.
    """
    check_state(module, state_dict, source)
    not_finite = [
        name
        for name, target in module.state_dict().items()
        if not bool(torch.isfinite(state_dict[name].to(target.dtype)).all())
    ]
    if not_finite:
        raise CheckpointError(
            f"{source}: {_few('weights that are NaN or infinite', not_finite)}; "
            "its training diverged: use an earlier checkpoint or train again with a lower rate"
        )
    module.load_state_dict(state_dict, strict=True)


def _bytes(payload: Any) -> int:
    """Of all tensors in a nest of containers; what else there is takes little."""
    if isinstance(payload, torch.Tensor):
        return payload.nbytes
    if isinstance(payload, Mapping):
        payload = payload.values()
    elif not isinstance(payload, list | tuple):
        return 0
    return sum(map(_bytes, payload))


def _is_plain(value: Any) -> bool:
    """Whether `value` is a dense tensor with numbers in it, real ones, as a file of strangers need not have."""
    if not isinstance(value, torch.Tensor) or value.is_nested or value.layout != torch.strided:
        return False
    return not (value.is_meta or value.is_quantized or value.is_complex())


def _few(title: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{title}: {', '.join(names[:_SHOWN])}{more}"
