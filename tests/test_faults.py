"""Faults of disks and hostile files, by the commands: one line in place of a traceback, or the run goes on.

Every case runs a command's main() in this process. What it must answer: exit status 2 and one line on stderr that names
what is wrong, nothing half-written; or exit status 0 with the damaged file named, where a run can do without it.
"""

import builtins
import errno
import io
import json
import math
import os
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import datasets.prepare as prepare
import diffusionmix
import guided_diffusion.image_train as image_train
import main
from config import Settings, flag_of
from datasets import published
from guided_diffusion.pool import subset_path
from tests.conftest import TINY, same, slow
from utils import checkpoint, cli

MAIN = ("--dataset", "custom", "--data-root", "data", "--pool", "pool", "--save-dir", "run", *TINY)
NONE = (*MAIN, "--source", "none")
MIX = (*"--dataset custom --data-root data --pool pool --save-dir test --resume run/best_model.pt".split(),
       *"--episodes 2 --nTestNovel 10 --device cpu --head-steps 2".split())  # fmt: skip
TRAIN = (
    "--data_dir data/meta_train --save_dir one --image_size 16 --num_channels 8 --num_res_blocks 1 --channel_mult 1 "
    "--num_heads 1 --steps 1 --batch_size 2 --diffusion_steps 4 --noise_schedule cosine --device cpu"
).split()
POOL = (*TRAIN, "--pool", "made", "--classes_per_model", "3")
MINI = ("miniimagenet", "--from", "source", "--out", "mini", "--size", "16")
LONG = "n" * 300


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_pool, picture_folder):
    """Images, pools, a run with random weights, a pool that image_train.py made. For copying only."""
    place = tmp_path_factory.mktemp("faults") / "world"
    levels = {f"c{i}": [40 * i + j for j in range(12)] for i in range(5)}
    for split in ("meta_val", "meta_test"):
        picture_folder(place / "data" / split, levels)
    picture_folder(place / "data" / "meta_train", {f"c{i}": [40 * i, 50] for i in range(3)})
    picture_folder(place / "source", {name: [7, 9] for name in ("n01", "n02", "n03")})
    make_pool(place / "pool", [3, 3])
    (place / "loop").symlink_to("loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        few(patch)
        for module, argv in ((main, NONE), (image_train, POOL), (prepare, MINI)):
            patch.setattr("sys.argv", ["command", *argv])
            module.main()
    for folder in ("run", "made"):
        Path(place, folder, "skipped_images.csv").write_text("path,reason\nelsewhere/a.png,is no image\n")
    return place


def few(patch):
    """Let miniImageNet have three classes of two images."""
    patch.setattr(published, "PER_CLASS", 2)
    patch.setattr(published, "MINIIMAGENET", {"meta_train": ("n01",), "meta_val": ("n02",), "meta_test": ("n03",)})


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A copy of the world to run commands in."""
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(tmp_path / "world")
    few(monkeypatch)
    return tmp_path / "world"


def everything(place):
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def refused(answer, *words):
    """Hold an answer against what one must be that refuses: one line that has all `words`."""
    status, _, err = answer
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    assert len(lines[0]) < 700 and all(word in lines[0] for word in words), lines[0]


# ---- secondary files that are damaged: the run goes on, and says which

DAMAGES = {
    "cut": lambda content: content[: len(content) * 2 // 3].rstrip(b"\n}] "),
    "not UTF-8": lambda content: b"\xff\xfe\x80" + content,
    "deeply nested": lambda content: b'{"epoch": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n" + content,
    "of another type": lambda content: b"3\n",
}
SECONDARY = {
    "run/metrics.jsonl": (main, NONE),
    "run/environment.json": (main, NONE),
    "run/config.json": (main, NONE),
    "run/skipped_images.csv": (main, NONE),
    "made/pool.json": (image_train, POOL),
    "mini/prepared.json": (prepare, MINI),
}


EACH = [(name, damage) for name in SECONDARY for damage in DAMAGES]


@pytest.mark.pictures
@pytest.mark.parametrize(
    "name, damage", [each if "cut" in each or "made/pool.json" in each else slow(*each) for each in EACH]
)
def test_a_damaged_secondary_file_is_named_and_blocks_nothing(name, damage, call, place):
    module, argv = SECONDARY[name]
    path = place / name
    content = path.read_bytes()
    if name.endswith("jsonl"):
        content = b'{"epoch": 0, "loss": 1}\n{"epoch": 0, "loss": 2}\n'
    path.write_bytes(DAMAGES[damage](content))
    if name.endswith("jsonl"):  # half of the last line is no damage: a kill leaves it
        path.write_bytes(path.read_bytes() + b'\n{"epoch": 0, "val_accuracy": 30.0}\n')
    if name.endswith("csv") and damage == "cut":
        path.write_bytes(content[:-20])
    models = {each: checkpoint.load(each)["model"] for each in place.rglob("*.pt") if "pool" not in each.parts}
    status, _, err = call(module, *argv)
    assert status == 0 and "Traceback" not in err, err
    assert f"{name}: " in err
    assert all("no report" not in line for line in err.splitlines())
    for each, weights in models.items():
        assert same(checkpoint.load(each)["model"], weights)
    if name.endswith("json") and name != "mini/prepared.json":  # it is mended: the next run says nothing of it
        assert isinstance(json.loads(path.read_text()), dict | list)
        assert f"{name}: " not in call(module, *argv)[2]


@pytest.mark.parametrize("value", [{"models": 5}, {"models": [], "memorisation": 3}, {"hold_out": "x"}, []])
def test_entries_of_another_type_in_pool_json(value, call, place):
    path = place / "made" / "pool.json"
    sound = json.loads(path.read_text())
    path.write_text(json.dumps({**sound, **value, "models": sound["models"]} if "memorisation" in value else value))
    status, _, err = call(image_train, *POOL)
    assert status == 0, err
    assert json.loads(path.read_text())["models"] == sound["models"]


def test_images_of_settings_that_nothing_tells_any_more_are_drawn_anew(call, place):
    assert call(main, *MAIN, "--save-dir", "new", "--max-epoch", 1, "--num-classes", 6)[0] == 0
    folder = place / "new"
    first = (folder / "pseudo" / "round00" / "images.npy").read_bytes()
    for name in ("last.pt", "best_model.pt"):
        (folder / name).unlink()
    (folder / "config.json").write_text("{")
    (folder / "pseudo" / "round00" / "images.npy").write_bytes(first[:-4] + bytes(4))
    status, _, err = call(main, *MAIN, "--save-dir", "new", "--max-epoch", 1, "--num-classes", 6)
    assert status == 0 and "new/config.json: " in err
    assert (folder / "pseudo" / "round00" / "images.npy").read_bytes() == first


@pytest.mark.pictures
def test_a_failed_picture_ends_no_training(call, place, monkeypatch):
    break_renames(monkeypatch, "curves.png", errno.EIO)
    status, out, err = call(main, *NONE, "--save-dir", "new")
    assert status == 0 and "best on meta_val" in out and "curves.png" in err
    assert not (place / "new" / "curves.png").exists() and (place / "new" / "last.pt").exists()


# ---- a disk that fails, is full, or may only be read


def break_renames(patch, name, number):
    """Let no file be renamed to `name`, which is how each that is written whole comes to be."""
    real = os.replace

    def replace(source, target):
        if Path(target).name == name:
            raise OSError(number, os.strerror(number))
        real(source, target)

    patch.setattr(os, "replace", replace)


def break_appends(patch, name, number):
    """Let nothing be written to an opened log."""
    real = builtins.open

    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    def opened(path, mode="r", *rest, **options):
        return Broken() if Path(str(path)).name == name and "a" in mode else real(path, mode, *rest, **options)

    patch.setattr(builtins, "open", opened)


def break_folders(patch, name, number):
    """Let no folder be made."""

    def mkdir(path, *rest, **options):
        if not path.is_dir():
            raise OSError(number, os.strerror(number), str(path))

    patch.setattr(Path, "mkdir", mkdir)


@pytest.mark.parametrize("number", ["ENOSPC", slow("EIO"), slow("EROFS"), slow("EDQUOT")])
@pytest.mark.parametrize(
    "module, argv, break_, name",
    [
        (main, (*NONE, "--save-dir", "new"), break_renames, "last.pt"),
        (main, (*NONE, "--save-dir", "new"), break_appends, "metrics.jsonl"),
        (main, (*NONE, "--save-dir", "new"), break_appends, "log_train.txt"),
        (main, (*NONE, "--save-dir", "new"), break_folders, "new"),
        (diffusionmix, MIX, break_renames, "results.json"),
        (image_train, TRAIN, break_renames, "model.pt"),
    ],
    ids=["last.pt", "metrics.jsonl", "log_train.txt", "a folder", "results.json", "model.pt"],
)
def test_a_failing_disk(module, argv, break_, name, number, call, place, monkeypatch):
    before = everything(place)
    with monkeypatch.context() as patch:
        break_(patch, name, getattr(errno, number))
        refused_at_work(call(module, *argv), name)
    after = everything(place)
    assert before.items() <= after.items()  # nothing that was there is lost or changed
    assert not [path for path in after if path.endswith(".tmp")] and f"/{name}" not in str(list(after - before.keys()))
    assert call(module, *argv)[0] == 0  # the same command again, once the disk is mended


def refused_at_work(answer, word):
    """One line that ends the run; lines of what was left out may stand before it."""
    status, _, err = answer
    line = err.strip().splitlines()[-1]
    assert status == 2 and line.startswith("error: ") and word in line and "Traceback" not in err, err


def test_a_file_that_cannot_be_read(call, place, monkeypatch):
    real = builtins.open

    class Broken(io.BytesIO):
        def read(self, *size):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def opened(path, *rest, **options):
        return Broken() if str(path).endswith("best_model.pt") else real(path, *rest, **options)

    monkeypatch.setattr(builtins, "open", opened)
    refused(call(diffusionmix, *MIX), "run/best_model.pt", "Input/output error")


# ---- names, numbers and sizes


@pytest.mark.parametrize(
    "module, argv, flag",
    [
        *((main, MAIN, flag) for flag in ("--save-dir", "--pool", "--data-root", "--resume")),
        *((image_train, TRAIN, flag) for flag in ("--save_dir", "--data_dir")),
        (prepare, MINI, "--out"),
        (prepare, MINI, "--from"),
        (diffusionmix, MIX, "--resume"),
    ],
)
@pytest.mark.parametrize("name", [LONG, "loop"])
def test_names_that_lead_nowhere(module, argv, flag, name, call, place):
    before = everything(place)
    refused(call(module, *argv, flag, name), name[:60])
    assert everything(place) == before


@pytest.mark.parametrize("name", [LONG + ".csv", "loop"])
def test_answers_with_such_a_name(name, call, place):
    argv = (*MIX, "--support", "data/meta_val", "--query", "data/meta_test", "--out", name)
    refused(call(diffusionmix, *argv), "--out", name[:60])


def test_the_longest_name_there_can_be(tmp_path):
    path = tmp_path / ("n" * 255)
    checkpoint.save(path, {"a": 1})
    assert checkpoint.load(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "flags",
    [
        "--lr 1e9", "--lr inf", "--weight-decay 1e9", "--kl-weight inf", "--guidance-scale nan", "--seed -1",
        f"--seed {10**30}", "--num-head-channels -2", f"--sample-batch {10**12}", "--workers 1000000",
        "--height 100000 --width 100000", f"--max-epoch {10**12}", "--train-batch 1000000", "--device meta",
        "--samples-per-class 1000000 --num-classes 10000", "--num-classes 300000",
    ],
)  # fmt: skip
def test_numbers_out_of_range(flags, call, place):
    before = everything(place)
    refused(call(main, *MAIN, "--save-dir", "new", *flags.split()), flags.split()[0].split("-")[-1])
    assert everything(place) == before


def test_a_training_that_diverges_keeps_what_was_saved(call, place, monkeypatch):
    monkeypatch.setattr("models.learners.PaperLearners.train_meta_model", lambda *_: {"loss": math.nan, "lr": 0.1})
    argv = (*MAIN, "--source", "real", "--save-dir", "new", "--train_nTestNovel", 3, "--nKnovel", 3, "--nTestNovel", 9)
    refused_at_work(call(main, *argv), "got loss nan in epoch 1 at rate 0.1; lower --lr")
    assert not (place / "new" / "last.pt").exists()


@pytest.mark.parametrize("module, argv", [(diffusionmix, MIX), (image_train, TRAIN)])
def test_a_device_that_holds_no_numbers(module, argv, call, place):
    refused(call(module, *argv, "--device", "meta"), "meta")


def test_more_episodes_than_memory_holds(call, place):
    refused(call(diffusionmix, *MIX, "--episodes", 1_000_000, "--nExemplars", 900), "--episodes")


@pytest.mark.parametrize(
    "field", [f for f in fields(Settings) if type(f.default) in (int, float)], ids=lambda f: f.name
)
def test_no_number_is_endless(field):
    for value in (math.nan, math.inf, -math.inf, -(10**9), 10**30):
        with pytest.raises(ValueError, match=f"{flag_of(field)} "):
            Settings(**{field.name: value})


# ---- files of strangers


class Grows:
    """What a pickle may name to make bytes from a number."""

    def __init__(self, made, *arguments):
        self.made, self.arguments = made, arguments

    def __reduce__(self):
        return self.made, self.arguments


def laughs(depth=40):
    """A list of two lists of two lists ... that takes a few bytes, and for ever to print."""
    value = ["ha"]
    for _ in range(depth):
        value = [value, value]
    return value


def deep(levels=300):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.fixture
def sound(place):
    return checkpoint.load(subset_path("pool", 1))


@pytest.mark.parametrize("older", [False, True], ids=["zip", "older"])
@pytest.mark.parametrize("made", [bytearray, torch.FloatTensor], ids=["bytearray", "tensor"])
def test_a_pickle_that_would_fill_the_memory(made, older, call, place):
    torch.save({"w": Grows(made, 3_000_000_000)}, "hostile.pt", _use_new_zipfile_serialization=not older)
    for module, argv in ((main, (*MAIN, "--pool", "hostile.pt")), (diffusionmix, (*MIX, "--resume", "hostile.pt"))):
        refused(call(module, *argv), "hostile.pt", made.__name__)


FLAGS = {
    "a billion laughs": {"noise_schedule": laughs()},
    "deep lists": {"channel_mult": deep()},
    "a long text": {"channel_mult": "1," * 100_000},
    "num_res_blocks": {"num_res_blocks": 100_000},
    "num_classes": {"num_classes": 100_000, "class_cond": True},
    "image_size": {"image_size": 65_536},
    "half a head": {"num_heads": 1.5},
    "NaN": {"dropout": math.nan},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_flags_of_a_checkpoint(flags, call, place, sound):
    torch.save({**sound, "flags": {**sound["flags"], **flags}}, "hostile.pt")
    for module, argv in ((main, MAIN), (diffusionmix, MIX)):
        refused(call(module, *argv, "--pool", "hostile.pt"), "hostile.pt")


def test_more_classes_than_memory_holds(call, place, sound):
    torch.save({**sound, "num_classes": 100_000}, "hostile.pt")
    refused(call(main, *MAIN, "--pool", "hostile.pt"), "hostile.pt", "num_classes")


def changed(state, **entries):
    return {**state, **entries}


def with_nan(weights):
    name = next(name for name in weights if weights[name].is_floating_point())
    return {**weights, name: weights[name] * math.nan}


RUNS = {
    "a list": lambda s: [1, 2],
    "nothing": lambda s: {},
    "no settings": lambda s: {name: value for name, value in s.items() if name != "settings"},
    "no statistics": lambda s: {name: value for name, value in s.items() if name != "model_statistics"},
    "settings of another type": lambda s: changed(s, settings=3),
    "settings without a backbone": lambda s: changed(s, settings={"scale_cls": 7.0}),
    "another backbone": lambda s: changed(s, settings={**s["settings"], "backbone": "vgg"}),
    "weights of another type": lambda s: changed(s, model="weights"),
    "a weight that is a text": lambda s: changed(s, model={name: "x" for name in s["model"]}),
    "NaN in the weights": lambda s: changed(s, model=with_nan(s["model"])),
    "NaN in the statistics": lambda s: changed(s, model_statistics=with_nan(s["model_statistics"])),
    "statistics of another type": lambda s: changed(s, model_statistics=dict.fromkeys(s["model_statistics"], 3)),
    "a NaN accuracy": lambda s: changed(s, val_accuracy=math.nan),
    "epoch -3": lambda s: changed(s, epoch=-3),
    "epoch 1e9": lambda s: changed(s, epoch=10**9),
    "half an epoch": lambda s: changed(s, epoch=0.5),
    "1e9 classes": lambda s: changed(s, num_classes=10**9),
    "100,000 classes": lambda s: changed(s, num_classes=100_000),
    "no size": lambda s: changed(s, image_size="16"),
    "a billion laughs": lambda s: changed(s, settings=laughs()),
}  # fmt: skip


@pytest.mark.parametrize("change", RUNS.values(), ids=RUNS)
def test_a_malformed_checkpoint_of_a_run(change, call, place):
    state = checkpoint.load("run/best_model.pt")
    torch.save(change(state), "bad.pt")
    refused(call(diffusionmix, *MIX, "--resume", "bad.pt"), "bad.pt")
    if change is not RUNS["100,000 classes"]:  # main.py has a number of its own
        refused(call(main, *NONE, "--save-dir", "new", "--resume", "bad.pt"), "bad.pt")
    assert not (place / "new").exists() and not (place / "test").exists()


LAST = {
    "epoch 1e9": lambda s: changed(s, epoch=10**9),
    "an epoch too many": lambda s: changed(s, epoch=3),
    "no optimisers": lambda s: changed(s, optimizers=[]),
    "optimisers of another type": lambda s: changed(s, optimizers=["x", 3]),
    "NaN in the optimiser": lambda s: changed(s, optimizers=[momentum(each, math.nan) for each in s["optimizers"]]),
    "no learner": lambda s: {name: value for name, value in s.items() if name != "class_learner"},
}


def momentum(state, value):
    return {**state, "state": {0: {"momentum_buffer": torch.full((1,), value)}}}


@pytest.mark.parametrize("change", LAST.values(), ids=LAST)
def test_a_malformed_last_save(change, call, place):
    state = checkpoint.load("run/last.pt")
    torch.save(change(state), "run/last.pt")
    before = everything(place)
    refused(call(main, *NONE), "run/last.pt")
    assert everything(place) == before


# ---- outputs that nobody reads


class Closed(io.StringIO):
    """A stream whose reader has gone, or whose disk is full, which shows when its buffer is written."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def flush(self):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
@pytest.mark.parametrize("argv", [("--help",), NONE], ids=["help", "a run"])
def test_a_closed_pipe(argv, number, monkeypatch, capsys, place):
    monkeypatch.setattr("sys.argv", ["main.py", *argv])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "stdout", Closed(number))
        cli.run(main.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1 and err.startswith("error: ")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes"),
     torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError()],
)  # fmt: skip
def test_no_memory_is_one_line(error, capsys):
    def work():
        raise error

    with pytest.raises(SystemExit) as end:
        cli.run(work)
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
