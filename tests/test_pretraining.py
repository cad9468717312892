"""What a training resumes from, and what it refuses: other images and flags, numbers out of range, useless weights."""

import json
import os
import shutil

import pytest
from PIL import Image

import guided_diffusion.image_train as image_train
from guided_diffusion.made_with import NO_EFFECT
from guided_diffusion.pool import Pool, subset_path
from guided_diffusion.train_flags import RANGES, REPLACED, defaults
from guided_diffusion.train_util import TrainLoop
from tests.conftest import same, slow
from utils import checkpoint
from utils.lock import locked

FLAGS = {
    "image_size": 16, "num_channels": 8, "num_res_blocks": 1, "channel_mult": "1", "num_heads": 1,
    "attention_resolutions": "", "noise_schedule": "cosine", "diffusion_steps": 4, "batch_size": 2, "steps": 4,
    "lr": 1e-2, "device": "cpu", "hold_out": 0,
}  # fmt: skip
OTHER = {
    "image_size": 8, "num_channels": 16, "num_res_blocks": 2, "channel_mult": "1,2", "num_heads": 2,
    "attention_resolutions": "8", "noise_schedule": "linear", "diffusion_steps": 5, "batch_size": 3, "lr": 2e-2,
    "hold_out": 0.1, "steps": 3, "weight_decay": 0.1, "lr_anneal_steps": 4, "ema_rate": 0.5, "grad_clip": 1.0,
    "random_flip": True, "schedule_sampler": "loss-second-moment", "precision": "float32", "half_weights": True,
    "seed": 7, "num_heads_upsample": 1, "num_head_channels": 8, "dropout": 0.1, "class_cond": True,
    "use_scale_shift_norm": False, "resblock_updown": True, "use_new_attention_order": True, "learn_sigma": True,
    "timestep_respacing": "2", "use_kl": True, "predict_xstart": True, "rescale_timesteps": True,
    "rescale_learned_sigmas": True, "loss_weighting": "min_snr",
}  # fmt: skip


def words(**flags):
    return [word for name, value in (FLAGS | flags).items() for word in (f"--{name}", value)]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """Few samples to measure, and to show; a short trial."""
    sheet = TrainLoop.sample_sheet
    monkeypatch.setattr("guided_diffusion.memorisation.SAMPLES", 4)
    monkeypatch.setattr(image_train, "TRIAL", 0.0)
    monkeypatch.setattr(TrainLoop, "sample_sheet", lambda loop: sheet(loop, 2))


@pytest.fixture
def folder(picture_folder, tmp_path):
    return picture_folder(tmp_path / "images", {name: [20 * i, 255 - 30 * i, 128] for i, name in enumerate("abc")})


@pytest.fixture
def train(call, folder, tmp_path):
    """train(out, data=folder, **flags) -> status, stdout, stderr."""

    def run(out="out", data=None, **flags):
        where = {} if "pool" in flags else {"save_dir": tmp_path / out}
        return call(image_train, "--data_dir", data or folder, *words(**where, **flags))

    return run


def model(tmp_path, out="out"):
    return checkpoint.load(tmp_path / out / "model.pt")


def cut(train, monkeypatch, at, out="out", **flags):
    """Kill a training before the step after `at`, of saves every 2 steps."""
    step = TrainLoop.train_step

    def killed(loop):
        if loop.step == at:
            raise KeyboardInterrupt
        return step(loop)

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoop, "train_step", killed)
        status, _, err = train(out, save_interval=2, **flags)
    assert status == 130, err


def tree(place):
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def refused(tmp_path, result, *named):
    status, _, err = result
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    for word in named:
        assert word in err


# ---- other flags and images


def test_every_flag_is_known_to_change_the_weights_or_not():
    assert {*defaults()} == {*OTHER} | NO_EFFECT | {"use_fp16"}


