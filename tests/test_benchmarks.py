"""The four speed measurements: tiny runs, and that the plain ways do the same work."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure, meta_test, meta_train, pretrain, synthesis
from config import Settings
from guided_diffusion.train_util import TrainLoop, TrainSettings
from models.conv4 import Conv4
from models.learners import PaperLearners
from models.meta_model import MetaModel
from tests.conftest import UNET, slow
from utils.images import to_float
from utils.seeding import generator

CPU = torch.device("cpu")
KEYS = {
    "work", "size", "device", "precision", "torch", "python", "commit", "achieved_gflops", "matmul_bf16_gflops",
    "matmul_float32_gflops", "ratio_bf16", "ratio_float32", "plain", "speedup", "peak_memory_mb", "seconds",
    "plain_seconds", "settings",
}  # fmt: skip
TINY = {
    synthesis: ("images", dict(batch=3, steps=2, classes=4, plain_images=2)),
    meta_test: ("episodes", dict(episodes=3, batch=6, steps=2, head_steps=2, plain_episodes=2)),
    meta_train: ("episodes", dict(episodes=3, batch=2, image_size=16, classes=5, per_class=8, plain_episodes=2)),
    pretrain: ("images", dict(batch=2, steps=2, images=6)),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch, toy_pool):
    monkeypatch.setattr(measure, "MATRIX", {"cpu": 32})
    monkeypatch.setattr(measure, "GLYPHS", toy_pool)
    monkeypatch.setattr(measure, "PAPER", UNET)
    for module, (_, changes) in TINY.items():
        for size in ("paper", "small"):
            monkeypatch.setitem(module.SIZES, size, module.SIZES[size] | changes)


@pytest.mark.parametrize("size", [slow("paper"), "small"])
@pytest.mark.parametrize("module", TINY, ids=lambda module: module.__name__)
def test_prints_one_line_with_every_key(call, module, size):
    status, out, err = call(module, "--size", size, "--device", "cpu", "--repeats", "2")
    assert status == 0, err
    line, unit = json.loads(out), TINY[module][0]
    assert out.count("\n") == 1 and set(line) == KEYS | {f"{unit}_per_second"}
    assert line["work"] == module.__name__.removeprefix("benchmarks.") and line["size"] == size
    assert line["precision"] == "float32" and f"{torch.get_num_threads()} thread" in line["device"]
    assert len(line["seconds"]) == len(line["plain_seconds"]) == 2
    chosen = line["settings"]
    assert line[f"{unit}_per_second"] == pytest.approx(chosen[f"{unit}_timed"] / sum(line["seconds"]) * 2, rel=1e-2)
    assert line["plain"] == pytest.approx(chosen[f"plain_{unit}_timed"] / sum(line["plain_seconds"]) * 2, rel=1e-2)
    assert line["speedup"] == pytest.approx(line[f"{unit}_per_second"] / line["plain"], rel=1e-2)
    for name in ("bf16", "float32"):
        assert line[f"ratio_{name}"] == pytest.approx(line["achieved_gflops"] / line[f"matmul_{name}_gflops"], rel=1e-2)
    assert line["peak_memory_mb"] > 10 and min(line["achieved_gflops"], line["plain"]) > 0
    if module is not meta_train:
        assert chosen["unet"]["image_size"] == 16 and chosen["models"] == 1


def test_flags(call):
    status, out, _ = call(synthesis, "--size", "small", "--device", "cpu", "--batch", "2", "--precision", "bf16")
    line = json.loads(out)
    assert status == 0 and line["settings"]["batch"] == line["settings"]["images_timed"] == 2
    assert line["precision"] == "bf16"
    assert call(synthesis)[0] == call(synthesis, "--size", "small", "--repeats", "0")[0] == 2
    status, _, err = call(meta_train, "--size", "small", "--device", "cpu", "--precision", "bf16")
    assert status == 2 and "float32" in err


def test_a_gpu_has_settings_of_its_own():
    args, sizes = SimpleNamespace(size="paper", batch=None), {"paper": dict(batch=8, steps=2)}
    on_gpu = {"paper": dict(batch=256)}
    assert measure.settings(args, CPU, sizes, on_gpu) == dict(batch=8, steps=2)
    assert measure.settings(args, torch.device("cuda"), sizes, on_gpu) == dict(batch=256, steps=2)
    args.batch = 4
    assert measure.settings(args, torch.device("cuda"), sizes, on_gpu)["batch"] == 4


def test_the_count_is_two_a_multiply_add_and_has_attention():
    a, conv = torch.ones(3, 4), torch.nn.Conv2d(3, 5, 3, padding=1)
    assert measure.count_flops(lambda: a @ a.T) == 2 * 3 * 3 * 4
    with torch.no_grad():
        assert measure.count_flops(lambda: conv(torch.ones(2, 3, 8, 8))) == 2 * 2 * 64 * 5 * 27
    q = torch.ones(2, 3, 16, 8)  # (N, heads, T, D): scores and their product with the values
    attend = torch.nn.functional.scaled_dot_product_attention
    assert measure.count_flops(lambda: attend(q, q, q)) == 2 * 2 * (2 * 3 * 16 * 16 * 8)


def test_the_papers_unet(monkeypatch):
    monkeypatch.undo()
    flags = measure.unet_flags("paper")
    with torch.device("meta"):
        network = measure.create_model(**flags)
        x, t = torch.empty(1, 3, 64, 64), torch.empty(1, dtype=torch.int64)
    assert measure.unet_settings("paper")["parameters"] == pytest.approx(121e6, rel=0.01)
    assert measure.count_flops(lambda: network(x, t)) == pytest.approx(79.5e9, rel=0.01)


def test_no_layer_of_the_papers_model_is_zero():
    assert all(weight.any() for weight in measure.pool_model("paper", CPU).network.parameters())


def test_plain_synthesis_draws_the_same_images():
    s, function = synthesis.SIZES["small"], synthesis.guide(4, CPU)
    model, plain = measure.pool_model("small", CPU), measure.plain_model("small", CPU)
    batch = synthesis.draw(model, function, s, [0, 1], CPU)
    alone = torch.cat([synthesis.draw(plain, function, s, [i], CPU) for i in (0, 1)])
    assert int((batch.int() - alone.int()).abs().max()) <= 1


def test_plain_meta_test_fits_the_same_heads():
    s = meta_test.SIZES["small"]
    tasks = meta_test.Tasks.random(s, 16)
    model = MetaModel(5, generator=generator(0)).eval()
    heads = meta_test.together(tasks, measure.pool_model("small", CPU), model, s)
    each = meta_test.one_by_one(tasks, measure.plain_model("small", CPU), model, s)
    assert len(each) == 2 and heads.weight.shape == (3, 5, 64)
    for episode, head in enumerate(each):
        torch.testing.assert_close(heads.weight[episode], head.weight.data, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(heads.bias[episode], head.bias.data, rtol=1e-3, atol=1e-6)


def test_plain_conv4_and_augmentation_give_the_same_numbers():
    plain, own = meta_train.PlainConv4(), Conv4(generator=generator(0))
    with torch.no_grad():
        for a, b in zip(plain.parameters(), own.parameters(), strict=True):
            a.copy_(b)
        images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator(1))
        torch.testing.assert_close(plain(to_float(images)), own(to_float(images)), rtol=1e-4, atol=1e-5)
    learners = PaperLearners(Settings(), 5, 32, CPU, None)
    batch = learners.changed(images, generator(2))
    meta_train.one_by_one(learners)
    torch.testing.assert_close(learners.changed(images, generator(2)), batch)


def test_plain_pretraining_takes_the_same_steps():
    flags, data = measure.unet_flags("paper"), pretrain.random_images(6, 16)
    settings = TrainSettings(lr=1e-3, batch_size=3, precision="float32")
    model, diffusion = pretrain.model_of(flags)
    loop = TrainLoop(model=model, diffusion=diffusion, data=data, settings=settings, flags=flags, folder="", device=CPU)
    plain = pretrain.Plain(flags, data, settings, CPU)
    for _ in range(3):
        assert float(plain.train_step()) == pytest.approx(float(loop.train_step()), rel=1e-3)
    for a, b in zip(plain.ema.parameters(), loop.ema.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
