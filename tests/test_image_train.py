"""Pretraining: one model, a pool, and what a killed run goes on from."""

import json
import re
import subprocess
import sys

import pytest
import torch

import guided_diffusion.image_train as image_train
from guided_diffusion.image_datasets import load_images
from guided_diffusion.pool import Pool, subset_path
from guided_diffusion.train_util import TrainLoop, TrainSettings
from tests.conftest import ROOT, same, slow
from tests.test_report import Reader
from utils import checkpoint

FLAGS = (
    "--image_size 16 --num_channels 8 --num_res_blocks 1 --channel_mult 1 --num_heads 1 --attention_resolutions= "
    "--learn_sigma True --noise_schedule cosine --diffusion_steps 4 --batch_size 2 --steps 3 --device cpu"
).split()


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """Few samples to measure."""
    monkeypatch.setattr("guided_diffusion.memorisation.SAMPLES", 4)


@pytest.fixture
def folder(picture_folder, tmp_path):
    levels = {name: [20 * index, 255 - 30 * index, 128] for index, name in enumerate("abcde")}
    return picture_folder(tmp_path / "images", levels)


def train(call, folder, out, *flags):
    status, text, err = call(image_train, "--data_dir", folder, "--save_dir", out, *FLAGS, *flags)
    assert status == 0, err
    return checkpoint.load(out / "model.pt")


def test_one_model(call, folder, tmp_path):
    payload = train(call, folder, tmp_path / "out")
    names = [".lock", "memorisation.json", "metrics.jsonl", "model.pt", "samples.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert (payload["step"], payload["num_classes"], payload["flags"]["num_channels"]) == (3, 5, 8)
    model = Pool(tmp_path / "out" / "model.pt").load(0)
    assert model.image_size == 16 and not model.class_cond
    assert float(model.network.out[2].weight.abs().max()) > 0  # it was zero before training


def test_dry_run(call, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_train, "TRIAL", 0.0)
    common = ("--data-dir", folder, *FLAGS, "--dry-run")
    status, out, err = call(image_train, *common, "--save_dir", tmp_path / "one")
    assert status == 0 and re.search(r"1 model x 3 steps x 2 images: 0.0 TFLOP, about \d+ s on cpu", out), err
    pool = ("--pool", tmp_path / "pool", "--classes_per_model", 2)
    assert "3 models x 3 steps x 2 images" in call(image_train, *common, *pool)[1]
    assert "2 models x 3 steps" in call(image_train, *common, *pool, "--subsets", "1,3")[1]
    assert not (tmp_path / "one").exists() and not (tmp_path / "pool").exists()
    assert call(image_train, *common[:-1], *pool, "--subsets", "1")[0] == 0
    assert "2 models x 3 steps" in call(image_train, *common, *pool)[1]
    loop = TrainLoop.run
    with monkeypatch.context() as patch:  # killed in its second model
        patch.setattr(TrainLoop, "run", lambda self: self.save() if "subset2" in str(self.folder) else loop(self))
        patch.setattr(image_train, "_figure", lambda *_: None)
        patch.setattr(image_train, "subset_path", image_train.subset_path)
        call(image_train, *common[:-1], *pool, "--subsets", "2", "--save_interval", 2)
    assert "all models are trained" in call(image_train, *common, *pool, "--subsets", "1")[1]
    assert call(image_train, *common, "--save_dir", tmp_path / "one", "--num_heads", 3)[0] == 2


def test_the_estimate_has_the_samples(call, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainLoop, "measure", lambda loop, seconds: (90, 10**12, 0.5, 20.0))
    own = ("--data_dir", folder, "--save_dir", tmp_path / "one", *FLAGS, "--steps", 90, "--save_interval", 40)
    # 90 steps take 45 s, three sheets of 40 samples 60 s, and the 4 samples that are measured at the end 2 s
    assert "90.0 TFLOP, about 107 s on cpu (62 s to draw samples)" in call(image_train, *own, "--dry_run")[1]


def test_fewer_images_at_once_where_memory_is_short(call, folder, tmp_path, monkeypatch):
    whole = train(call, folder, tmp_path / "whole", "--batch_size", 6)
    seen = []

    def few(flags, most, device, training):
        seen.append((flags["num_channels"], most, training))
        return 2

    monkeypatch.setattr("guided_diffusion.train_util.that_fit", few)
    parts = train(call, folder, tmp_path / "parts", "--batch_size", 6)
    assert seen == [(8, 6, True)]
    for name, weight in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], weight, atol=1e-5, rtol=1e-3)


def test_same_seed_same_weights(call, folder, tmp_path):
    first, second, other = (train(call, folder, tmp_path / str(i), "--seed", seed) for i, seed in enumerate((4, 4, 5)))
    assert same(first["model"], second["model"]) and not same(first["model"], other["model"])


