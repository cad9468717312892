"""Runs commands in forked processes that it can kill. Started by test_survival.py as a process of its own.

Reads one JSON object a line, {"module", "argv", "processes", "port", "kill_after", "log"}, and answers each by a line
{"statuses", "seconds"}. All that is slow to import is imported once, and torch has one thread, as a fork needs.
"""

import importlib
import json
import os
import signal
import sys
import time
import traceback

sys.path.insert(0, os.getcwd())

import matplotlib.pyplot  # noqa: F401
import torch
import torch._dynamo  # noqa: F401  (which the first optimiser would import, seconds each time)

import diffusionmix  # noqa: F401
import guided_diffusion.image_train  # noqa: F401
import main  # noqa: F401
from utils.cli import run


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
    os._exit(status)


def execute(order: dict) -> dict:
    """Fork the processes of a command, send them the signal when its time has come, wait for them."""
    started, pids = time.perf_counter(), []
    for rank in range(order["processes"]):
        pid = os.fork()
        if pid == 0:
            child(order, rank)
        pids.append(pid)
    if order["kill_after"] is not None:
        time.sleep(order["kill_after"])
        for pid in pids:
            os.kill(pid, order["signal"])
    ends = [os.waitpid(pid, 0)[1] for pid in pids]
    statuses = [os.waitstatus_to_exitcode(end) for end in ends]
    return {"statuses": statuses, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        print(json.dumps(execute(json.loads(line))), flush=True)
