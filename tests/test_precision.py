"""--precision auto: a trial finds the faster number format, and a run keeps it."""

import json
from types import SimpleNamespace

import pytest
import torch

import main
from config import Settings
from few_shot import HeadFitter
from guided_diffusion import pool as pools
from guided_diffusion.pool import Pool, PoolModel
from tests.conftest import NO_IMAGES, TINY
from utils import processes

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """machine(float32, bf16): a CPU with bf16 instructions whose passes take these seconds; returns what was timed."""

    def of(exact, half):
        timed = []

        def seconds(self, images):
            dtype = next(self.network.parameters()).dtype
            timed.append(dtype)
            return exact if dtype == torch.float32 else half

        monkeypatch.setattr(pools, "may_gain_from_bf16", lambda device: True)
        monkeypatch.setattr(PoolModel, "seconds", seconds)
        return timed

    return of


@pytest.mark.parametrize("exact, half, expected", [(1.0, 0.3, "bf16"), (1.0, 0.95, "float32"), (1.0, 2.0, "float32")])
def test_the_faster_one_wins_where_it_wins_clearly(machine, toy_pool, exact, half, expected):
    timed, pool = machine(exact, half), Pool(toy_pool)
    assert pool.precision("auto", CPU) == expected and {torch.float32, torch.bfloat16} == set(timed)
    assert [pool.precision(asked, CPU) for asked in ("float32", "bf16")] == ["float32", "bf16"]


def test_no_trial_on_a_cpu_without_bf16(machine, toy_pool, monkeypatch):
    timed = machine(1.0, 0.3)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert Pool(toy_pool).precision("auto", CPU) == "float32" and not timed


def test_a_trial_passes_images_and_takes_the_shortest(toy_pool, monkeypatch):
    passed, clock = [], iter([0.0, 9.0, 9.0, 9.5, 10.0, 10.2, 11.0, 11.4])
    monkeypatch.setattr(PoolModel, "trial", lambda self, images: passed.append(images))
    monkeypatch.setattr(pools, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert Pool(toy_pool).load(0).seconds(3) == pytest.approx(0.2) and passed == [3] * 4


@pytest.mark.usefixtures("few_glyphs")
def test_a_resumed_run_draws_as_it_began(machine, call, toy_pool, tmp_path, monkeypatch):
    used, real = [], main.synthesise
    monkeypatch.setattr(
        main, "synthesise", lambda pool, plan, *rest: used.append(plan.precision) or real(pool, plan, *rest)
    )
    flags = ("--save-dir", tmp_path / "run", "--pool", toy_pool, "--data-root", NO_IMAGES, *TINY)
    timed = machine(1.0, 0.3)
    status, out, err = call(main, *flags, "--source", "unguided", "--max-epoch", 1)
    assert status == 0 and "bf16" in out and set(used) == {"bf16"}, err
    config = tmp_path / "run" / "config.json"
    assert json.loads(config.read_text())["drawn_in"] == "bf16" and timed
    timed = machine(1.0, 2.0)  # this time float32 would win
    status, _, err = call(main, *flags, "--source", "unguided", "--max-epoch", 1)
    assert status == 0 and not timed, err
    assert json.loads(config.read_text())["drawn_in"] == "bf16"
    config.write_text("{")  # last.pt says it too
    status, _, err = call(main, *flags, "--source", "unguided", "--max-epoch", 1)
    assert status == 0 and not timed and "config.json" in err and "drawing" not in err
    assert json.loads(config.read_text())["drawn_in"] == "bf16"


def test_all_processes_draw_in_the_format_of_the_first(machine, monkeypatch, trained, toy_pool):
    """Each has timed for itself, so they may differ."""
    machine(1.0, 0.3)
    monkeypatch.setattr(processes, "broadcast", lambda value: {"bf16": "float32"}.get(value, value))  # the first's
    fitter = HeadFitter(Settings(resume=str(trained / "best_model.pt"), pool=str(toy_pool), device="cpu"))
    assert fitter.precision == "float32"
