"""Save and load checkpoints: the only place that does. What it does not know it refuses."""

import io
import os
import pickletools
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import nn

from utils.atomic import atomic_file, previous

_SHOWN = 3  # names that an error lists; the rest are counted
_ZIP = b"PK\x03\x04"  # the start of a zip, by which torch knows one
_CODE = re.compile(r"GLOBAL (\S+)|reduce for unrecognized function|Can only (?:create|build)|Unsupported operand 149")
_GROWS = re.compile(r"(builtins|__builtin__) bytearray|_codecs encode|torch(\.\w+)* (\w*Tensor|TypedStorage)")
_PICKLES = 5  # at the start of a file by an older torch
_DEEPEST, _MOST = 50, 10_000_000  # most nested containers, and most values, of a checkpoint


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message is one line: the file, the cause and what to do."""


def save(path: str | os.PathLike, payload: Any, *, keep_old: bool = False) -> None:
    """Save `payload` (tensors, numbers, strings and containers of them) at `path`, whole or not at all.

    Missing folders are made. A save that is killed leaves an older file unchanged.
    keep_old: keep the older file beside the new one, for `load_newest`.
    """
    with atomic_file(path, size=_bytes(payload), keep_old=keep_old) as file:
        torch.save(payload, file)


def load_newest(path: str | os.PathLike, device: str | torch.device = "cpu") -> Any | None:
    """Load `path`, or the file kept before it if `path` is missing or damaged; damage is said on stderr.

    Returns None if there is neither. Raises CheckpointError if none can be used.
    """
    files = [each for each in (Path(path), previous(Path(path))) if each.exists()]
    for number, file in enumerate(files, 1):
        try:
            return load(file, device)
        except CheckpointError as error:
            if number == len(files):
                raise
            print(f"{error}\nresumes from {files[number]}, the save before it", file=sys.stderr)
    return None


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> Any:
    """Load what `save` wrote, or any checkpoint of plain tensors and containers, onto `device`.

    It reads torch's zips, torch's older pickles and safetensors (a bare state dict), and tells them apart by content,
    not by name. The file is data, never code: a pickle that would build anything else is refused. There is no fallback.

    Raises:
        CheckpointError: the file is missing, unreadable, cut short, not a checkpoint, would run code, or claims more
            bytes than it has.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; check the path, or make the file first")
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file; give the path of one checkpoint, such as {path / 'model.pt'}")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            if start[8:] == b"{":  # safetensors: eight bytes of length, then a JSON header
                return load_file(path, device=str(device))
            if start.startswith(_ZIP):
                _check_claims(path)
            else:
                file.seek(0)
                for _ in range(_PICKLES):
                    _check_names(file, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickles by other programs, which are refused below
            payload = torch.load(path, map_location=device, weights_only=True)
        _count(payload, path, {})
        return payload
    except PermissionError as error:
        raise CheckpointError(f"{path}: may not be read; change its permissions (chmod u+r)") from error
    except (CheckpointError, torch.OutOfMemoryError):
        raise  # without memory the file may still be sound
    except OSError as error:
        why = error.strerror or "the file ends too soon"
        raise CheckpointError(f"{path}: cannot be read ({why}); look after the disk, or copy the file again") from error
    except Exception as error:  # the unpickler can raise nearly anything on a damaged file
        raise CheckpointError(f"{path}: {_cause(str(error), device)}") from error


def _check_claims(path: Path) -> None:
    """Refuse a zip whose records claim more bytes than the file has: torch would unpack them into memory.

    Torch compresses nothing, so its own records always fit. Then check each record's checksum, which torch writes
    but does not read.
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
        for record in archive.namelist():
            if record.endswith("data.pkl") and not damaged:
                _check_names(io.BytesIO(archive.read(record)), path)
    if damaged:
        raise CheckpointError(f"{path}: {damaged} in it does not match its checksum; copy or download it again")


def _check_names(file: BinaryIO, path: Path) -> None:
    """Read a pickle to its end, and refuse one that names a type made from a size: it could fill the memory.

    Torch refuses everything else that a pickle must not name.
    """
    try:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name == "GLOBAL" and _GROWS.fullmatch(argument):
                raise CheckpointError(
                    f"{path}: holds the object {argument.replace(' ', '.')}, and loading that could fill the memory; "
                    "save it again as a plain dictionary of tensors, numbers and strings"
                )
    except CheckpointError:
        raise
    except ValueError:  # not a pickle, as torch will say
        file.read()


def _count(value: Any, path: Path, known: dict[int, int], depth: int = 0) -> int:
    """Count the values in nested containers. A container that is there twice counts twice, as when it is printed.

    Raises CheckpointError for so many values, or so deep, that comparing or printing them would take for ever.
    """
    if not isinstance(value, Mapping | list | tuple | set):
        return 1
    if id(value) not in known:
        parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        total = 1 + sum(_count(each, path, known, depth + 1) for each in parts) if depth < _DEEPEST else _MOST + 1
        if total > _MOST:
            raise CheckpointError(
                f"{path}: holds lists in lists more than {_DEEPEST} deep, or of more than {_MOST:,} values, which no "
                "checkpoint needs; get it again from its source"
            )
        known[id(value)] = total
    return known[id(value)]


def entries(payload: Any, path: str | os.PathLike, expected: Mapping[str, Callable[[Any], bool]], what: str) -> None:
    """Refuse a checkpoint with a missing or unsound entry: CheckpointError.

    expected: entry -> function that says whether a value is sound; an entry may be missing if None is sound.
    what: the file that it should be.
    """
    if not isinstance(payload, dict) or len(set(expected) - set(payload)) > len(expected) / 2:
        raise CheckpointError(f"{path}: is no {what}")
    if missing := [name for name, sound in expected.items() if name not in payload and not sound(None)]:
        raise CheckpointError(f"{path}: lacks {', '.join(missing[:_SHOWN])}: is no {what}")
    if odd := [name for name, sound in expected.items() if not sound(payload.get(name))]:
        got = payload[odd[0]]
        shown_ = repr(got) if isinstance(got, int | float | str) else f"a {type(got).__name__}"
        raise CheckpointError(f"{path}: its {odd[0]} is {shown_:.40}: is no {what}")


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any, source: str | os.PathLike) -> None:
    """Restore what `optimizer.state_dict()` gave, except rates and the like, which come from the settings.

    Raises CheckpointError if it belongs to other parameters, is damaged or not finite. source: as in `check_state`.
    """
    try:
        optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
        sound = all(
            isinstance(part, torch.Tensor) and part.shape in (parameter.shape, ()) and bool(torch.isfinite(part).all())
            for parameter, parts in optimizer.state.items()
            for part in parts.values()
            if part is not None
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{source}: its optimiser's state is damaged, or of another network; take an earlier one")


def _cause(message: str, device: str | torch.device) -> str:
    refused = _CODE.search(message)
    if refused:  # operand 149 opens a frame, which torch never writes
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
    """Check that `state_dict` fits `module`: every name, every shape, only plain tensors.

    Nothing is copied, so `module` may be on the meta device, where it takes no memory.

    Args:
        module: the module to fill later.
        state_dict: parameter and buffer names with their tensors.
        source: what an error names as the origin, usually the file.

    Raises:
        CheckpointError: names up to three missing, unexpected and wrongly shaped entries each.
    """
    check_tensors(module.state_dict(), state_dict, source, type(module).__name__)


def check_tensors(expected: Mapping[str, torch.Tensor], state_dict: Any, source: str | os.PathLike, what: str) -> None:
    """Check names, shapes and kinds of tensors as `check_state` does. expected: the tensors of `what`."""
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise CheckpointError(f"{source}: got {kind}, expected a state dict (names with tensors); check the file")
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
            f"{source}: does not fit {what}: {'; '.join(problems)}; "
            "use the settings it was made with, or another checkpoint"
        )


def check_size(state_dict: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse weights of more bytes than their file has: CheckpointError.

    Tensors may share or repeat bytes of the file, so a small file could name a network of any size.
    """
    claimed, held = sum(weight.nbytes for weight in state_dict.values()), path.stat().st_size
    if claimed > held:
        raise CheckpointError(
            f"{path}: names {claimed:,} bytes of weights, expected at most the {held:,} of the file; "
            "get it again from its source"
        )


def load_state(module: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Copy `state_dict` into `module` if it passes `check_state` and has only finite numbers.

    If anything is wrong, nothing is copied. The module keeps its dtype. Arguments as in `check_state`.

    Raises:
        CheckpointError: as in `check_state`; or names up to three weights that are not finite in the module's dtype.
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
    """Return the bytes of all tensors in nested containers; everything else takes little."""
    if isinstance(payload, torch.Tensor):
        return payload.nbytes
    if isinstance(payload, Mapping):
        payload = payload.values()
    elif not isinstance(payload, list | tuple):
        return 0
    return sum(map(_bytes, payload))


def _is_plain(value: Any) -> bool:
    """Whether `value` is a dense tensor of real numbers; a stranger's file may hold others."""
    if not isinstance(value, torch.Tensor) or value.is_nested or value.layout != torch.strided:
        return False
    return not (value.is_meta or value.is_quantized or value.is_complex())


def _few(title: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{title}: {', '.join(names[:_SHOWN])}{more}"
