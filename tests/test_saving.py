"""Saves that fail, are damaged or run out of room; records of epochs that are done again."""

import errno
import io
import json

import pytest
import torch

from tests.conftest import same
from utils import checkpoint, stopping
from utils.atomic import DiskFull, atomic_file, previous
from utils.pieces import Pieces, discard
from utils.run_log import RunLog

STATES = [{"step": step, "w": torch.full((40,), float(step))} for step in range(3)]


@pytest.fixture
def last(tmp_path):
    path = tmp_path / "last.pt"
    for state in STATES:
        checkpoint.save(path, state, keep_old=True)
    return path


def flip(path):
    """Change a byte in the middle of the numbers of a checkpoint."""
    content = bytearray(path.read_bytes())
    content[content.index(STATES[2]["w"].numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-60])


def test_two_saves_are_kept(last):
    assert same(checkpoint.load(last), STATES[2]) and same(checkpoint.load(previous(last)), STATES[1])
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.previous.pt", "last.pt"]
    assert same(checkpoint.load_newest(last), STATES[2])


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_newest_is_reported_and_the_one_before_it_used(last, capsys, damage):
    damage(last)
    assert same(checkpoint.load_newest(last), STATES[1])
    err = capsys.readouterr().err
    assert "last.pt: " in err and f"resumes from {previous(last)}" in err
    previous(last).unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt"):
        checkpoint.load_newest(last)


def test_between_the_two_renames_of_a_save(last):
    last.unlink()
    assert same(checkpoint.load_newest(last), STATES[1])
    previous(last).unlink()
    assert checkpoint.load_newest(last) is None


def test_a_full_disk_says_how_much_is_needed_and_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    checkpoint.save(path, STATES[0])
    real = open

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", lambda name, mode="r", *a, **k: (Full if mode == "wb" else real)(name, mode))
    with pytest.raises(DiskFull, match=r"a\.pt: the disk is full: 4,000 bytes are needed"):
        checkpoint.save(path, {"w": torch.zeros(1000)})
    monkeypatch.undo()
    assert same(checkpoint.load(path), STATES[0]) and [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_other_failures_pass_unchanged(tmp_path):
    with pytest.raises(RuntimeError, match="odd"), atomic_file(tmp_path / "a"):
        raise RuntimeError("odd")
    assert not list(tmp_path.iterdir())


def test_epochs_that_are_done_again_are_recorded_once(tmp_path):
    log = RunLog(tmp_path)
    for epoch in (1, 2, 3):
        log.record({"epoch": epoch})
    with open(log.metrics_path, "a") as file:
        file.write('{"epoch": 4, "lo')
    RunLog(tmp_path).forget_after(2)
    assert [json.loads(line) for line in log.metrics_path.read_text().splitlines()] == [{"epoch": 1}, {"epoch": 2}]


@pytest.mark.parametrize("on_disk", [True, False])
def test_pieces(tmp_path, on_disk):
    folder, names = tmp_path / "pieces" if on_disk else None, ["b", "a", "c"]
    pieces = Pieces(folder)
    assert pieces.mine(names) == names
    for number, name in enumerate(names[:2]):
        pieces.keep(name, number)
    later = Pieces(folder) if on_disk else pieces
    assert later.mine(names) == (["c"] if on_disk else names)
    later.keep("c", 2)
    assert later.collect(names) == [0, 1, 2]
    if on_disk:
        discard(folder)
    assert not list(tmp_path.iterdir())


def test_without_a_signal_nothing_stops():
    with stopping.heeded():
        stopping.check()
        assert not stopping.asked()
