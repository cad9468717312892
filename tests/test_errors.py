"""What a user gets for a mistake: one line, exit status 2, and no half-made folder.

The table in docs/robustness.md has the line of every case here; WRITE_TABLE=1 writes it anew, else it is compared.
"""

import os
import re
import resource
import signal
import subprocess
import sys
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

import datasets.prepare as prepare
import diffusionmix
import guided_diffusion.image_train as image_train
import main
from guided_diffusion.pool import subset_path
from guided_diffusion.unet import UNetModel
from tests.conftest import ROOT, TINY
from tests.test_checkpoint import Hostile, rewritten
from tests.test_checkpoint import safetensors as write_safetensors
from utils import checkpoint
from utils.lock import locked

DOCUMENT = ROOT / "docs" / "robustness.md"


@pytest.fixture
def place(tmp_path, make_pool, picture_folder, monkeypatch):
    """A folder with data and pools, good and bad, to run commands in."""
    monkeypatch.chdir(tmp_path)
    levels = {f"c{i}": [50 * i] * 12 for i in range(5)}
    picture_folder(tmp_path / "data" / "meta_val", levels)
    picture_folder(tmp_path / "data" / "meta_test", levels)
    picture_folder(tmp_path / "data" / "meta_train", levels)
    picture_folder(tmp_path / "few_classes" / "meta_val", dict(list(levels.items())[:4]))
    picture_folder(tmp_path / "few_images" / "meta_val", {name: [1, 2] for name in levels})
    picture_folder(tmp_path / "few_images" / "meta_train", {name: [1, 2] for name in levels})
    picture_folder(tmp_path / "flat", {".": [1, 2]})
    picture_folder(tmp_path / "one", {"c0": [1, 2]})
    picture_folder(tmp_path / "lacking", {"c0": [1, 2], "c1": []})
    picture_folder(tmp_path / "mixed", {"c0": [1, 2], "more/c1": [1, 2]})
    (tmp_path / "empty" / "meta_val").mkdir(parents=True)
    (tmp_path / "a_file").write_text("x")
    make_pool(tmp_path / "pool", [3, 3])
    make_pool(tmp_path / "conditional", [3, 3], class_cond=True)
    make_pool(tmp_path / "gap", [3, 3, 3])
    subset_path("gap", 2).unlink()
    make_pool(tmp_path / "cut", [3, 3])
    subset_path("cut", 2).write_bytes(subset_path("cut", 2).read_bytes()[:2000])
    make_pool(tmp_path / "tiny", [6], image_size=8)
    checkpoint.save("list.pt", [1, 2])
    checkpoint.save("bare.pt", checkpoint.load(subset_path("pool", 1))["model"])
    checkpoint.save("dict.pt", {"model": {"w": torch.zeros(1)}})
    hostile_files()
    return tmp_path


