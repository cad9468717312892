"""Runs commands in forked processes that stop at a counted point of their work. Started by test_survival.py.

Reads one JSON object a line, {"module", "argv", "processes", "port", "stop_at", "signal", "log"}, and answers each by a
line {"statuses", "points"}. All that is slow to import is imported once, and torch has one thread, as a fork needs.
With arguments, MODULE ARGV..., it is one process of torchrun: of rank 1, it dies once at its second point, where the
file that DIES_ONCE names is not there yet.

A point is a question whether to stop, which comes between any two steps, or the moment before or after a file gets its
name. Waiting for other processes, which asks as often as time allows, does not count.
"""

import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, os.getcwd())

import matplotlib.pyplot  # noqa: F401
import torch
import torch._dynamo  # noqa: F401  (which the first optimiser would import, seconds each time)

import diffusionmix  # noqa: F401
import guided_diffusion.image_train  # noqa: F401
import main  # noqa: F401
from utils import stopping
from utils.cli import run

points = 0


def count_points(reached: Callable[[int], None]) -> None:
    """From now on, call `reached` with the number (from 0) of each point."""

    def point() -> None:
        global points
        points += 1
        reached(points - 1)

    def asking(original):
        def ask():
            if sys._getframe(1).f_globals["__name__"] != "utils.processes":
                point()
            return original()

        return ask

    rename = os.replace

    def replace(*args, **kwargs):
        point()
        rename(*args, **kwargs)
        point()

    stopping.asked, stopping.check, os.replace = asking(stopping.asked), asking(stopping.check), replace


def child(order: dict, rank: int) -> None:
    """Run one process of the command, and end."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["processes"] > 1:
        os.environ |= dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(order["processes"]), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(order["port"]),
        )  # fmt: skip
    if rank == 0:
        count_points(lambda n: os.kill(os.getpid(), order["signal"]) if n == order["stop_at"] else None)
    module = importlib.import_module(order["module"])
    sys.argv = [order["module"], *order["argv"]]
    status = 0
    try:
        run(module.main)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if rank == 0:
        Path(order["log"] + ".points").write_text(str(points))
    os._exit(status)


def execute(order: dict) -> dict:
    """Fork the processes of a command and wait for them; where the first one is killed, kill the others."""
    noted = Path(order["log"] + ".points")
    noted.unlink(missing_ok=True)
    pids = []
    for rank in range(order["processes"]):
        pid = os.fork()
        if pid == 0:
            child(order, rank)
        pids.append(pid)
    ends = [os.waitpid(pids[0], 0)[1]]
    if os.WIFSIGNALED(ends[0]):
        for pid in pids[1:]:
            os.kill(pid, signal.SIGKILL)
    ends += [os.waitpid(pid, 0)[1] for pid in pids[1:]]
    statuses = [os.waitstatus_to_exitcode(end) for end in ends]
    return {"statuses": statuses, "points": int(noted.read_text()) if noted.exists() else None}


def of_torchrun(module: str) -> None:
    """Be one process of torchrun, which dies at its second point where it is of rank 1 and none has died yet."""
    died = Path(os.environ["DIES_ONCE"])

    def reached(number: int) -> None:
        if number == 1 and os.environ["RANK"] == "1" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    count_points(reached)
    run(importlib.import_module(module).main)


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.argv[1:]:
        sys.argv = sys.argv[1:]
        of_torchrun(sys.argv[0])
    else:
        for line in sys.stdin:
            print(json.dumps(execute(json.loads(line))), flush=True)
