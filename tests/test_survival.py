"""Runs that are killed go on and end as if nothing had happened; several processes give what one gives.

KILLS=100 in the environment, or `make soak`, kills each command at that many points in place of 12.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT, same
from utils import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.pictures]
KILLS = int(os.environ.get("KILLS", 12))
TIMES = ("seconds", "synthesis_seconds")


@pytest.fixture(scope="module")
def server():
    """order(module, argv, log, ...) -> (statuses, points): runs a command in forked processes, up to a point."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "killable.py"], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def order(module, argv, log, processes=1, stop_at=None, number=signal.SIGKILL):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        wanted = dict(module=module, argv=[str(word) for word in argv], log=str(log), processes=processes, port=port,
                      stop_at=stop_at, signal=number)  # fmt: skip
        process.stdin.write(json.dumps(wanted) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        return answer["statuses"], answer["points"]

    yield order
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_pool, picture_folder):
    """Images, and a pool of five models."""
    folder = tmp_path_factory.mktemp("survival")
    rng = np.random.default_rng(0)
    levels = {f"c{i}": rng.integers(0, 256, 12).tolist() for i in range(6)}
    for split in ("meta_train", "meta_val", "meta_test"):
        picture_folder(folder / "data" / split, levels)
    make_pool(folder / "pool", [2, 2, 2, 1, 1])
    return folder


def command(place, name, out):
    """Module and arguments of a short run of each command, in folder `out`."""
    # on a CPU with bf16, auto may choose another precision in each run
    shared = ("--dataset", "custom", "--data-root", place / "data", "--pool", place / "pool")
    shared += ("--device", "cpu", "--precision", "float32")
    if name == "diffusionmix":
        flags = "--episodes 12 --nTestNovel 10 --mix-steps 2 --head-steps 3 --sample-batch 8 --nExemplars 2".split()
        return "diffusionmix", (*shared, *flags, "--resume", place / "trained.pt", "--save-dir", out)
    if name == "own pictures":
        flags = "--mix-steps 2 --head-steps 3 --sample-batch 8".split()
        own = ("--support", place / "data" / "meta_val", "--query", place / "data" / "meta_test")
        return "diffusionmix", (*shared, *own, *flags, "--resume", place / "trained.pt", "--save-dir", out)
    if name == "image_train":
        flags = (
            "--image_size 16 --num_channels 8 --num_res_blocks 1 --channel_mult 1,1 --num_heads 1 --batch_size 4 "
            "--steps 12 --save_interval 3 --diffusion_steps 8 --noise_schedule cosine --device cpu --ema_rate 0.5 "
            "--lr 1e-2 --classes_per_model 3"
        ).split()
        return "guided_diffusion.image_train", ("--data_dir", place / "data" / "meta_train", "--pool", out, *flags)
    flags = (
        "--samples-per-class 4 --sample-steps 2 --sample-batch 5 --train_epoch_size 4 --train-batch 2 "
        "--train_nTestNovel 10 --max-epoch 4 --refresh-every 2 --epoch_size 4 --nTestNovel 10"
    ).split()
    return "main", (*shared, *flags, "--save-dir", out)


def outcome(name, out):
    """All that a run leaves, without times and paths."""
    if name == "diffusionmix":
        results = json.loads((out / "results.json").read_text())
        with np.load(out / "mixes.npz") as mixes:
            results |= {key: array.tobytes() for key, array in mixes.items()}
        assert not list(out.glob("*.tmp")) and (out / "report.html").exists()
        return {key: value for key, value in results.items() if key not in TIMES}
    if name == "own pictures":
        return {path.name: path.read_bytes() for path in out.glob("predictions.*")}
    if name == "image_train":
        models = {path.parent.parent.name: checkpoint.load(path) for path in sorted(out.glob("subset*/ckpt/model.pt"))}
        return models | {"pool.json": json.loads((out / "pool.json").read_text())}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
    weights = {each: checkpoint.load(out / f"{each}.pt") for each in ("last", "best_model")}
    for state in weights.values():
        state.pop("settings")  # names the folder
    assert (out / "report.html").exists() and json.loads((out / "environment.json").read_text())
    arrays = {str(p.relative_to(out)): np.load(p).tobytes() for p in sorted((out / "pseudo").rglob("*.npy"))}
    return {"metrics": metrics, "arrays": arrays, **weights}