@pytest.mark.parametrize(
    "flags",
    [
        (),
        slow(("--class_cond", "True", "--ema_rate", "0.5", "--lr_anneal_steps", "6")),
        slow(tuple("--dropout 0.3 --schedule_sampler loss-second-moment --grad_clip 1 --weight_decay 0.1".split())),
    ],
)
def test_killed_run_goes_on_bit_for_bit(call, folder, tmp_path, monkeypatch, flags):
    flags = ("--steps", 6, "--save_interval", 2, "--lr", "1e-2", *flags)
    whole = train(call, folder, tmp_path / "whole", *flags)
    step = TrainLoop.train_step

    def killed(loop):
        if loop.step == 5:  # the last save was at 4
            raise KeyboardInterrupt
        return step(loop)

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoop, "train_step", killed)
        status, _, err = call(image_train, "--data_dir", folder, "--save_dir", tmp_path / "cut", *FLAGS, *flags)
    assert status == 130 and err.endswith("interrupted; the same command again goes on from the last save\n")
    assert checkpoint.load(tmp_path / "cut" / "state.pt")["step"] == 4
    torch.manual_seed(99)
    assert same(train(call, folder, tmp_path / "cut", *flags), whole)
    assert not (tmp_path / "cut" / "state.pt").exists()
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_other_flags_do_not_go_on(call, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainLoop, "finish", lambda loop: loop.save())
    call(image_train, "--data_dir", folder, "--save_dir", tmp_path / "out", *FLAGS)
    status, _, err = call(
        image_train, "--data_dir", folder, "--save_dir", tmp_path / "out", *FLAGS, "--rescale_timesteps", "True",
    )  # fmt: skip
    assert status == 2 and "state.pt: was made with rescale_timesteps False (got True)" in err


def test_pool(call, folder, tmp_path):
    out = tmp_path / "pool"
    arguments = ("--data_dir", folder, "--pool", out, "--classes_per_model", 2, *FLAGS)
    status, text, err = call(image_train, *arguments, "--subsets", "1,3", "--class_cond", "True")
    assert status == 0, err
    contents = json.loads((out / "pool.json").read_text())
    assert contents["image_size"] == 16 and contents["steps"] == 3
    assert contents["models"] == [
        {"path": "subset1/ckpt/model.pt", "classes": ["a", "b"], "num_classes": 2},
        {"path": "subset2/ckpt/model.pt", "classes": ["c", "d"], "num_classes": 2},
        {"path": "subset3/ckpt/model.pt", "classes": ["e"], "num_classes": 1},
    ]
    done = subset_path(out, 1)
    before = done.read_bytes(), done.stat().st_mtime_ns
    assert not subset_path(out, 2).exists()
    status, text, err = call(image_train, *arguments, "--class_cond", "True")
    assert status == 0 and f"{done} is done" in text and "15 images" not in text
    assert (done.read_bytes(), done.stat().st_mtime_ns) == before
    pool = Pool(out)
    assert pool.share_classes() == [2, 2, 1]
    models = [pool.load(m) for m in range(3)]
    assert all(model.class_cond for model in models) and [m.flags["num_classes"] for m in models] == [2, 2, 1]
    assert not same(*(m.network.state_dict()["time_embed.0.weight"] for m in models[:2]))  # seeds of their own
    status, _, err = call(image_train, *arguments, "--classes_per_model", 3)
    assert status == 2 and "pool.json: is of other classes" in err


