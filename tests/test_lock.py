"""One run at a time in a folder."""

import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils.lock import locked


def test_second_is_refused_and_the_first_unharmed(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(ValueError, match="another run is at work in this folder"), locked(tmp_path / "run"):
            raise AssertionError("both are in")
        with locked(tmp_path / "other"):
            pass
    with locked(tmp_path / "run"):
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = "with locked(sys.argv[1]):\n print('in', flush=True)\n sys.stdin.read()"
    imports = "import sys\nfrom utils.lock import locked\n"
    other = subprocess.Popen(
        [sys.executable, "-c", imports + code, tmp_path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match="another run"), locked(tmp_path):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    with locked(tmp_path):
        pass


def test_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="expected a folder"), locked(tmp_path / "run"):
        pass