def hostile_files():
    """Checkpoints and pictures in the working folder that nobody should be fed."""
    sound = checkpoint.load(subset_path("pool", 1))
    weights = sound["model"]
    name = "time_embed.0.bias"

    def save(path, change, flags=None):
        checkpoint.save(path, {**sound, "model": {**weights, **change}, "flags": {**sound["flags"], **(flags or {})}})

    torch.save({"w": Hostile("made-by-the-pickle")}, "runs-code.pt")
    torch.save({"w": Hostile("made-by-the-pickle")}, "runs-code-older.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(1, 1), "module.pt")
    with zipfile.ZipFile("program.pt", "w") as archive:
        for record in ("version", "data.pkl", "constants.pkl"):  # the last one makes it TorchScript
            archive.writestr(f"program/{record}", b"3")
    save("nan.pt", {name: weights[name] * float("nan")})
    save("wrong-shape.pt", {name: torch.zeros(3)})
    save("extra-weight.pt", {"more": torch.zeros(3)})
    save("complex.pt", {name: weights[name].to(torch.complex64)})
    save("huge-flags.pt", {}, {"num_channels": 10**9})
    save("worded-flags.pt", {}, {"num_heads": "four"})
    save("overflows.pt", {name: weights[name] + 1e38})
    checkpoint.save("number.pt", 3)
    checkpoint.save("flipped.pt", sound)
    content = bytearray(Path("flipped.pt").read_bytes())
    content[content.index(weights["input_blocks.0.0.weight"].numpy().tobytes()) + 5] ^= 1
    Path("flipped.pt").write_bytes(content)
    checkpoint.save("bomb.pt", {"w": torch.zeros(10)})
    zeros = bytes(5_000_000)
    rewritten("bomb.pt", lambda name, old: zeros if name.endswith("data/0") else old, zipfile.ZIP_DEFLATED)
    write_safetensors(Path("short.safetensors"), [10**12], 40)
    Path("page.pt").write_text("<html>404 not found</html>")
    Path("empty.pt").touch()
    for folder in (Path("all-bad/c0"), *(Path(f"some-bad/meta_val/c{i}") for i in range(5))):
        folder.mkdir(parents=True)
        for number in range(12):
            (folder / f"{number}.png").write_text("no image")


MAIN = ("--dataset", "custom", "--data-root", "data", "--pool", "pool", "--save-dir", "out", *TINY)
MIX = "--dataset custom --data-root data --pool pool --save-dir out --episodes 2 --nTestNovel 10 --device cpu".split()
TRAIN = (
    "--data_dir data/meta_train --save_dir out --image_size 16 --num_channels 8 --num_res_blocks 1 --channel_mult 1,1 "
    "--num_heads 1 --steps 1 --batch_size 2 --diffusion_steps 4 --noise_schedule cosine --device cpu"
).split()
POOL = (*TRAIN, "--pool", "out")

CASES = [
    # flags of meta-training
    (main, MAIN, "--dataset imagenet", "glyphs, co_miniimagenet"),
    (main, MAIN, "--frob 1", "unrecognized arguments"),
    (main, MAIN, "--max-epochs 3", "did you mean --max-epoch?"),
    (main, MAIN, "--support data/meta_val --query flat", "which diffusionmix.py takes"),
    (main, MAIN, "--lr x", "invalid float value"),
    (main, MAIN, "--lr nan", "--lr nan"),
    (main, MAIN, "--lr 1e30", "got --lr 1e+30, expected 0 to 10"),
    (main, MAIN, "--nTestNovel 11", "multiple of the 5"),
    (main, MAIN, "--max-epoch 0", "--max-epoch 0"),
    (main, MAIN, "--start-epoch 2", "--start-epoch"),
    (main, MAIN, "--width 32", "square"),
    (main, MAIN, "--height 8 --width 8", "needs 16"),
    (main, MAIN, "--drop-rate 0.1", "DropBlock is only in resnet12"),
    (main, MAIN, "--device cuda:77", "this machine lacks"),
    (main, MAIN, "--device toaster", "this machine lacks"),
    (main, MAIN, "--sample-steps 60", "cannot take 60 DDIM steps"),
    # what training needs
    (main, MAIN, "--pool nowhere", "nowhere: got no diffusion models"),
    (main, MAIN, "--pool data", "data: got no diffusion models"),
    (main, MAIN, "--pool gap", "up to 3 but not 2"),
    (main, MAIN, "--pool cut", "subset2/ckpt/model.pt: is cut short"),
    (main, MAIN, "--pool a_file --num-classes 5", "a_file: is cut short or is no checkpoint"),
    (main, MAIN, "--pool list.pt", "expected a state dict"),
    (main, MAIN, "--pool dict.pt --num-classes 5", "not the state dict of a guided-diffusion U-Net"),
    (main, MAIN, "--pool bare.pt --image-size 16", "--num-classes"),
    (main, MAIN, "--pool tiny", "needs 16"),
    (main, MAIN, "--dataset un_miniimagenet", "got 2 models for 52 pseudo classes"),
    (main, MAIN, "--dataset co_cifarfs", "expected 13 models"),
    (main, MAIN, "--pool conditional --num-classes 8", "is conditional on 3 classes, got 4"),
    (main, MAIN, "--pool conditional --ask likely", "is conditional, so what it draws has a class already"),
    (main, MAIN, "--first-labels clusters --warm-up 1 --refresh-every 2 --max-epoch 1", "less than --max-epoch, 1"),
    (main, MAIN, "--data-root data,data", "expected folders of different names"),
    (main, MAIN, "--data-root data,", "expected folders of different names"),
    (main, MAIN, "--num-classes 4", "got 4 classes to train on"),
    (main, MAIN, "--source unguided", "got 2 classes to train on (--source unguided)"),
    (main, MAIN, "--first-labels clusters --warm-up 1 --refresh-every 2", "got 2 classes to train on"),
    (main, MAIN, "--first-labels clusters --warm-up 2 --refresh-every 2", "expected less than --refresh-every, 2"),
    (main, MAIN, "--samples-per-class 2", "an episode needs 3"),
    (main, MAIN, "--data-root nowhere", "nowhere/meta_val: no such folder"),
    (main, MAIN, "--data-root empty", "no class with a readable image"),
    (main, MAIN, "--data-root few_classes", "got 4 classes; an episode needs 5 classes of 3 images (1 to learn "),
    (main, MAIN, "--data-root few_images", "2 images in class c0, too few in 4 more; an episode needs 5 classes of 3 "),
    (main, MAIN, "--data-root few_images --samples-per-class 2", "an episode needs 3; ask for more"),
    (main, MAIN, "--source real --nTestNovel 5 --data-root few_images", "few_images/meta_train: got 2 images in class"),
    (main, MAIN, "--source real --samples-per-class 2", "got --samples-per-class 2, an episode needs 3; ask for more"),
    (main, MAIN, "--source real --data-root few_classes", "few_classes/meta_train: no such folder"),
    (main, MAIN, "--resume nowhere.pt", "nowhere.pt: no such checkpoint"),
    (main, MAIN, "--resume dict.pt", "dict.pt: is no checkpoint of main.py"),
    (main, MAIN, "--resume list.pt", "list.pt: is no checkpoint of main.py"),
    (main, MAIN, "--save-dir a_file", "a_file is a file; choose another folder"),
    (main, MAIN, "--resume https://nowhere.invalid/a.pt", "check address, network"),
    (main, MAIN, "--pool gs://../pool", "without .."),
    (main, MAIN, "--data-root some-bad", "no class with a readable image"),
    # checkpoints of strangers
    (main, MAIN, "--num-classes 5 --pool runs-code.pt", "the object posix.mkdir, and loading that could run code"),
    (main, MAIN, "--num-classes 5 --pool runs-code-older.pt", "the object posix.mkdir, and loading that could run"),
    (main, MAIN, "--num-classes 5 --pool module.pt", "the object torch.nn.modules.linear.Linear"),
    (main, MAIN, "--num-classes 5 --pool program.pt", "TorchScript program, which is code"),
    (main, MAIN, "--num-classes 5 --pool nan.pt", "NaN or infinite: time_embed.0.bias"),
    (main, MAIN, "--num-classes 5 --pool wrong-shape.pt", "wrong shape: time_embed.0.bias (got (3,)"),
    (main, MAIN, "--num-classes 5 --pool extra-weight.pt", "unexpected: more"),
    (main, MAIN, "--num-classes 5 --pool complex.pt", "not a tensor of plain numbers: time_embed.0.bias"),
    (main, MAIN, "--num-classes 5 --pool huge-flags.pt", "num_channels"),
    (main, MAIN, "--num-classes 5 --pool worded-flags.pt", "num_heads"),
    (main, MAIN, "--num-classes 5 --pool number.pt", "got int, expected a state dict"),
    (main, MAIN, "--num-classes 5 --pool flipped.pt", "does not match its checksum"),
    (main, MAIN, "--num-classes 5 --pool bomb.pt", "is a zip of records that claim 5,"),
    (main, MAIN, "--num-classes 5 --pool short.safetensors", "is cut short"),
    (main, MAIN, "--num-classes 5 --pool page.pt", "is no checkpoint"),
    (main, MAIN, "--num-classes 5 --pool empty.pt", "is cut short"),
    (main, MAIN, "--resume runs-code.pt", "could run code"),
    (diffusionmix, MIX, "--resume runs-code.pt", "could run code"),
    (diffusionmix, MIX, "--resume run.pt --pool nan.pt", "NaN or infinite"),
    # folders of other runs
    (main, MAIN, "--save-dir run --source none --seed 2", "run/last.pt: was made with seed 1 (got 2); give"),
    (main, MAIN, "--save-dir run --source none --lr 0.2 --flip no", "with lr 0.1 (got 0.2), flip True (got False)"),
    (main, MAIN, "--save-dir run", "was made with source 'none' (got 'guided')"),
    (main, MAIN, "--save-dir busy", "busy: another run is at work"),
    (diffusionmix, MIX, "--save-dir busy --resume run.pt", "busy: another run is at work"),
    (image_train, TRAIN, "--save_dir busy", "busy: another run is at work"),
    # meta-testing
    (diffusionmix, MIX, "", "out/best_model.pt: no such checkpoint; make it by main.py with the same"),
    (diffusionmix, MIX, "--resume dict.pt", "dict.pt: is no checkpoint of main.py"),
    (diffusionmix, MIX, "--resume a_file", "a_file: is cut short or is no checkpoint"),
    (diffusionmix, MIX, "--mix-steps 300", "at most --mix-level, 200"),
    (diffusionmix, MIX, "--episodes 1", "--episodes 1"),
    (diffusionmix, MIX, "--split meta_train", "meta_val"),
    (diffusionmix, MIX, "--resume run.pt --data-root few_images", "few_images/meta_test: no such folder"),
    (diffusionmix, MIX, "--resume run.pt --data-root few_images --split meta_val", "needs 5 classes of 3 images"),
    (diffusionmix, MIX, "--resume run.pt --save-dir a_file/run", "a_file is a file; choose another folder"),
    (diffusionmix, MIX, "--resume run.pt --pool nowhere", "got no diffusion models"),
    (diffusionmix, MIX, "--resume run.pt --pool cut", "subset2/ckpt/model.pt: is cut short"),
    # own pictures
    (diffusionmix, MIX, "--support data/meta_val", "got --support, expected --support and --query"),
    (diffusionmix, MIX, "--query data/meta_val", "got --query, expected --support and --query"),
    (diffusionmix, MIX, "--out x.csv", "got --out, expected --support and --query"),
    (diffusionmix, MIX, "--support s --query q --out x.png", "a name that ends in .csv"),
    (diffusionmix, MIX, "--support data/meta_val --query flat", "out/best_model.pt: no such checkpoint"),
    (diffusionmix, MIX, "--resume run.pt --support nowhere --query flat", "nowhere: no such folder"),
    (diffusionmix, MIX, "--resume run.pt --support flat --query flat", "no class with a readable image"),
    (diffusionmix, MIX, "--resume run.pt --support one --query flat", "one: got 1 class, expected 2 or more"),
    (diffusionmix, MIX, "--resume run.pt --support lacking --query flat", "is a class without a readable image"),
    (diffusionmix, MIX, "--resume run.pt --support data --query flat", "give data/meta_test itself, if the"),
    (diffusionmix, MIX, "--resume run.pt --support mixed --query flat", "give mixed/more itself, if the"),
    (diffusionmix, MIX, "--resume run.pt --support data/meta_val --query nowhere", "nowhere: no such folder"),
    (diffusionmix, MIX, "--resume run.pt --support data/meta_val --query empty", "has no readable image"),
    (diffusionmix, MIX, "--resume run.pt --support data/meta_val --query all-bad", "has no readable image"),
    (diffusionmix, MIX, "--resume run.pt --support data/meta_val --query flat --pool cut", "is cut short"),
    (diffusionmix, MIX, "--resume run.pt --support data/meta_val --query flat --save-dir busy", "another run is at"),
    # pretraining
    (image_train, TRAIN, "--data_dir nowhere", "nowhere"),
    (image_train, TRAIN, "--data_dir empty", "holds no images"),
    (image_train, TRAIN, "--data_dir all-bad", "12"),
    (image_train, TRAIN, "--frob 1", "unrecognized arguments"),
    (image_train, TRAIN, "--class_cond maybe", "true or false"),
    (image_train, TRAIN, "--class_cond True --data_dir flat", "got no class folders"),
    (image_train, TRAIN, "--steps 0", "steps 0"),
    (image_train, TRAIN, "--lr 0", "lr 0"),
    (image_train, TRAIN, "--lr 1e9", "up to 1"),
    (image_train, TRAIN, "--image_size 15", "15"),
    (image_train, TRAIN, "--num_heads 3", "cannot have 3 heads"),
    (image_train, TRAIN, "--noise_schedule sine", "linear or cosine"),
    (image_train, TRAIN, "--schedule_sampler best", "uniform or loss-second-moment"),
    (image_train, TRAIN, "--precision fp8", "fp8"),
    (image_train, POOL, "--data_dir flat", "got no class folders"),
    (image_train, POOL, "--subsets 2,9", "this pool has models 1 to 1"),
    (image_train, POOL, "--subsets one", "numbers with commas"),
    (image_train, POOL, "--classes_per_model 0", "classes_per_model 0"),
    (image_train, POOL, "--num_heads 3", "cannot have 3 heads"),
    (image_train, POOL, "--precision fp8", "fp8"),
    # data
    (prepare, ("glyphs", "--out", "out"), "--splits train", "invalid choice"),
    (prepare, ("glyphs", "--out", "out"), "--per-class 0", "1 or more"),
    (prepare, (), "", "required"),
]  # fmt: skip


# while at work: what was saved before is whole, and what was not is not there
AT_WORK = [
    (main, MAIN, "--num-classes 5 --pool overflows.pt", "", "drew images that are not finite"),
    (main, MAIN, "", "disk", "the disk is full: 9,"),
    (main, MAIN, "", "memory", "out of memory for a single image"),
    (diffusionmix, MIX, "--resume run.pt", "memory", "out of memory for a single image"),
    (diffusionmix, MIX, "--resume run.pt", "disk", "the disk is full"),
    (image_train, TRAIN, "--lr 1 --ema_rate 0 --steps 3", "", "of no use"),
    (image_train, TRAIN, "", "disk", "the disk is full"),
    (image_train, TRAIN, "", "memory", "out of memory for a single image"),
]  # fmt: skip
MEANING = {"disk": " (on a full disk)", "memory": " (with no memory left)", "": ""}


@pytest.fixture(scope="module")
def table():
    """Rows of the table in the document, by command. Checks, or with WRITE_TABLE=1 writes, that table."""
    rows = {}
    yield rows
    text = DOCUMENT.read_text()
    start = text.index("| command | answer |")
    if os.environ.get("WRITE_TABLE") == "1":
        lines = ["| command | answer |", "| --- | --- |", *(f"| `{key}` | {line} |" for key, line in rows.items())]
        DOCUMENT.write_text(text[:start] + "\n".join(lines) + "\n")


def note(table, module, fixed, flags, meaning, line):
    """Take a row down, or hold it against the document."""
    script = {image_train: "guided_diffusion/image_train.py", prepare: "-m datasets.prepare"}.get(module)
    words = [script or f"{module.__name__}.py", "--pool out" if fixed is POOL else "", flags]
    key = " ".join(filter(None, words)) + meaning
    table[key] = re.sub(r"\b[0-9a-f]{16}\b", "...", line.removeprefix("error: ")).replace("|", "\\|")
    if os.environ.get("WRITE_TABLE") != "1":
        assert plain(f"| `{key}` | {table[key]} |") in plain(DOCUMENT.read_text())


def plain(text):
    """Without what differs between machines and Pythons: causes in brackets, quotes, lengths of files."""
    return re.sub(r"\([^)]*\)|'|\d+,\d+", "", text)


def test_the_document_has_these_rows_and_no_more():
    rows = DOCUMENT.read_text().partition("| command | answer |")[2].count("\n| `")
    assert rows == len(CASES) + len(AT_WORK) >= 60


def last_lines(err):
    """What stays on a terminal: text after the last carriage return of each line."""
    lines = [line.rsplit("\r", 1)[-1] for line in err.split("\n")]
    return [line for line in lines if line.strip()]


def prepare_run(call, flags):
    """Make what the flags name: a checkpoint of a run, or its folder."""
    if "run" in flags.replace("runs-code", ""):
        assert call(main, *MAIN, "--source", "none", "--save-dir", "run")[0] == 0
        if "run.pt" in flags:
            os.rename("run/last.pt", "run.pt")


@pytest.mark.parametrize("module, fixed, flags, words", CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_one_line_status_2_and_nothing_written(module, fixed, flags, words, call, place, table):
    prepare_run(call, flags)
    os.mkdir("busy")
    with locked(Path("busy")):
        before = sorted(place.rglob("*"))
        status, _, err = call(module, *fixed, *flags.split())
    lines = last_lines(err)
    assert len(lines) == 1, lines
    line = lines[0]
    assert status == 2 and line.startswith("error: ") and words in line
    assert sorted(place.rglob("*")) == before  # nothing is left behind, and no pickle made a folder
    assert str(ROOT) not in line and str(place) not in line
    note(table, module, fixed, flags, "", line)


@pytest.mark.parametrize("module, fixed, flags, lack, words", AT_WORK, ids=lambda v: v if isinstance(v, str) else None)
def test_going_wrong_at_work(module, fixed, flags, lack, words, call, place, table, monkeypatch):
    prepare_run(call, flags)
    if lack == "memory":
        monkeypatch.setattr(UNetModel, "forward", no_memory)
    with small_disk() if lack == "disk" else nullcontext():
        status, _, err = call(module, *fixed, *flags.split())
    line = last_lines(err)[-1]
    assert status == 2 and line.startswith("error: ") and words in line and "Traceback" not in err
    assert not list(place.rglob("*.tmp"))
    for path in place.joinpath("out").rglob("*.pt"):
        checkpoint.load(path)
    note(table, module, fixed, flags, MEANING[lack], line)


forward = UNetModel.forward


def no_memory(network, x, *rest):
    if x.device.type == "meta":  # where nothing takes memory
        return forward(network, x, *rest)
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


@contextmanager
def small_disk():
    """No file may grow beyond 2 kB, which ends a write as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)


def test_as_a_command(place):
    command = [sys.executable, ROOT / "diffusionmix.py", *MIX]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: out/best_model.pt: no such checkpoint; make it by main.py with the same --dataset, --nExemplars "
        "and so on, or name one with --resume\n"
    )