@pytest.mark.pictures
def test_a_pool_leaves_a_report(call, folder, tmp_path):
    out, flags = tmp_path / "pool", ("--classes_per_model", 3, "--steps", 5, "--log_interval", 2)
    status, _, err = call(image_train, "--data_dir", folder, "--pool", out, *FLAGS, *flags)
    assert status == 0 and "no report" not in err
    text = "".join(Reader((out / "report.html").read_text()).text)
    assert "a, b, c" in text and "d, e" in text and "--held_out_dir" in text
    losses = [json.loads(line) for line in (out / "subset1" / "ckpt" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == [2, 4, 5] and all(line["loss"] > 0 for line in losses)
    assert Reader((out / "report.html").read_text()).tags.count("img") == 2


def test_half_weights(call, folder, tmp_path):
    full, half = train(call, folder, tmp_path / "f"), train(call, folder, tmp_path / "h", "--half_weights", "True")
    assert all(value.dtype == torch.float16 for value in half["model"].values())
    assert all(torch.equal(value, full["model"][name].half()) for name, value in half["model"].items())
    assert (tmp_path / "h" / "model.pt").stat().st_size < 0.7 * (tmp_path / "f" / "model.pt").stat().st_size


def loop_of(folder, tmp_path, **settings):
    from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
    from tests.conftest import UNET

    flags = {**model_and_diffusion_defaults(), **UNET, "diffusion_steps": 4}
    torch.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**flags)
    return TrainLoop(
        model=model, diffusion=diffusion, data=load_images(folder, 16), flags=flags, folder=tmp_path / "loop",
        settings=TrainSettings(**{**dict(batch_size=4, steps=5, precision="float32"), **settings}),
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("rate, decays", [(0.9999, [2 / 11, 3 / 12, 4 / 13]), (0.2, [2 / 11, 0.2, 0.2])])
def test_ema_warms_up(folder, tmp_path, rate, decays):
    loop = loop_of(folder, tmp_path, ema_rate=rate, lr=1e-2)
    name = "time_embed.0.weight"
    expected = loop.ema.state_dict()[name].clone()
    for decay in decays:
        loop.train_step()
        expected = decay * expected + (1 - decay) * loop.model.state_dict()[name]
        torch.testing.assert_close(loop.ema.state_dict()[name], expected, atol=1e-7, rtol=1e-6)


def test_microbatches_give_the_gradient_of_the_batch(folder, tmp_path):
    gradients = []
    for micro in (-1, 3):
        loop = loop_of(folder, tmp_path, microbatch=micro)
        loss = loop.train_step()
        gradients.append([float(loss), *(p.grad.clone() for p in loop.model.parameters())])
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for whole, parts in zip(gradients[0][1:], gradients[1][1:], strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_out_of_memory_halves_the_part_and_loses_nothing(folder, tmp_path, capsys):
    plain, short = (loop_of(folder, tmp_path, schedule_sampler="loss-second-moment") for _ in range(2))
    losses = short.diffusion.training_losses

    def small_machine(network, images, *rest):
        if len(images) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return losses(network, images, *rest)

    short.diffusion.training_losses = small_machine
    for _ in range(2):
        assert float(plain.train_step()) == pytest.approx(float(short.train_step()), rel=1e-5)
    assert [line[-2:] for line in capsys.readouterr().err.splitlines()] == [" 2", " 1"]  # said once, then kept to
    assert torch.equal(plain.sampler.seen, short.sampler.seen)
    for whole, parts in zip(plain.model.parameters(), short.model.parameters(), strict=True):
        torch.testing.assert_close(parts.grad, whole.grad, atol=1e-6, rtol=1e-4)


def test_rate_is_annealed(folder, tmp_path):
    loop, rates = loop_of(folder, tmp_path, lr=1.0, lr_anneal_steps=4, steps=4), []
    for _ in range(4):
        loop.train_step()
        rates.append(loop.optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_lr_anneal_steps_is_the_number_of_steps(call, folder, tmp_path):
    assert train(call, folder, tmp_path / "out", "--steps", 50, "--lr_anneal_steps", 2)["step"] == 2


def test_diverged_weights_are_never_saved(folder, tmp_path):
    loop = loop_of(folder, tmp_path, steps=6, save_interval=2, log_interval=100)
    step = loop.train_step
    loop.train_step = lambda: step() * (float("nan") if loop.step > 2 else 1.0)
    with pytest.raises(ValueError, match="got loss nan at step 4.*the last save is kept"):
        loop.run()
    assert checkpoint.load(tmp_path / "loop" / "state.pt")["step"] == 2


def test_any_number_of_diffusion_steps_gets_its_sheet(call, folder, tmp_path):
    train(call, folder, tmp_path / "out", "--diffusion_steps", 30, "--steps", 1)  # ddim25 of 30 does not exist
    assert (tmp_path / "out" / "samples.png").exists()


def test_batches_depend_on_the_step_alone_and_are_in_range(picture_folder, tmp_path):
    data = load_images(picture_folder(tmp_path, {"white": [255], "black": [0]}), 16)
    images, labels = data.batch(8, 3, 1, flip=True, device=torch.device("cpu"))
    again = data.batch(8, 3, 1, flip=True, device=torch.device("cpu"))
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    names = [data.class_names[label] for label in labels]
    assert [float(image.unique()) for image in images] == [1.0 if name == "white" else -1.0 for name in names]
    assert {"white", "black"} == set(names)


def test_images_beside_folders_are_read_too(picture_folder, tmp_path):
    picture_folder(tmp_path, {".": [7], "b": [8], "a/deep": [9]})
    data = load_images(tmp_path, 16)
    assert data.class_names == ["a", "b", "."] and data.images[:, 0, 0, 0].tolist() == [9, 8, 7]
    assert load_images(tmp_path / "b", 16).class_names == ["."]
    assert load_images(tmp_path, 16, ["b", "a"]).images[:, 0, 0, 0].tolist() == [8, 9]


@pytest.mark.slow
def test_script_runs_from_another_folder(folder, tmp_path):
    command = [sys.executable, ROOT / "guided_diffusion" / "image_train.py", "--data_dir", "images", *FLAGS]
    done = subprocess.run([*command, "--save_dir", "out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.pt").exists() and "saved out/model.pt" in done.stdout
