"""What a user gets for a mistake: one line, exit status 2, and no half-made folder.

Held: the status, that the one line names what is at fault and the flag or file that cures it, and that nothing is
written. Not held: how the line says it. WRITE_TABLE=1 writes the table of docs/robustness.md anew from what is said.
"""

import os
import re
import resource
import shutil
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
TABLE = "| command | answer |"


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_pool, picture_folder):
    """A folder with data, pools and a run, good and bad. For copying only."""
    folder = tmp_path_factory.mktemp("errors") / "world"
    levels = {f"c{i}": [50 * i] * 12 for i in range(5)}
    picture_folder(folder / "data" / "meta_val", levels)
    picture_folder(folder / "data" / "meta_test", levels)
    picture_folder(folder / "data" / "meta_train", levels)
    picture_folder(folder / "few_classes" / "meta_val", dict(list(levels.items())[:4]))
    picture_folder(folder / "few_images" / "meta_val", {name: [1, 2] for name in levels})
    picture_folder(folder / "few_images" / "meta_train", {name: [1, 2] for name in levels})
    picture_folder(folder / "flat", {".": [1, 2]})
    picture_folder(folder / "one", {"c0": [1, 2]})
    picture_folder(folder / "lacking", {"c0": [1, 2], "c1": []})
    picture_folder(folder / "mixed", {"c0": [1, 2], "more/c1": [1, 2]})
    (folder / "empty" / "meta_val").mkdir(parents=True)
    (folder / "busy").mkdir()
    (folder / "a_file").write_text("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_pool(Path("pool"), [3, 3])
        make_pool(Path("conditional"), [3, 3], class_cond=True)
        make_pool(Path("gap"), [3, 3, 3])
        subset_path("gap", 2).unlink()
        make_pool(Path("cut"), [3, 3])
        subset_path("cut", 2).write_bytes(subset_path("cut", 2).read_bytes()[:2000])
        make_pool(Path("tiny"), [6], image_size=8)
        checkpoint.save("list.pt", [1, 2])
        checkpoint.save("bare.pt", checkpoint.load(subset_path("pool", 1))["model"])
        checkpoint.save("dict.pt", {"model": {"w": torch.zeros(1)}})
        hostile_files()
        patch.setattr("sys.argv", ["main.py", *MAIN, "--source", "none", "--save-dir", "run"])
        main.main()
        shutil.copyfile("run/last.pt", "run.pt")
    return folder


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A copy of the world to run commands in."""
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


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
    (main, MAIN, "--dataset imagenet", "--dataset imagenet glyphs co_miniimagenet custom"),
    (main, MAIN, "--frob 1", "--frob --help"),
    (main, MAIN, "--max-epochs 3", "--max-epochs --max-epoch --help"),
    (main, MAIN, "--support data/meta_val --query flat", "--support --query diffusionmix.py"),
    (main, MAIN, "--lr x", "--lr x --help"),
    (main, MAIN, "--lr nan", "--lr nan"),
    (main, MAIN, "--lr 1e30", "--lr 1e+30 10"),
    (main, MAIN, "--nTestNovel 11", "--nTestNovel 11 5 10"),
    (main, MAIN, "--max-epoch 0", "--max-epoch 0 1"),
    (main, MAIN, "--start-epoch 2", "--start-epoch --max-epoch 2"),
    (main, MAIN, "--width 32", "32 square"),
    (main, MAIN, "--height 8 --width 8", "8 16 --height --width"),
    (main, MAIN, "--drop-rate 0.1", "0.1 conv4 resnet12"),
    (main, MAIN, "--device cuda:77", "cuda:77 auto cpu cuda"),
    (main, MAIN, "--device toaster", "toaster auto cpu cuda"),
    (main, MAIN, "--sample-steps 60", "pool/subset1/ckpt/model.pt 60"),
    # what training needs
    (main, MAIN, "--pool nowhere", "nowhere subset1/ckpt/model.pt image_train.py --pool"),
    (main, MAIN, "--pool data", "data subset1/ckpt/model.pt image_train.py --pool"),
    (main, MAIN, "--pool gap", "gap 2 image_train.py --pool"),
    (main, MAIN, "--pool cut", "cut/subset2/ckpt/model.pt again"),
    (main, MAIN, "--pool a_file --num-classes 5", "a_file again"),
    (main, MAIN, "--pool list.pt", "list.pt list"),
    (main, MAIN, "--pool dict.pt --num-classes 5", "dict.pt"),
    (main, MAIN, "--pool bare.pt --image-size 16", "bare.pt --num-classes"),
    (main, MAIN, "--pool tiny", "8 16 --height --width"),
    (main, MAIN, "--dataset un_miniimagenet", "pool 2 52 13 --pool --num-classes"),
    (main, MAIN, "--dataset co_cifarfs", "pool 2 64 13 --pool --num-classes"),
    (main, MAIN, "--pool conditional --num-classes 8", "conditional/subset1/ckpt/model.pt 3 4 --num-classes"),
    (main, MAIN, "--pool conditional --recipe clusters --refresh-every 2 --max-epoch 3",
     "conditional/subset1/ckpt/model.pt --recipe"),
    (main, MAIN, "--recipe clusters --refresh-every 2 --max-epoch 1", "--max-epoch 1 2"),
    (main, MAIN, "--source none --pool nowhere", "nowhere subset1/ckpt/model.pt"),
    (main, MAIN, "--start-epoch 1", "--start-epoch 1 --resume"),
    (main, MAIN, "--dataset glyphs --data-root nowhere", "nowhere --data-root"),
    (main, MAIN, "--data-root data,data", "--data-root"),
    (main, MAIN, "--data-root data,", "--data-root"),
    (main, MAIN, "--num-classes 4", "4 5 --num-classes --way"),
    (main, MAIN, "--source unguided", "2 5 --source unguided guided --way"),
    (main, MAIN, "--recipe clusters --refresh-every 2 --max-epoch 2", "--max-epoch --refresh-every 2"),
    (main, MAIN, "--recipe clusters --refresh-every 1", "--refresh-every 1 2"),
    (main, MAIN, "--samples-per-class 2", "--samples-per-class 2 3"),
    (main, MAIN, "--data-root nowhere", "nowhere/meta_val"),
    (main, MAIN, "--data-root empty", "empty/meta_val"),
    (main, MAIN, "--data-root few_classes", "few_classes/meta_val 4 5 --way"),
    (main, MAIN, "--data-root few_images", "few_images/meta_val c0 2 3 --queries"),
    (main, MAIN, "--data-root few_images --samples-per-class 2", "meta_val c0 --queries --samples-per-class"),
    (main, MAIN, "--source real --nTestNovel 5 --data-root few_images", "few_images/meta_train c0 --train-queries"),
    (main, MAIN, "--source real --samples-per-class 2", "--samples-per-class 2 3"),
    (main, MAIN, "--source real --data-root few_classes", "few_classes/meta_train"),
    (main, MAIN, "--resume nowhere.pt", "nowhere.pt"),
    (main, MAIN, "--resume dict.pt", "dict.pt main.py best_model.pt"),
    (main, MAIN, "--resume list.pt", "list.pt main.py best_model.pt"),
    (main, MAIN, "--save-dir a_file", "--save-dir a_file"),
    (main, MAIN, "--resume https://nowhere.invalid/a.pt", "https://nowhere.invalid/a.pt"),
    (main, MAIN, "--pool gs://../pool", "gs://../pool .."),
    (main, MAIN, "--data-root some-bad", "some-bad/meta_val c0/0.png"),
    # checkpoints of strangers
    (main, MAIN, "--num-classes 5 --pool runs-code.pt", "runs-code.pt posix.mkdir"),
    (main, MAIN, "--num-classes 5 --pool runs-code-older.pt", "runs-code-older.pt posix.mkdir"),
    (main, MAIN, "--num-classes 5 --pool module.pt", "module.pt torch.nn.modules.linear.Linear"),
    (main, MAIN, "--num-classes 5 --pool program.pt", "program.pt TorchScript"),
    (main, MAIN, "--num-classes 5 --pool nan.pt", "nan.pt time_embed.0.bias"),
    (main, MAIN, "--num-classes 5 --pool wrong-shape.pt", "wrong-shape.pt time_embed.0.bias (3,) (32,)"),
    (main, MAIN, "--num-classes 5 --pool extra-weight.pt", "extra-weight.pt more"),
    (main, MAIN, "--num-classes 5 --pool complex.pt", "complex.pt time_embed.0.bias"),
    (main, MAIN, "--num-classes 5 --pool huge-flags.pt", "huge-flags.pt num_channels"),
    (main, MAIN, "--num-classes 5 --pool worded-flags.pt", "worded-flags.pt num_heads four"),
    (main, MAIN, "--num-classes 5 --pool number.pt", "number.pt int"),
    (main, MAIN, "--num-classes 5 --pool flipped.pt", "flipped.pt checksum"),
    (main, MAIN, "--num-classes 5 --pool bomb.pt", "bomb.pt zip"),
    (main, MAIN, "--num-classes 5 --pool short.safetensors", "short.safetensors"),
    (main, MAIN, "--num-classes 5 --pool page.pt", "page.pt"),
    (main, MAIN, "--num-classes 5 --pool empty.pt", "empty.pt"),
    (main, MAIN, "--resume runs-code.pt", "runs-code.pt posix.mkdir"),
    (diffusionmix, MIX, "--resume runs-code.pt", "runs-code.pt posix.mkdir"),
    (diffusionmix, MIX, "--resume run.pt --pool nan.pt", "nan.pt time_embed.0.bias"),
    # folders of other runs
    (main, MAIN, "--save-dir run --source none --seed 2", "run/last.pt seed 1 2 --save-dir"),
    (main, MAIN, "--save-dir run --source none --lr 0.2 --flip no", "run/last.pt lr 0.1 0.2 flip --save-dir"),
    (main, MAIN, "--save-dir run", "run/last.pt source none guided --save-dir"),
    (main, MAIN, "--save-dir busy", "busy --save-dir"),
    (diffusionmix, MIX, "--save-dir busy --resume run.pt", "busy --save-dir"),
    (image_train, TRAIN, "--save_dir busy", "busy --save-dir"),
    # meta-testing
    (diffusionmix, MIX, "", "out/best_model.pt main.py --resume"),
    (diffusionmix, MIX, "--resume dict.pt", "dict.pt main.py best_model.pt"),
    (diffusionmix, MIX, "--resume a_file", "a_file again"),
    (diffusionmix, MIX, "--mix-steps 300", "--mix-steps 300 --mix-level 200"),
    (diffusionmix, MIX, "--episodes 1", "--episodes 1 2"),
    (diffusionmix, MIX, "--split meta_train", "--split meta_train meta_val meta_test"),
    (diffusionmix, MIX, "--resume run.pt --data-root few_images", "few_images/meta_test"),
    (diffusionmix, MIX, "--resume run.pt --data-root few_images --split meta_val", "meta_val c0 2 3 --queries"),
    (diffusionmix, MIX, "--resume run.pt --save-dir a_file/run", "--save-dir a_file"),
    (diffusionmix, MIX, "--resume run.pt --pool nowhere", "nowhere subset1/ckpt/model.pt image_train.py"),
    (diffusionmix, MIX, "--resume run.pt --pool cut", "cut/subset2/ckpt/model.pt again"),
    # own pictures
    (diffusionmix, MIX, "--support data/meta_val", "--support --query"),
    (diffusionmix, MIX, "--query data/meta_val", "--support --query"),
    (diffusionmix, MIX, "--out x.csv", "--out --support --query"),
    (diffusionmix, MIX, "--support s --query q --out x.png", "--out x.png .csv"),
    (diffusionmix, MIX, "--support data/meta_val --query flat", "out/best_model.pt main.py --resume"),
    (diffusionmix, MIX, "--resume run.pt --support nowhere --query flat", "nowhere"),
    (diffusionmix, MIX, "--resume run.pt --support flat --query flat", "flat"),
    (diffusionmix, MIX, "--resume run.pt --support one --query flat", "one 1 2"),
    (diffusionmix, MIX, "--resume run.pt --support lacking --query flat", "lacking/c1"),
    (diffusionmix, MIX, "--resume run.pt --support data --query flat", "data/meta_test"),
    (diffusionmix, MIX, "--resume run.pt --support mixed --query flat", "mixed/more"),
    (diffusionmix, MIX, "--resume run.pt --support data/meta_val --query nowhere", "nowhere"),
    (diffusionmix, MIX, "--resume run.pt --support data/meta_val --query empty", "empty"),
    (diffusionmix, MIX, "--resume run.pt --support data/meta_val --query all-bad", "all-bad c0/0.png"),
    (diffusionmix, MIX, "--resume run.pt --support data/meta_val --query flat --pool cut", "cut/subset2/ckpt/model.pt"),
    (diffusionmix, MIX, "--resume run.pt --support data/meta_val --query flat --save-dir busy", "busy --save-dir"),
    # pretraining
    (image_train, TRAIN, "--data_dir nowhere", "nowhere --data_dir"),
    (image_train, TRAIN, "--data_dir empty", "empty"),
    (image_train, TRAIN, "--save_dir data/meta_train/out", "data/meta_train/out --data_dir --save_dir"),
    (image_train, TRAIN, "--data_dir all-bad", "all-bad c0/0.png"),
    (image_train, TRAIN, "--frob 1", "--frob --help"),
    (image_train, TRAIN, "--class_cond maybe", "--class_cond maybe True False --help"),
    (image_train, TRAIN, "--class_cond True --data_dir flat", "flat"),
    (image_train, TRAIN, "--steps 0", "steps 0 1"),
    (image_train, TRAIN, "--lr 0", "lr 0"),
    (image_train, TRAIN, "--lr 1e9", "lr 1"),
    (image_train, TRAIN, "--image_size 15", "channel_mult 15 2"),
    (image_train, TRAIN, "--num_heads 3", "num_heads num_head_channels 3 8"),
    (image_train, TRAIN, "--noise_schedule sine", "noise_schedule sine linear cosine"),
    (image_train, TRAIN, "--schedule_sampler best", "schedule_sampler best uniform loss-second-moment"),
    (image_train, TRAIN, "--precision fp8", "precision fp8 auto float32 bf16"),
    (image_train, POOL, "--data_dir flat", "flat"),
    (image_train, POOL, "--pool data/meta_train/pool", "data/meta_train/pool --data_dir --pool"),
    (image_train, POOL, "--subsets 2,9", "--subsets 2,9 1"),
    (image_train, POOL, "--subsets one", "--subsets one"),
    (image_train, POOL, "--classes_per_model 0", "classes_per_model 0 1"),
    (image_train, POOL, "--num_heads 3", "num_heads num_head_channels 3 8"),
    (image_train, POOL, "--precision fp8", "precision fp8 auto float32 bf16"),
    # data
    (prepare, ("glyphs", "--out", "out"), "--splits train", "--splits train meta_train meta_val meta_test --help"),
    (prepare, ("glyphs", "--out", "out"), "--per-class 0", "0 1"),
    (prepare, (), "", "what --help"),
]  # fmt: skip


# while at work: what was saved before is whole, and what was not is not there
AT_WORK = [
    (main, MAIN, "--num-classes 5 --pool overflows.pt", "", "overflows.pt --precision"),
    (main, MAIN, "", "disk", "out/ disk"),
    (main, MAIN, "", "memory", "memory"),
    (diffusionmix, MIX, "--resume run.pt", "memory", "memory"),
    (diffusionmix, MIX, "--resume run.pt", "disk", "out/ disk"),
    (image_train, TRAIN, "--lr 1 --ema_rate 0 --steps 3", "", "out loss --lr"),
    (image_train, TRAIN, "", "disk", "out/ disk"),
    (image_train, TRAIN, "", "memory", "memory"),
]  # fmt: skip
MEANING = {"disk": " (on a full disk)", "memory": " (with no memory left)", "": ""}


@pytest.fixture(scope="module")
def table():
    """Rows of the table in the document, by command; with WRITE_TABLE=1 they replace those that are there."""
    rows = {}
    yield rows
    if os.environ.get("WRITE_TABLE") == "1":
        lines = [TABLE, "| --- | --- |", *(f"| `{key}` | {line} |" for key, line in rows.items())]
        DOCUMENT.write_text(DOCUMENT.read_text().partition(TABLE)[0] + "\n".join(lines) + "\n")


def row(module, fixed, flags, lack=""):
    """The command of a case, as the table has it."""
    script = {image_train: "guided_diffusion/image_train.py", prepare: "-m datasets.prepare"}.get(module)
    words = [script or f"{module.__name__}.py", "--pool out" if fixed is POOL else "", flags]
    return " ".join(filter(None, words)) + MEANING[lack]


def note(table, key, line):
    """Take a row of the table down."""
    table[key] = re.sub(r"\b[0-9a-f]{16}\b", "...", line.removeprefix("error: ")).replace("|", "\\|")


def missing(names, line):
    """Which of the names, with spaces between, the line does not have."""
    return [name for name in names.split() if name not in line]


def test_the_document_has_the_commands_of_these_cases():
    commands = {row(*case[:3]) for case in CASES} | {row(*case[:4]) for case in AT_WORK}
    assert len(commands) == len(CASES) + len(AT_WORK) >= 60
    in_table = DOCUMENT.read_text().partition(TABLE)[2]
    assert set(re.findall(r"^\| `(.*?)` \|", in_table, re.MULTILINE)) == commands


def last_lines(err):
    """What stays on a terminal: text after the last carriage return of each line."""
    lines = [line.rsplit("\r", 1)[-1] for line in err.split("\n")]
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize("module, fixed, flags, names", CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_one_line_status_2_and_nothing_written(module, fixed, flags, names, call, place, table):
    with locked(Path("busy")):
        before = sorted(place.rglob("*"))
        status, _, err = call(module, *fixed, *flags.split())
    lines = last_lines(err)
    assert len(lines) == 1, lines
    line = lines[0]
    assert status == 2 and line.startswith("error: ") and not missing(names, line), line
    assert sorted(place.rglob("*")) == before  # nothing is left behind, and no pickle made a folder
    assert str(ROOT) not in line and str(place) not in line
    note(table, row(module, fixed, flags), line)


@pytest.mark.parametrize("module, fixed, flags, lack, names", AT_WORK, ids=lambda v: v if isinstance(v, str) else None)
def test_going_wrong_at_work(module, fixed, flags, lack, names, call, place, table, monkeypatch):
    if lack == "memory":
        monkeypatch.setattr(UNetModel, "forward", no_memory)
    with small_disk() if lack == "disk" else nullcontext():
        status, _, err = call(module, *fixed, *flags.split())
    line = last_lines(err)[-1]
    assert status == 2 and line.startswith("error: ") and not missing(names, line), line
    assert "Traceback" not in err
    assert not list(place.rglob("*.tmp"))
    for path in place.joinpath("out").rglob("*.pt"):
        checkpoint.load(path)
    note(table, row(module, fixed, flags, lack), line)


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
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not missing("out/best_model.pt main.py --resume", done.stderr)