@pytest.mark.parametrize("out", ["cut", slow("whole")])
def test_other_flags_are_refused_by_name(train, tmp_path, monkeypatch, out):
    cut(train, monkeypatch, 3, out)
    if out == "whole":
        assert train(out)[0] == 0
    before = tree(tmp_path)
    for name, value in OTHER.items():
        refused(tmp_path, train(out, **{name: value}), f"{name} ")
    assert tree(tmp_path) == before
    assert train(out, microbatch=1, log_interval=3, quiet=True, use_checkpoint=True)[0] == 0


@pytest.mark.parametrize("name", ["lr", "image_size", "seed", "random_flip", "loss_weighting"])
def test_a_pool_is_made_with_one_set_of_flags(train, tmp_path, name):
    pool = tmp_path / "pool"
    assert train(pool=pool, classes_per_model=1, subsets=1)[0] == 0
    before = tree(pool)
    for subsets in (1, 2):
        refused(tmp_path, train(pool=pool, classes_per_model=1, subsets=subsets, **{name: OTHER[name]}), name, "pool")
    refused(tmp_path, train(pool=pool, classes_per_model=1, subsets=2, steps=8), "subset1", "--subsets")
    refused(tmp_path, train(pool=pool, classes_per_model=1, steps=3), "steps 4 (got 3)")
    assert tree(pool) == before


def test_images_are_told_by_their_contents(train, folder, tmp_path, monkeypatch):
    flags = dict(pool=tmp_path / "pool", classes_per_model=1)
    cut(train, monkeypatch, 3)
    assert train(**flags, subsets=1)[0] == 0
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert train(data=moved)[0] == 0 and train(data=moved, **flags, subsets="1,2")[0] == 0
    Image.new("RGB", (16, 16), (1, 2, 3)).save(moved / "a" / "001.png")  # in place of another
    before = tree(tmp_path)
    for result in (train(data=moved), train(data=moved, **flags), train(data=moved, **flags, subsets=1)):
        refused(tmp_path, result, "model.pt", "other images")
    assert tree(tmp_path) == before and not subset_path(tmp_path / "pool", 3).exists()
    (moved / "b").rename(moved / "x")
    refused(tmp_path, train(data=moved), "other images")


def old(path):
    """Take out of a file what older versions did not write."""
    contents = checkpoint.load(path)
    del contents["made_with"]
    checkpoint.save(path, contents)


def test_files_of_older_versions_resume_with_a_line(train, tmp_path, monkeypatch):
    assert train("whole")[0] == 0
    cut(train, monkeypatch, 3)
    old(tmp_path / "out" / "state.pt")
    refused(tmp_path, train(num_heads=2), "num_heads 1 (got 2)")
    status, text, err = train()
    assert status == 0 and "older version" in text and "--random_flip" in text, err
    assert same(model(tmp_path)["model"], model(tmp_path, "whole")["model"])
    old(tmp_path / "out" / "model.pt")
    assert train()[0] == 0 and "done" in train()[1]
    refused(tmp_path, train(steps=3), "steps 4 (got 3)")
    assert train(steps=6)[0] == 0 and model(tmp_path)["step"] == 6


def test_a_pool_of_an_older_version(train, tmp_path):
    flags = dict(pool=tmp_path / "pool", classes_per_model=1)
    assert train(**flags, subsets=1)[0] == 0
    index = tmp_path / "pool" / "pool.json"
    contents = json.loads(index.read_text())
    del contents["made_with"]
    index.write_text(json.dumps(contents))
    old(subset_path(tmp_path / "pool", 1))
    refused(tmp_path, train(**flags, image_size=8), "image_size 16 (got 8)")
    refused(tmp_path, train(**flags, num_heads=2), "num_heads 1 (got 2)")
    status, text, _ = train(**flags)
    assert status == 0 and "older version" in text and len(Pool(tmp_path / "pool")) == 3
    index.write_text('{"models": ')  # damaged: the models say what they were made with
    assert train(**flags)[0] == 0
    refused(tmp_path, train(**flags, lr=0.5), "lr 0.01 (got 0.5)")


# ---- further, and what is left


