"""Read a pickle of plain values and numpy arrays without running any code that it names.

A pickle can call any function that it can name. Here it can name only what numpy writes for arrays, numbers and dtypes,
and even these names resolve to the stand-ins below, which do nothing but build numeric arrays from bytes.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np


class _Refused(ValueError):
    """The pickle has a name that plain data does not need."""


class _Dtype:
    """Stand-in for numpy.dtype."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biuf":
            raise _Refused(f"an array of dtype {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])

    def array(self, raw: Any, shape: Any = -1, order: str = "C") -> np.ndarray:
        if isinstance(raw, str):  # bytes from Python 2, read as latin1
            raw = raw.encode("latin1")
        return np.frombuffer(raw, self.dtype).reshape(shape, order=order)


class _Array:
    """Stand-in for an empty numpy.ndarray that the pickle fills; `np.asarray` returns its contents."""

    def __init__(self, *_: Any) -> None:
        self.value = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = dtype.array(raw, shape, "F" if fortran else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.value, dtype, copy=copy)


def _scalar(dtype: _Dtype, raw: Any) -> int | float | bool:
    return dtype.array(raw).item()


def _frombuffer(raw: Any, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
    return dtype.array(raw, shape, order)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode(encoding)  # str.encode knows text encodings only


_STAND_INS = {
    "numpy.ndarray": _Array,  # an argument of _reconstruct, which ignores it
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,  # how protocol 2 writes bytes
}
for _numpy in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    _STAND_INS[f"{_numpy}.multiarray._reconstruct"] = _Array
    _STAND_INS[f"{_numpy}.multiarray.scalar"] = _scalar
    _STAND_INS[f"{_numpy}.numeric._frombuffer"] = _frombuffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None


def read_plain_pickle(path: Path) -> dict:
    """Read the dict pickled at `path`; Python 2 text becomes str. Use `np.asarray` on its arrays.

    Raises:
        ValueError: the pickle names anything but numpy's arrays (which is not run), is cut short, or is not a dict.
        OSError: as from `open`.
    """
    with open(path, "rb") as file:
        try:
            value = _Unpickler(file, encoding="latin1").load()
        except _Refused as error:
            raise ValueError(
                f"{path}: was not read, as it asks for {error}, which plain arrays do not need and which could run "
                "code; get the file from its source again"
            ) from None
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path}: is cut short or is no pickle ({error}); get it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: got a {type(value).__name__}, expected a dict; get the file from its source again")
    return value
