"""The one place that saves and loads checkpoints. It refuses what it does not know."""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.atomic import atomic_file

_SHOWN = 3  # names an error lists before it only counts


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message is one line: the file, the cause and the mend."""


def save(path: str | os.PathLike, payload: Any) -> None:
    """Save `payload` (tensors, numbers, strings and containers of them) at `path`, whole or not at all.

    Parent folders are made where missing. A save that is killed leaves an older file as it was.
    """
    with atomic_file(path) as file:
        torch.save(payload, file)


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> Any:
    """Load what `save` wrote, or any checkpoint of plain tensors and containers, onto `device`.

    The file is data, never code: a pickle that would build anything else is refused, without a fallback.

    Raises:
        CheckpointError: the file is missing, unreadable, cut short, no checkpoint, or would run code.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; check the path, or make the file first")
    if not path.is_file():
        raise CheckpointError(f"{path}: is not a file; give the path of one checkpoint, such as {path / 'model.pt'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles by other programs, refused just below
            return torch.load(path, map_location=device, weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path}: may not be read; change its permissions (chmod u+r)") from error
    except torch.OutOfMemoryError:
        raise  # the file is sound
    except Exception as error:  # a damaged file can raise nearly anything out of the unpickler
        raise CheckpointError(f"{path}: {_cause(str(error), device)}") from error


def _cause(message: str, device: str | torch.device) -> str:
    refused = re.search(r"GLOBAL (\S+)", message)
    if refused or "Unsupported operand 149" in message:  # 149 opens a frame: a pickle that torch did not write
        what = f"the object {refused[1]}" if refused else "pickled objects"
        return (
            f"holds {what}, and loading that could run code; "
            "save it again as a plain dictionary of tensors, numbers and strings"
        )
    if "deserialize object on" in message or "not available" in message or "No CUDA" in message:
        return f"cannot be put on device {device}; choose a device this machine has, such as cpu"
    return "is cut short or is no checkpoint; copy or download it again, or make it again"


def load_state(module: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str | os.PathLike) -> None:
    """Copy `state_dict` into `module`, strictly: every name, every shape, finite numbers only.

    Nothing is copied where anything is wrong.

    Args:
        module: the module to fill, in place.
        state_dict: parameter and buffer names with their tensors.
        source: what an error names as the origin, usually the file.

    Raises:
        CheckpointError: up to three missing, unexpected and wrong-shape names each, or non-finite weights.
    """
    if not isinstance(state_dict, Mapping):
        kind = type(state_dict).__name__
        raise CheckpointError(f"{source}: got {kind}, expected a state dict (names with tensors); check the file")
    expected = module.state_dict()
    missing = [name for name in expected if name not in state_dict]
    unexpected = [str(name) for name in state_dict if name not in expected]
    shared = [name for name in expected if name in state_dict]
    no_tensor = [name for name in shared if not isinstance(state_dict[name], torch.Tensor)]
    tensors = [name for name in shared if name not in no_tensor]
    wrong_shape = [
        f"{name} (got {tuple(state_dict[name].shape)}, expected {tuple(expected[name].shape)})"
        for name in tensors
        if state_dict[name].shape != expected[name].shape
    ]
    problems = [
        _few(title, names)
        for title, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("not a tensor", no_tensor),
            ("wrong shape", wrong_shape),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source}: does not fit {type(module).__name__}: {'; '.join(problems)}; "
            "use the settings it was made with, or another checkpoint"
        )
    not_finite = [name for name in tensors if not bool(torch.isfinite(state_dict[name]).all())]
    if not_finite:
        raise CheckpointError(
            f"{source}: {_few('weights that are NaN or infinite', not_finite)}; "
            "its training diverged: use an earlier checkpoint or train again with a lower rate"
        )
    module.load_state_dict(state_dict, strict=True)


def _few(title: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{title}: {', '.join(names[:_SHOWN])}{more}"