def test_trained_further_as_if_it_had_never_ended(train, tmp_path, monkeypatch):
    assert train("whole", steps=8, keep_state=True)[0] == 0
    assert train(keep_state=True)[0] == 0 and (tmp_path / "out" / "state.pt").exists()
    assert "done" in train()[1] and (tmp_path / "out" / "state.pt").exists()  # kept until it is trained further
    cut(train, monkeypatch, 7, steps=8)
    refused(tmp_path, train(), "steps 8 (got 4)")
    assert train(steps=8)[0] == 0
    assert same(model(tmp_path), model(tmp_path, "whole")) and not list((tmp_path / "out").glob("state*"))
    assert (tmp_path / "whole" / "state.pt").exists() and not (tmp_path / "whole" / "state.previous.pt").exists()


@pytest.mark.parametrize("steps", ["steps", slow("lr_anneal_steps")])
def test_trained_further_from_average_weights(train, tmp_path, monkeypatch, steps):
    assert train(**{steps: 4})[0] == 0
    shutil.copytree(tmp_path / "out", tmp_path / "cut")
    first = model(tmp_path)["model"]
    starts = []
    restore = TrainLoop.restore
    monkeypatch.setattr(
        TrainLoop, "restore", lambda loop: (restore(loop), starts.append(loop.ema.state_dict()["out.2.bias"].clone()))
    )
    status, text, err = train(**{steps: 8})
    assert status == 0 and "fresh optimiser" in text, err
    assert same(starts[0], first["out.2.bias"]) and model(tmp_path)["step"] == 8
    cut(train, monkeypatch, 7, "cut", **{steps: 8})
    assert train("cut", **{steps: 8})[0] == 0 and same(model(tmp_path, "cut"), model(tmp_path))
    figure = json.loads((tmp_path / "out" / "memorisation.json").read_text())
    assert figure["samples"] > 0


def test_an_annealed_run_says_that_it_cannot_be_lengthened(train, tmp_path, monkeypatch):
    cut(train, monkeypatch, 3, lr_anneal_steps=4)
    refused(tmp_path, train(lr_anneal_steps=6), "lr_anneal_steps 4 (got 6)")
    assert train(lr_anneal_steps=4, keep_state=True)[0] == 0
    refused(tmp_path, train(steps=9), "lr_anneal_steps 4 (got 0)")
    status, text, _ = train(lr_anneal_steps=6)
    assert status == 0 and "differs from 6 steps" in text and model(tmp_path)["step"] == 6


def test_a_constant_rate_may_fall_later(train, tmp_path, monkeypatch):
    """As the fontchars pool was trained: so many steps at one rate, then more while it falls to 0."""
    assert train(steps=4, lr=0.01, keep_state=True)[0] == 0
    rates, step = [], TrainLoop.train_step

    def watched(loop):
        total = step(loop)
        rates.append(loop.optimizer.param_groups[0]["lr"])
        return total

    monkeypatch.setattr(TrainLoop, "train_step", watched)
    status, text, err = train(lr_anneal_steps=8, lr=0.01)
    assert status == 0 and "lowering" in text, err
    assert rates == pytest.approx([0.01 * (1 - at / 8) for at in (4, 5, 6, 7)]) and model(tmp_path)["step"] == 8


def test_a_pool_is_trained_further(train, tmp_path):
    flags = dict(pool=tmp_path / "pool", classes_per_model=2)
    assert train(**flags, subsets=1, keep_state=True)[0] == 0
    assert "of which are done" in train(**flags, steps=6, dry_run=True)[1]
    assert train(**flags, steps=6)[0] == 0 and train("whole", **(flags | {"pool": tmp_path / "w"}), steps=6)[0] == 0
    for m in (1, 2):
        one, other = (checkpoint.load(subset_path(tmp_path / pool, m)) for pool in ("pool", "w"))
        assert one["step"] == 6 and same(one, other)
    contents = json.loads((tmp_path / "pool" / "pool.json").read_text())
    assert contents["steps"] == 6 and contents == json.loads((tmp_path / "w" / "pool.json").read_text())


