"""Pools: what is read, what is refused, and who gets which classes."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

from guided_diffusion.dist_util import compile_in_place, worth_compiling
from guided_diffusion.pool import Pool, subset_path
from guided_diffusion.script_util import create_model_and_diffusion
from tests.conftest import UNET
from utils import checkpoint


class Sized(Pool):
    """A pool of so many models, without files."""

    def __init__(self, count):
        self.path, self.files, self._flags = "pool", [f"subset{m + 1}" for m in range(count)], {}


def test_loads_strictly_with_its_flags(toy_pool):
    pool = Pool(toy_pool)
    assert len(pool) == 5 and [path.parent.parent.name for path in pool.files] == [f"subset{m}" for m in range(1, 6)]
    model = pool.load(2)
    assert (model.image_size, model.class_cond, model.num_classes) == (16, False, 4)
    assert not model.network.training and not any(p.requires_grad for p in model.network.parameters())
    saved = checkpoint.load(subset_path(toy_pool, 3))["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.network.state_dict().items())


def test_each_reads_ahead_and_gives_what_load_gives(toy_pool, monkeypatch):
    pool, read, real = Pool(toy_pool), [], Pool.load

    def load(self, index, *args):
        read.append(index)
        return real(self, index, *args)

    monkeypatch.setattr(Pool, "load", load)
    for m, model in enumerate(pool.each(torch.device("cpu"))):
        alone = real(pool, m)
        assert model.path == alone.path
        for name, value in alone.network.state_dict().items():
            assert torch.equal(value, model.network.state_dict()[name])
        assert len(read) <= m + 2  # one ahead, so memory does not grow with the pool
    assert read == list(range(5))


def test_networks_of_a_shape_are_compiled_once_and_run_plainly_where_that_fails(toy_pool):
    counter, pool = CompileCounter(), Pool(toy_pool)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])

    def broken(*_):
        raise RuntimeError("no compiler here")

    with torch.no_grad():
        for m in range(3):
            model = pool.load(m)
            plain = model.network(x, t)
            compile_in_place(model.network, counter)
            torch.testing.assert_close(model.network(x, t), plain)
        assert counter.frame_count == 1
        torch._dynamo.reset()
        compile_in_place(model.network, broken)
        torch.testing.assert_close(model.network(x, t), plain)
    assert worth_compiling(torch.device("cuda"), 128) and not worth_compiling(torch.device("cpu"), 128)


def test_order_is_by_number(make_pool, tmp_path):
    make_pool(tmp_path, [1 + m for m in range(12)])
    assert Pool(tmp_path).share_classes() == list(range(1, 13))


def test_process_of_a_model(toy_pool):
    model = Pool(toy_pool).load(0)
    assert model.diffusion("ddim25").timestep_map.tolist() == list(range(0, 1000, 40))
    assert model.diffusion([0, 5, 199]).timestep_map.tolist() == [0, 5, 199]
    assert model.diffusion().num_timesteps == 1000
    whole = model.diffusion()
    for process in (model.diffusion("ddim25"), model.diffusion([0, 5, 199])):
        assert abs(process.alphas_cumprod - whole.alphas_cumprod[process.timestep_map]).max() < 1e-12


@pytest.mark.parametrize("kind", ["torch", "older torch", "safetensors"])
@pytest.mark.parametrize("class_cond", [False, True])
def test_bare_state_dict_of_a_public_checkpoint(fill, tmp_path, class_cond, kind):
    network = fill(create_model_and_diffusion(
        image_size=32, num_channels=16, num_res_blocks=2, channel_mult="1,2,2", attention_resolutions="16,8",
        num_head_channels=8, learn_sigma=True, noise_schedule="cosine", class_cond=class_cond, num_classes=7,
    )[0]).eval()  # fmt: skip
    if kind == "safetensors":
        save_file(network.state_dict(), tmp_path / "public.pt")
    else:
        torch.save(network.state_dict(), tmp_path / "public.pt", _use_new_zipfile_serialization=kind == "torch")
    pool = Pool(tmp_path / "public.pt", {"image_size": 32, "num_head_channels": 8, "noise_schedule": "cosine"})
    assert len(pool) == 1
    model = pool.load(0)
    assert model.flags["attention_resolutions"] == "16,8" and model.flags["channel_mult"] == "1,2,2"
    assert model.num_classes == (7 if class_cond else None)
    x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    y = {"y": torch.tensor([0, 6])} if class_cond else {}
    with torch.no_grad():
        torch.testing.assert_close(model.network(x, t, **y), network(x, t, **y))
    if not class_cond:
        with pytest.raises(ValueError, match="does not say how many classes.*--num-classes"):
            pool.share_classes()
    assert pool.share_classes(12) == [12]


def test_half_weights_come_back_as_float(make_pool, tmp_path):
    path = subset_path(make_pool(tmp_path, [4]), 1)
    payload = checkpoint.load(path)
    payload["model"] = {name: value.half() for name, value in payload["model"].items()}
    checkpoint.save(path, payload)
    network = Pool(tmp_path).load(0).network
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_missing_folder_and_gap(tmp_path, toy_pool):
    with pytest.raises(ValueError, match="subset1/ckpt/model.pt.*image_train.py"):
        Pool(tmp_path / "none")
    shutil.copytree(toy_pool, tmp_path / "pool")
    for m in (2, 4):
        subset_path(tmp_path / "pool", m).unlink()
    with pytest.raises(ValueError, match="up to 5 but not 2, 4"):
        Pool(tmp_path / "pool")


@pytest.mark.parametrize(
    "models, classes, per_model, counts",
    [
        (13, 64, 5, [5] * 12 + [4]),
        (13, 52, 4, [4] * 13),
        (26, 104, 4, [4] * 26),
        (1, 64, 0, [64]),
        (4, 9, 0, [3, 2, 2, 2]),
        (4, 10, 0, [3, 3, 2, 2]),
    ],
)
def test_share_classes(models, classes, per_model, counts):
    assert Sized(models).share_classes(classes, per_model) == counts


@pytest.mark.parametrize("models, classes, per_model, wanted", [(12, 64, 5, 13), (14, 64, 5, 13), (1, 52, 4, 13)])
def test_wrong_pool_size(models, classes, per_model, wanted):
    with pytest.raises(ValueError, match=f"got {models} models for {classes}.*expected {wanted} models"):
        Sized(models).share_classes(classes, per_model)
    with pytest.raises(ValueError, match="got 5 models for 3 pseudo classes"):
        Sized(5).share_classes(3)


def test_share_classes_as_the_checkpoints_say(make_pool, tmp_path):
    assert Pool(make_pool(tmp_path, [5, 5, 4])).share_classes() == [5, 5, 4]


def test_check_reads_all_and_says_what_does_not_fit(make_pool, tmp_path):
    pool = Pool(make_pool(tmp_path, [5, 4], class_cond=True))
    pool.check([5, 4], 25)
    with pytest.raises(ValueError, match="subset2.* 5 .* 4;.*--num-classes"):
        pool.check([5, 5], 25)
    with pytest.raises(ValueError, match="subset1.*60.*--sample-steps"):
        pool.check([5, 4], 60)
    path = subset_path(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(checkpoint.CheckpointError, match="subset2.*cut short"):
        pool.check([5, 4], 25)


@pytest.mark.parametrize(
    "payload, words",
    [
        ([1, 2], "expected a state dict"),
        ({"a": torch.zeros(1)}, "not the state dict of a guided-diffusion U-Net"),
        ({"model": {"w": torch.zeros(1)}, "settings": {}, "epoch": 1}, "not the state dict"),
        ({"model": 3, "flags": {}}, "no weights with their flags"),
    ],
)
def test_other_files_are_refused(tmp_path, payload, words):
    checkpoint.save(tmp_path / "x.pt", payload)
    with pytest.raises(checkpoint.CheckpointError, match=words):
        Pool(tmp_path / "x.pt").load(0)


def test_unconditional_flags_are_those_of_the_toys(toy_pool):
    flags = Pool(toy_pool).load(0).flags
    assert {name: flags[name] for name in UNET} == UNET


def test_safetensors_in_a_folder_of_models(make_pool, tmp_path):
    make_pool(tmp_path, [3, 4])
    for m in (1, 2):
        path = subset_path(tmp_path, m)
        save_file(checkpoint.load(path)["model"], path.with_suffix(".safetensors"))
    subset_path(tmp_path, 1).unlink()
    pool = Pool(tmp_path, UNET)
    assert [path.name for path in pool.files] == ["model.safetensors", "model.pt"]
    assert [pool.load(m).flags["num_channels"] for m in (0, 1)] == [8, 8]


@pytest.mark.parametrize("flags", [{"num_channels": 10**9}, {"num_heads": "four"}, {"noise_schedule": 3}])
def test_flags_that_no_model_has_are_refused(make_pool, tmp_path, flags):
    path = subset_path(make_pool(tmp_path, [4]), 1)
    payload = checkpoint.load(path)
    checkpoint.save(path, {**payload, "flags": {**payload["flags"], **flags}})
    with pytest.raises(checkpoint.CheckpointError, match=f"model.pt: got flag {next(iter(flags))}"):
        Pool(tmp_path).load(0)
    checkpoint.save(path, {**payload, "flags": {**payload["flags"], "channel_mult": "1,x"}})
    with pytest.raises(checkpoint.CheckpointError, match="model.pt: no U-Net is like this.*1,x"):
        Pool(tmp_path).load(0)


def test_a_small_file_takes_no_memory_for_a_large_network(fill, tmp_path, monkeypatch):
    network = fill(create_model_and_diffusion(**UNET)[0])
    state = {name: torch.zeros(1).expand(value.shape) for name, value in network.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)
    with pytest.raises(checkpoint.CheckpointError, match="names .* bytes of weights, expected at most the .* of the"):
        Pool(tmp_path / "model.pt", UNET).load(0)
    state["out.0.weight"] = torch.zeros(1).expand(10**9)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"out.0.weight \(got \(1000000000,\)"):
        Pool(tmp_path / "model.pt", UNET).load(0)
