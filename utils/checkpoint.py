"""Save and load checkpoints. No other module does, and this one refuses anything unknown."""

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
_ZIP = b"PK\x03\x04"  # the start of a zip, as torch checks it
_CODE = re.compile(r"GLOBAL (\S+)|reduce for unrecognized function|Can only (?:create|build)|Unsupported operand 149")
_GROWS = re.compile(r"(builtins|__builtin__) bytearray|_codecs encode|torch(\.\w+)* (\w*Tensor|TypedStorage)")
_PICKLES = 5  # pickles at the start of a file by an older torch
_DEEPEST, _MOST = 50, 10_000_000  # limits of a checkpoint: nesting depth, and number of values


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
    """Load `path`, or its previous version if `path` is missing or damaged; damage is reported on stderr.

    Returns None if neither exists. Raises CheckpointError if none can be used.
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

    Torch's zips, torch's older pickles and safetensors (a bare state dict) are told apart by content, not by name. The
    file is data, never code: a pickle that would build anything else is refused. There is no fallback.

    Raises:
        CheckpointError: the file is missing, unreadable, cut short, or not a checkpoint; or it would run code, or
            claims more bytes than it has.
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
    """Raise CheckpointError for a zip whose records claim more bytes than the file has, or fail their checksums.

    Torch would unpack such records into memory. Its own are never compressed, so they always fit. Torch writes
    checksums but does not check them.
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
    """Read a pickle to its end. Raise CheckpointError if it names a type that a mere size can make fill the memory.

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
    """Count the values in nested containers. A container that occurs twice counts twice, as when it is printed.

    Raises CheckpointError for more values, or deeper nesting, than can be compared or printed in reasonable time.
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
    """Raise CheckpointError for a checkpoint with a missing or invalid entry.

    expected: entry -> function that returns whether a value is valid; an entry may be missing if None is valid.
    what: words for the expected file, in the message.
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
    """Restore the state from `optimizer.state_dict()`, except rates and other options, which come from the settings.

    Raises CheckpointError if it belongs to other parameters, is damaged or not finite. source: as for `check_state`.
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

    Nothing is copied, so `module` may be on the meta device, where it needs no memory.

    Args:
        module: the module to be filled later.
        state_dict: tensors by parameter and buffer name.
        source: the origin named in errors, usually the file.

    Raises:
        CheckpointError: entries are missing, unexpected or wrongly shaped; names up to three of each.
    """
    check_tensors(module.state_dict(), state_dict, source, type(module).__name__)


def check_tensors(expected: Mapping[str, torch.Tensor], state_dict: Any, source: str | os.PathLike, what: str) -> None:
    """Check tensors as `check_state` does. expected: tensors with the expected names and shapes, those of `what`."""
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
    """Raise CheckpointError for weights of more bytes than their file has.

    Tensors may share or repeat bytes of the file, so a small file could claim a network of any size.
    """
    claimed, held = sum(weight.nbytes for weight in state_dict.values()), path.stat().st_size
    if claimed > held:
        raise CheckpointError(
            f"{path}: names {claimed:,} bytes of weights, expected at most the {held:,} of the file; "
            "get it again from its source"
        )


def load_state(module: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Copy `state_dict` into `module` if it passes `check_state` and has only finite numbers.

    If anything is wrong, nothing is copied. The module keeps its dtype. Arguments as for `check_state`.

    Raises:
        CheckpointError: as for `check_state`; or weights are not finite in the module's dtype; names up to three.
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
    """Return the bytes of all tensors in nested containers, ignoring everything else, which is small."""
    if isinstance(payload, torch.Tensor):
        return payload.nbytes
    if isinstance(payload, Mapping):
        payload = payload.values()
    elif not isinstance(payload, list | tuple):
        return 0
    return sum(map(_bytes, payload))


def _is_plain(value: Any) -> bool:
    """Return whether `value` is a dense tensor of real numbers; a file from elsewhere may hold other tensors."""
    if not isinstance(value, torch.Tensor) or value.is_nested or value.layout != torch.strided:
        return False
    return not (value.is_meta or value.is_quantized or value.is_complex())


def _few(title: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{title}: {', '.join(names[:_SHOWN])}{more}"