def test_stopped_once_the_model_is_there(train, tmp_path, monkeypatch):
    assert train("whole", save_interval=2)[0] == 0

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("guided_diffusion.train_util.drop_state", killed)
        assert train(save_interval=2)[0] == 130
    assert (tmp_path / "out" / "state.pt").exists() and (tmp_path / "out" / "model.pt").exists()
    (tmp_path / "out" / ".model.pt.1234.tmp").write_bytes(b"x")
    status, text, err = train()
    assert status == 0 and "is done" in text and "whether it copies" in text, err
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}
    assert same(model(tmp_path), model(tmp_path, "whole"))
    status, text, _ = train()
    assert status == 0 and "is done" in text and "whether it copies" not in text  # measured once


def test_a_pool_stopped_once_a_model_is_there(train, tmp_path, monkeypatch):
    flags = dict(pool=tmp_path / "pool", classes_per_model=3, save_interval=2)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("guided_diffusion.train_util.drop_state", killed)
        assert train(**flags)[0] == 130
    assert train(**flags)[0] == 0 and not list((tmp_path / "pool").rglob("state*"))
    assert json.loads((tmp_path / "pool" / "pool.json").read_text())["memorisation"]["subset1"]["samples"] > 0


def test_temporary_files_of_killed_runs_are_swept_under_the_lock(tmp_path):
    run, other = tmp_path / "run", tmp_path / "run" / "test"
    for name in (
        "run/.last.pt.12.tmp",
        "run/pseudo/b/.x.pt.7.tmp",
        "run/test/.r.json.3.tmp",
        "run/my.tmp",
        "run/.a.tmp",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (other / ".lock").touch()  # a run of its own, which may be at work
    with locked(run):
        left = {os.path.relpath(path, run) for path in tree(run)}
        assert left == {".lock", "test/.lock", "test/.r.json.3.tmp", "my.tmp", ".a.tmp"}
        with pytest.raises(ValueError), locked(run):
            pass


# ---- folders of folders


@pytest.mark.parametrize("flags", [{}, {"class_cond": True}, {"pool": "pool"}])
def test_the_folder_of_all_splits_is_refused(train, tmp_path, picture_folder, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    for split in ("meta_train", "meta_val", "meta_test"):
        picture_folder(tmp_path / "mine" / "set" / split, {"a": [1, 2, 3], "b": [4, 5]})
    for data in ("mine/set", "mine"):
        refused(tmp_path, train(data=data, **flags), "mine/set/meta_train")
    refused(tmp_path, train(held_out_dir="mine/set", **flags), "--held_out_dir mine/set/meta_test")
    assert not (tmp_path / "out").exists() and not (tmp_path / "pool").exists()
    assert train(data="mine/set/meta_train", **flags)[0] == 0


@pytest.mark.parametrize("flags", [{"class_cond": True}, {"pool": "pool"}])
@pytest.mark.parametrize("own", [[], [7, 8]])
def test_a_class_folder_that_holds_folders_is_refused(train, tmp_path, picture_folder, monkeypatch, flags, own):
    monkeypatch.chdir(tmp_path)
    picture_folder(tmp_path / "deep", {"animals/cat": [1, 2], "animals/dog": [3, 4], "animals": own, "cars": [5, 6]})
    refused(tmp_path, train(data="deep", **flags), "deep/animals")
    assert not (tmp_path / "out").exists() and not (tmp_path / "pool").exists()
    assert train("one", data="deep")[0] == 0  # without classes, nested as one likes


# ---- flags


def test_every_number_has_a_range():
    numbers = {name for name, value in defaults().items() if type(value) in (int, float)}
    assert numbers == {*RANGES}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_range(train, folder, tmp_path, name):
    for value in ("nan", "inf", "-inf", "-7", "1e400", "9" * 30):
        if value == "9" * 30 and RANGES[name][1] == float("inf"):
            continue
        refused(tmp_path, train(**{name: value}), name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, value", [("channel_mult", "1,nan"), ("channel_mult", "inf"), ("channel_mult", "1,-2"),
                                         ("channel_mult", "1e9"), ("attention_resolutions", "inf"),
                                         ("lr", "1e9"), ("num_head_channels", "0")])  # fmt: skip
def test_lists_of_numbers_and_rates(train, tmp_path, name, value):
    refused(tmp_path, train(**{name: value}), name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag, value, instead", [
    ("resume_checkpoint", "a/model010000.pt", "--save_dir"), ("ema_rate", "0.5,0.9999", "--ema_rate 0.9999"),
    ("fp16_scale_growth", "1e-3", "--precision"), ("sigma_small", "True", "--learn_sigma"),
    ("use_fp16", "True", "--precision"),
    ("large_size", "64", "--image_size"), ("small_size", "32", "--image_size"), ("iterations", "9", "--steps"),
    ("anneal_lr", "True", "--lr_anneal_steps"), ("classifier_depth", "2", "main.py"),
])  # fmt: skip
def test_flags_of_guided_diffusion_that_are_replaced(train, tmp_path, flag, value, instead):
    refused(tmp_path, train(**{flag: value}), flag, instead)
    assert not (tmp_path / "out").exists()


