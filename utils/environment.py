"""Record the hardware, versions and commit of a run or a measurement."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from utils import processes
from utils.atomic import DiskFull
from utils.run_log import plain, read_json, write_json


def hardware(device: str) -> str:
    """Return the name of the GPU, or of the CPU with its number of cores."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """Return the commit of the working tree, with a + if files have changed since; "unknown" outside git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def note_start(folder: str | os.PathLike, program: str, device: torch.device, notes: Mapping[str, Any]) -> None:
    """Add this start of `program` to environment.json in a run folder, a list with the oldest start first.

    A start that differs from an earlier one only in its time, such as a resumed run, is not added. If the file cannot
    be written, a line on stderr says so and the run continues.

    notes: further entries, such as settings.
    """
    if not processes.is_first():
        return
    path = Path(folder) / "environment.json"
    start = plain(
        {
            "program": program,
            "command": shlex.join(["python", *sys.argv]),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "hardware": hardware(str(device)),
            "processes": processes.count(),
            "commit": commit(),
            **notes,
        }
    )
    known = read_json(path, list, "it starts again") or []  # no run depends on it
    known = [each for each in known if isinstance(each, dict)]
    if any({**each, "started": None} == {**start, "started": None} for each in known):
        return
    try:
        write_json(path, [*known, {**start, "started": datetime.now(UTC).isoformat(timespec="seconds")}])
    except (OSError, DiskFull) as error:  # files that the run needs will fail with a better message
        print(f"no note of this start ({' '.join(str(error).split())})", file=sys.stderr)