@pytest.fixture(scope="module")
def undisturbed(server, place):
    """undisturbed(name, processes) -> what a run leaves that nothing happens to, and its points."""
    known = {}

    def get(name, processes=1):
        if name in ("diffusionmix", "own pictures") and not (place / "trained.pt").exists():
            get("main")
            shutil.copyfile(place / "main-1" / "best_model.pt", place / "trained.pt")
        if (name, processes) not in known:
            out, log = place / f"{name}-{processes}", place / f"{name}-{processes}.log"
            statuses, points = server(*command(place, name, out), log, processes)
            assert statuses == [0] * processes, log.read_text()
            known[name, processes] = outcome(name, out), points
        return known[name, processes]

    return get


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["main", "diffusionmix", "own pictures", "image_train"])
def test_killed_at_any_point_it_ends_the_same(server, place, undisturbed, name, processes):
    expected, points = undisturbed(name, processes)
    kills = KILLS if processes == 1 else max(2, KILLS // 4)
    for point in sorted({int(points * (kill + 0.5) / kills) for kill in range(kills)}):
        out, log = place / "cut", place / "cut.log"
        log.unlink(missing_ok=True)
        module, argv = command(place, name, out)
        statuses, _ = server(module, argv, log, processes, stop_at=point)
        assert statuses[0] == -signal.SIGKILL, log.read_text()
        statuses, _ = server(module, argv, log, processes)
        assert statuses == [0] * processes, log.read_text()
        assert same(outcome(name, out), expected), f"killed at {point} of {points}: {log.read_text()}"
        assert not list(out.rglob("*batches-*")) and not list(out.glob("*mixes")) and not list(out.rglob("state*.pt"))
        shutil.rmtree(out)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("name", ["main", "diffusionmix", "image_train"])
def test_asked_to_stop_it_says_how_to_go_on(server, place, undisturbed, name, number, status):
    expected, points = undisturbed(name)
    out, log = place / "stopped", place / "stopped.log"
    log.unlink(missing_ok=True)
    module, argv = command(place, name, out)
    statuses, _ = server(module, argv, log, stop_at=points // 2, number=number)
    assert statuses == [status], log.read_text()
    assert number.name in log.read_text() and "same command" in log.read_text()
    assert "Traceback" not in log.read_text() and not list(out.rglob("*.tmp"))
    assert server(module, argv, log)[0] == [0], log.read_text()
    assert same(outcome(name, out), expected)
    shutil.rmtree(out)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", ["main", "diffusionmix", "own pictures"])
def test_several_processes_give_what_one_gives(undisturbed, name, processes):
    assert same(undisturbed(name, processes)[0], undisturbed(name)[0])


def test_several_processes_train_a_diffusion_model_alike(undisturbed):
    one, two = undisturbed("image_train")[0], undisturbed("image_train", 2)[0]
    for name in ("subset1", "subset2"):
        for key, weight in one[name]["model"].items():
            assert float((weight - two[name]["model"][key]).abs().max()) < 1e-3, key  # rounding, through 12 steps


# ---- torchrun itself


@pytest.mark.parametrize("restarts", [1, 0])
def test_a_process_that_dies_ends_the_job_or_has_it_taken_up_again(place, undisturbed, restarts):
    out, died, log = (place / f"torchrun{restarts}{ending}" for ending in ("", ".died", ".log"))
    _, argv = command(place, "main", out)
    words = ["--standalone", "--nproc_per_node", "2", "--max-restarts", restarts, ROOT / "tests" / "killable.py"]
    with open(log, "w") as file:
        status = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *map(str, [*words, "main", *argv])], cwd=ROOT, stdout=file,
            stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1", "DIES_ONCE": str(died)},
        ).returncode  # fmt: skip
    assert died.exists(), log.read_text()
    assert (status == 0) == (restarts == 1), log.read_text()
    if restarts:
        assert same(outcome("main", out), undisturbed("main")[0])
