"""Pickles of arrays are read; pickles that ask for anything else are refused before anything of them runs."""

import os
import pickle

import numpy as np
import pytest

from datasets.plain_pickle import read_plain_pickle

ARRAYS = {
    "bytes": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "turned": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    "big_endian": np.arange(4, dtype=">i4"),
    "floats": np.linspace(0, 1, 5, dtype=np.float32),
    "view": np.arange(20, dtype=np.int16)[::3],
}


class Asks:
    """Asks for `function(*arguments)` when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write(path, value, protocol=None):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_and_arrays_come_back(protocol, tmp_path):
    plain = {"list": [1, 2.5, None, True, (3, "x")], "text": "größe", "nested": {"a": [1]}, "raw": b"\x00\xff"}
    read = read_plain_pickle(write(tmp_path / "a.pkl", {**plain, **ARRAYS, "number": np.int64(7)}, protocol))
    assert {key: read[key] for key in plain} == plain and read["number"] == 7
    for key, array in ARRAYS.items():
        got = np.asarray(read[key])
        assert got.dtype == array.dtype and got.shape == array.shape and np.array_equal(got, array), key


def test_python_2_pickle(tmp_path):
    """An array and text as Python 2 and numpy 1 wrote them: byte strings throughout."""
    two = (
        b"\x80\x02}q\x00U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b"
        b"\x87Rq\x04(K\x01K\x02K\x02\x86cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87Rq\x06(K\x03U\x01|NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x04\x01\x7f\x80\xfftbs."
    )
    (tmp_path / "two.pkl").write_bytes(two)
    read = read_plain_pickle(tmp_path / "two.pkl")
    assert np.asarray(read["data"]).tolist() == [[1, 127], [128, 255]] and np.asarray(read["data"]).dtype == np.uint8


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("function", [exec, os.mkdir, np.save, np.frombuffer], ids=lambda f: f.__name__)
def test_a_call_is_refused_and_not_made(function, protocol, tmp_path):
    made = tmp_path / "made"
    arguments = {exec: (f"open({str(made)!r}, 'w')",), np.save: (str(made), 1)}.get(function, (str(made),))
    path = write(tmp_path / "bad.pkl", {"image_data": Asks(function, *arguments)}, protocol)
    with pytest.raises(ValueError, match=rf"bad.pkl: was not read, as it asks for \w+.{function.__name__}") as error:
        read_plain_pickle(path)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == [path]


def test_arrays_of_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="asks for an array of dtype object"):
        read_plain_pickle(write(tmp_path / "o.pkl", {"a": np.array([None, {}], dtype=object)}))


def test_names_reached_through_an_allowed_one_are_refused(tmp_path):
    path = tmp_path / "dotted.pkl"
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x13ndarray.__init__.x_\x93.")
    with pytest.raises(ValueError, match="asks for numpy.ndarray.__init__"):
        read_plain_pickle(path)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": np.arange(99)})[:-20], b"\x80\x05(."])
def test_damaged(content, tmp_path):
    (tmp_path / "cut.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="cut.pkl: is cut short or is no pickle"):
        read_plain_pickle(tmp_path / "cut.pkl")


def test_no_dict(tmp_path):
    with pytest.raises(ValueError, match="got a list, expected a dict"):
        read_plain_pickle(write(tmp_path / "list.pkl", [1, 2]))