def test_trainer_flags_of_guided_diffusion_are_all_known():
    # scripts/image_train.py and script_util.py there
    theirs = (
        "data_dir schedule_sampler lr weight_decay lr_anneal_steps batch_size microbatch ema_rate log_interval "
        "save_interval resume_checkpoint use_fp16 fp16_scale_growth image_size num_channels num_res_blocks num_heads "
        "num_heads_upsample num_head_channels attention_resolutions channel_mult dropout class_cond use_checkpoint "
        "use_scale_shift_norm resblock_updown use_new_attention_order learn_sigma diffusion_steps noise_schedule "
        "timestep_respacing use_kl predict_xstart rescale_timesteps rescale_learned_sigmas large_size small_size "
        "sigma_small"
    )
    assert {*theirs.split()} <= {*defaults()} | {*REPLACED}


def test_their_default_values_are_taken(train):
    assert train(resume_checkpoint="", sigma_small="False", use_fp16="False")[0] == 0


# ---- mirroring, and weights of no use


def test_the_first_line_says_whether_it_mirrors(train, monkeypatch):
    flips = []
    batch = image_train.TrainingImages.batch
    monkeypatch.setattr(
        image_train.TrainingImages, "batch", lambda *a, flip, **k: (flips.append(flip), batch(*a, flip=flip, **k))[1]
    )
    for out, flags in (("a", {}), ("b", {"random_flip": True})):
        status, text, _ = train(out, **flags)
        assert status == 0 and "mirrors" in text.splitlines()[0]
        assert ("no images" in text.splitlines()[0]) == (not flags) and {*flips} == {bool(flags)}
        flips.clear()


@pytest.mark.parametrize("steps", [1, 4])
def test_a_useless_model_is_not_saved(train, tmp_path, monkeypatch, steps):
    monkeypatch.setitem(RANGES, "lr", (0, 1e30, ""))
    refused(tmp_path, train(lr=1e9, steps=steps), "lr 1000000000.0", "--lr")
    assert not (tmp_path / "out" / "model.pt").exists() and not (tmp_path / "out" / "state.pt").exists()


@pytest.mark.parametrize("network", ["model", "ema"])
def test_weights_that_are_not_finite_are_not_saved(train, tmp_path, monkeypatch, network):
    step = TrainLoop.train_step

    def broken(loop):
        loss = step(loop)
        if loop.step == 4:
            next(getattr(loop, network).parameters()).data[0] = float("nan")
        return loss

    monkeypatch.setattr(TrainLoop, "train_step", broken)
    refused(tmp_path, train(save_interval=2, quiet=True), "step 4", "--lr")
    assert not (tmp_path / "out" / "model.pt").exists()
    assert checkpoint.load(tmp_path / "out" / "state.pt")["step"] == 2


def test_half_weights_that_overflow_are_not_saved(train, tmp_path, monkeypatch):
    step = TrainLoop.train_step

    def large(loop):
        loss = step(loop)
        loop.ema.time_embed[0].bias.data[0] = -1e6  # SiLU makes 0 of it
        return loss

    monkeypatch.setattr(TrainLoop, "train_step", large)
    assert train("whole")[0] == 0
    refused(tmp_path, train(half_weights=True), "not finite")
    assert not (tmp_path / "out" / "model.pt").exists()
