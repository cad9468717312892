"""Progress: a bar on a terminal, lines elsewhere, nothing when it is quick or not wanted."""

import io
import sys

import pytest

import main
from tests.conftest import TINY
from utils import progress as module
from utils.progress import duration, hush, progress


@pytest.fixture(autouse=True)
def loud():
    yield
    hush(False)


def shown(monkeypatch, terminal, soon=0.0, seldom=0.0):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(module, "_SOON", soon)
    monkeypatch.setattr(module, "_SELDOM", seldom)
    with progress(total=3, desc="work", unit="batch", mininterval=0) as bar:
        for _ in range(3):
            bar.update()
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    lines = shown(monkeypatch, False).splitlines()
    assert len(lines) >= 3 and all(line.startswith("work:") and "\r" not in line for line in lines)
    assert "3/3" in lines[-1] and "batch" in lines[-1]


def test_plain_lines_of_a_bar_in_a_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(module, "_SOON", 0.0)
    monkeypatch.setattr(module, "_SELDOM", 0.0)
    with progress(total=2, desc="outer", unit="epoch", mininterval=0) as bar:
        for _ in range(2):
            list(progress(range(2), desc="inner", unit="step", mininterval=0))
            bar.update()
    lines = stream.getvalue().splitlines()
    assert all(line.startswith(("outer:", "inner:")) for line in lines) and "\x1b" not in stream.getvalue()


def test_a_bar_on_a_terminal(monkeypatch):
    assert shown(monkeypatch, True).count("\rwork:") >= 3


def test_what_is_quick_shows_nothing(monkeypatch):
    assert shown(monkeypatch, False, soon=5.0) == ""


def test_hushed(monkeypatch):
    hush(True)
    assert shown(monkeypatch, True) == ""


def test_a_quiet_run_says_one_line(call, two_models, picture_folder, tmp_path):
    picture_folder(tmp_path / "data" / "meta_val", {f"c{i}": [40 * i + j for j in range(12)] for i in range(5)})
    flags = ("--dataset", "custom", "--data-root", tmp_path / "data", "--pool", two_models, *TINY, "--save-dir")
    status, out, err = call(main, *flags, tmp_path / "run", "--quiet")
    assert status == 0 and len(out.splitlines()) == 1 and "report.html" in out and err == ""
    assert len((tmp_path / "run" / "log_train.txt").read_text().splitlines()) > 2


@pytest.mark.parametrize(
    "seconds, text", [(90, "90 s"), (700, "12 min"), (12_240, "3.4 h"), (1e7, "116 days"), (1e9, "11,574 days")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
