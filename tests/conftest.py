"""Fixtures shared by all tests: golden values, and the weights and inputs that they were made with."""

import atexit
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Before torch: its threads wait by spinning, which beside other work makes networks as tiny as these 15 times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image

import bookkeeping
import main
from guided_diffusion.pool import subset_path
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from models import clusters
from report import Report
from utils import checkpoint
from utils.cli import run

ROOT = Path(__file__).resolve().parent.parent
NO_IMAGES = Path(tempfile.mkdtemp(prefix="no-images-"))  # a --data-root for which the embedded images are used
atexit.register(shutil.rmtree, NO_IMAGES, ignore_errors=True)


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of golden values; its README says how they were made."""
    return ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def meta_goldens(goldens: Path) -> dict[str, np.ndarray]:
    with np.load(goldens / "meta_models.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def meta_keys(goldens: Path) -> dict[str, list]:
    return json.loads((goldens / "meta_models.json").read_text())


@pytest.fixture(scope="session")
def fill() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Fill a module's state dict from each entry's name and shape; returns the module."""

    def value(name: str, old: torch.Tensor) -> torch.Tensor:
        if not old.is_floating_point():
            return torch.zeros_like(old)
        r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(old.shape))
        if r.ndim > 1:
            r = r / np.sqrt(np.prod(r.shape[1:]))
        elif name.endswith("running_var"):
            r = 1 + 0.1 * np.abs(r)
        elif name.endswith("weight"):
            r = 1 + 0.1 * r
        else:
            r = 0.1 * r
        return torch.from_numpy(r.astype(np.float32))

    def fill_module(module: torch.nn.Module) -> torch.nn.Module:
        module.load_state_dict({name: value(name, old) for name, old in module.state_dict().items()})
        return module

    return fill_module


@pytest.fixture(scope="session")
def arr() -> Callable[..., torch.Tensor]:
    """arr(seed, *shape): standard normal float32 input."""
    return lambda seed, *shape: torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Skip curves and reports, which take two fifths of a tiny run, except in tests marked `pictures`."""
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(Report, "write", lambda report: None)
        monkeypatch.setattr(bookkeeping, "curves", lambda *_, **__: None)


@pytest.fixture(autouse=True)
def no_trial_of_bf16(monkeypatch):
    """Let `--precision auto` be float32 on every CPU, so that none times the models first."""
    monkeypatch.setattr("guided_diffusion.pool.may_gain_from_bf16", lambda device: False)


UNET = dict(
    image_size=16, num_channels=8, num_res_blocks=1, channel_mult="1", attention_resolutions="", num_heads=1,
    learn_sigma=True, noise_schedule="cosine",
)  # fmt: skip
TINY = (
    "--samples-per-class 4 --sample-steps 2 --train_epoch_size 4 --train-batch 2 --train_nTestNovel 10 --max-epoch 2 "
    "--refresh-every 1 --epoch_size 4 --nTestNovel 10 --device cpu --recipe paper"
).split()


@pytest.fixture(scope="session")
def make_pool(fill) -> Callable[..., Path]:
    """make_pool(folder, counts, change=None, **flags): a pool of tiny random U-Nets, in the format of the trainer.

    counts: classes of each model; change(network, m) may alter the weights of model m (from 0).
    """

    def write(folder: Path, counts: list[int], change=None, **flags) -> Path:
        for m, count in enumerate(counts):
            if not change and count in counts[:m]:  # the weights would be the same
                subset_path(folder, m + 1).parent.mkdir(parents=True)
                shutil.copyfile(subset_path(folder, counts.index(count) + 1), subset_path(folder, m + 1))
                continue
            chosen = {**model_and_diffusion_defaults(), **UNET, **flags, "num_classes": count}
            network = fill(create_model_and_diffusion(**chosen)[0])
            if change:
                change(network, m)
            payload = {"model": network.state_dict(), "flags": chosen, "num_classes": count, "step": 1}
            checkpoint.save(subset_path(folder, m + 1), payload)
        return folder

    return write


@pytest.fixture(scope="session")
def toy_pool(make_pool, tmp_path_factory) -> Path:
    """Five unconditional models of four classes each, 16x16 pixels. For reading only."""
    return make_pool(tmp_path_factory.mktemp("toy") / "pool", [4] * 5)


@pytest.fixture(scope="session")
def two_models(make_pool, tmp_path_factory) -> Path:
    """The first two models of the toy pool, where more would cost time and show nothing. For reading only."""
    return make_pool(tmp_path_factory.mktemp("two") / "pool", [4] * 2)


@pytest.fixture(scope="session")
def paint_pool(make_pool, tmp_path_factory) -> Path:
    """Five models of four classes; whatever its input, model m draws grey level -0.8 + 0.4 m. For reading only."""

    def paint(network, m):
        for parameter in network.parameters():
            parameter.data.zero_()
        network.out[2].bias.data.fill_(-0.8 + 0.4 * m)

    folder = tmp_path_factory.mktemp("paint") / "pool"
    return make_pool(folder, [4] * 5, paint, predict_xstart=True, learn_sigma=False)


@pytest.fixture(scope="session")
def trained(toy_pool, tmp_path_factory) -> Path:
    """A run folder whose meta-model has random weights. For copying only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.sources.GLYPHS_PER_CLASS", 10)
        flags = ("--source", "none", "--save-dir", folder, "--pool", toy_pool, "--data-root", NO_IMAGES)
        patch.setattr("sys.argv", ["main.py", *TINY, *map(str, flags)])
        main.main()
    return folder


@pytest.fixture
def few_glyphs(monkeypatch) -> None:
    """Real glyphs, but few of them."""
    monkeypatch.setattr("datasets.sources.GLYPHS_PER_CLASS", 10)


@pytest.fixture
def enough_memory(monkeypatch) -> None:
    """Memory for any batch: to count what an image takes costs a second for each network of another shape."""
    for place in ("pool", "train_util"):
        monkeypatch.setattr(f"guided_diffusion.{place}.that_fit", lambda flags, most, device, **_: most)


@pytest.fixture
def few_rounds(monkeypatch) -> None:
    """Clusters after two rounds: the others are most of what a tiny run with clusters costs."""
    monkeypatch.setattr(clusters, "fit_mixture", partial(clusters.fit_mixture, rounds=2))


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """call(module, *argv): run its main() as a command would; returns the exit status, stdout and stderr."""

    def run_main(module, *argv) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, argv)])
        capsys.readouterr()
        status = 0
        try:
            run(module.main)
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, out, err

    return run_main


@pytest.fixture(scope="session")
def picture_folder() -> Callable[..., Path]:
    """picture_folder(folder, {class: [grey level 0..255, ...]}, size=16): write PNGs of one grey level each."""

    def write(folder: Path, classes: dict[str, list[int]], size: int = 16) -> Path:
        for name, levels in classes.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for index, level in enumerate(levels):
                Image.new("RGB", (size, size), (level,) * 3).save(folder / name / f"{index:03d}.png")
        return folder

    return write


def slow(*values):
    """A case of a parametrized test that `make test` leaves to `make test-all`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def same(a, b) -> bool:
    """Whether two nests of dicts, lists, tensors and plain values are bit-identical."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
