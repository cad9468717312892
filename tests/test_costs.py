"""What an image costs a network, and how many at once there is memory for."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import costs
from guided_diffusion import pool as pool_module
from guided_diffusion.pool import Pool
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from tests.conftest import UNET
from utils.progress import hush

CPU = torch.device("cpu")
FLAGS = {**model_and_diffusion_defaults(), **UNET, "channel_mult": "1,1"}
PAPER = FLAGS | dict(image_size=64, num_channels=128, num_res_blocks=3, channel_mult="", attention_resolutions="16,8",
                     num_heads=4)  # fmt: skip


def test_alive_counts_what_is_alive():
    with costs._Alive() as alive:
        a = torch.zeros(1000)
        b = a + 1
        assert (alive.now, alive.most) == (8000, 8000)
        del a
        c = b.view(10, 100)  # no memory of its own
        del b
        assert (alive.now, alive.most) == (4000, 8000) and c.shape == (10, 100)
    w = torch.ones(1000, requires_grad=True)
    with costs._Alive() as alive:
        out = w.exp().exp()  # either is kept for the way back
        assert alive.now == 8000
        out.sum().backward()


def test_bytes_of_one_more_image():
    assert costs.peak_bytes(lambda images: torch.zeros(images, 1000).exp(), 1) == 8000


@pytest.mark.parametrize("class_cond", [False, True])
def test_bytes_are_those_of_the_maps(class_cond):
    flags = FLAGS | dict(class_cond=class_cond, num_classes=3)
    one = costs.image_bytes(flags)
    of_a_map = 16 * 16 * 8 * 4  # side, side, channels, bytes
    assert 4 * of_a_map < one < 40 * of_a_map
    assert 4 * one <= costs.image_bytes(flags | dict(image_size=32)) < 16 * one  # 16 times the scores of attention
    assert costs.image_bytes(flags, training=True) > 3 * one


def test_networks_that_are_alike_are_counted_once(monkeypatch):
    passed, real = [], costs._pass
    monkeypatch.setattr(costs, "_pass", lambda *how: (passed.append(how[1]), real(*how)))
    flags = FLAGS | dict(image_size=12)
    one = costs.image_bytes(flags)
    assert costs.image_bytes(dict(reversed(flags.items()))) == one and len(passed) == 2
    assert costs.image_bytes(flags, training=True) > one and costs.image_bytes(flags | dict(image_size=20)) > one
    assert len(passed) == 6


@pytest.mark.slow
def test_bytes_of_the_published_network():
    # measured on a CPU: 46 MB an image when drawing, 400 MB when training; kernels take room beside the tensors
    assert 46e6 / 2 < costs.image_bytes(PAPER) < 46e6 < costs.image_bytes(PAPER, training=True) < 400e6


def test_flops_are_those_of_a_pass():
    network = create_model_and_diffusion(**FLAGS)[0]
    x, t = torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # others do not tell
        network(x, t)
    assert counter.get_total_flops() == 2 * costs.image_flops(FLAGS)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(x, t).sum().backward()
    assert counter.get_total_flops() == 2 * costs.image_flops(FLAGS, training=True)


@pytest.mark.parametrize(
    "free, here, fits", [(80e6, "1", 40), (80e6, "2", 20), (80e9, "1", 250), (10.0, "1", 1), (None, "1", 250)]
)
def test_how_many_images_fit(monkeypatch, capsys, free, here, fits):
    monkeypatch.setattr(costs, "free_memory", lambda: free)
    monkeypatch.setattr(costs, "image_bytes", lambda flags, training: 1e6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert costs.that_fit(FLAGS, 250, CPU) == fits
    assert (f"batches of {fits}" in capsys.readouterr().err) == (fits < 250)
    assert costs.that_fit(FLAGS, 250, torch.device("cuda")) == 250
    assert costs.that_fit(FLAGS, 250, CPU, other=500_000) == fits  # they take turns
    capsys.readouterr()
    assert costs.that_fit(FLAGS, 250, CPU, other=2_000_000) == (fits if fits in (1, 250) else fits // 2)
    capsys.readouterr()
    hush(True)
    costs.that_fit(FLAGS, 250, CPU)
    hush(False)
    assert capsys.readouterr().err == ""


def test_memory_of_a_job_counts(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 5000 kB\n", "/proc/self/cgroup": "0::/job\n",
        "/sys/fs/cgroup/job/memory.max": "3000000\n", "/sys/fs/cgroup/job/memory.current": "1000000\n",
    }  # fmt: skip

    def path(name):
        def read_text():
            if name not in files:
                raise FileNotFoundError(name)
            return files[name]

        return Text(name, read_text)

    class Text(SimpleNamespace):
        def __init__(self, name, read_text):
            super().__init__(name=name, read_text=read_text)

        def __truediv__(self, more):
            return path(f"{self.name}/{more}")

    monkeypatch.setattr(costs, "Path", path)
    assert costs.free_memory() == 2_000_000
    files["/sys/fs/cgroup/job/memory.stat"] = "anon 7\ninactive_file 300000\nactive_file 200000\nslab 5\n"
    assert costs.free_memory() == 2_500_000
    files["/sys/fs/cgroup/job/memory.max"] = "max\n"
    assert costs.free_memory() == 5_120_000
    del files["/proc/self/cgroup"]
    assert costs.free_memory() == 5_120_000
    del files["/proc/meminfo"]
    assert costs.free_memory() is None


def test_room_is_found_once_for_networks_alike(make_pool, tmp_path, monkeypatch):
    asked = []

    def few(flags, most, device, **_):
        asked.append(flags["num_res_blocks"])
        return 5

    monkeypatch.setattr(pool_module, "that_fit", few)
    pool = Pool(make_pool(tmp_path / "pool", [4, 4, 4], lambda network, m: None))
    models = [pool.load(m) for m in range(3)]
    assert [pool.room(model, 9, CPU) for model in models] == [5, 5, 5] and asked == [1]
    assert pool.room(models[0], 9, CPU, other=1) == 5 and asked == [1, 1]  # guided, after an unguided round
    assert pool.room(models[0], 3, CPU) == 3
    assert pool.room(models[0], 9, CPU, found=2) == 2 and pool.room(models[1], 9, CPU) == 2
