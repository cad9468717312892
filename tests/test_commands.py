"""Every command in the documents, run as it stands there: on made-up files at the places that it names, made small by
flags that follow its own."""

import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

import datasets.prepare as prepare
import diffusionmix
import guided_diffusion.export as export
import guided_diffusion.image_train as image_train
import main
import report.__main__ as report
import report.figures as report_figures
from benchmarks import demo, ladder, measure, meta_test, meta_train, paper, pretrain, scale, synthesis, table
from config import parse
from datasets import pseudo, published
from guided_diffusion.pool import subset_path
from tests.conftest import ROOT, UNET
from tests.test_benchmarks import TINY as TINY_BENCHMARKS
from tests.test_prepare import CIFARFS, MINI, PER_CLASS, batches, caches
from utils import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.pictures]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
STARTS = r"(?:srun )?(?:python3?|torchrun|make) "
SMALL_TEST = "--nTestNovel 10 --episodes 2 --head-steps 2 --device cpu".split()
SMALL_RUN = (
    "--samples-per-class 4 --sample-steps 2 --train_epoch_size 2 --train-batch 2 --train_nTestNovel 10 --max-epoch 3 "
    "--refresh-every 2 --epoch_size 2 --nTestNovel 10 --device cpu"
).split()
SMALL_NETWORK = [word for name, value in UNET.items() for word in (f"--{name}", str(value))]
SMALL = {
    "main": SMALL_RUN,
    "diffusionmix": SMALL_TEST,
    "guided_diffusion.image_train": [*SMALL_NETWORK, *"--steps 1 --lr_anneal_steps 1 --batch_size 2".split()],
    "datasets.prepare": [],
    "report": [],
    "report.figures": [],
    "datasets.pseudo": [],
    "guided_diffusion.export": [],
    "benchmarks.synthesis": ["--repeats", "1"],
    "benchmarks.meta_test": ["--repeats", "1"],
    "benchmarks.meta_train": ["--repeats", "1"],
    "benchmarks.pretrain": ["--repeats", "1"],
    "benchmarks.demo": [],
    "benchmarks.paper": [],
    "benchmarks.ladder": SMALL_RUN,
    "benchmarks.scale": [],
}
MODULES = {
    "main": main, "diffusionmix": diffusionmix, "guided_diffusion.image_train": image_train,
    "guided_diffusion.export": export, "datasets.prepare": prepare, "datasets.pseudo": pseudo,
    "report": report, "report.figures": report_figures, "benchmarks.synthesis": synthesis, "benchmarks.demo": demo,
    "benchmarks.meta_test": meta_test, "benchmarks.meta_train": meta_train, "benchmarks.pretrain": pretrain,
    "benchmarks.table": table, "benchmarks.ladder": ladder, "benchmarks.paper": paper, "benchmarks.scale": scale,
}  # fmt: skip


def commands(text):
    """The words of each command in a document: lines of code that begin with one, and code within lines."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    known = {name: value for line in lines for name, value in re.findall(r'^\s*([A-Z_]+)="(.*)"$', line)}
    within = re.findall(rf"(?<!`)`({STARTS}[^`]*)`", re.sub(r"\n", " ", text))
    for line in [line.strip() for line in lines if re.match(rf"\s*{STARTS}", line)] + within:
        for name, value in known.items():
            line = line.replace(f"${name}", value)
        line = re.sub(r"\$\(.*?\)", "HOST", line.partition(" #")[0].replace("...", ""))
        line = re.sub(r"\|[\w|]+", "", re.sub(r"[\[\]]", "", line))  # of alternatives the first
        yield shlex.split(re.sub(r"\bN\b", "2", line))


ALL = {" ".join(words): words for path in DOCUMENTS for words in commands(path.read_text(encoding="utf-8"))}


def module_of(words):
    """The module that a python command runs, and its flags."""
    at = 2 if words[1] == "-m" else 1
    return words[at].removesuffix(".py").replace("/", "."), words[at + 1 :]


@pytest.fixture
def place(tmp_path, picture_folder, few_glyphs, monkeypatch):
    """A folder in which the documents' paths are there, with next to nothing in them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published, "PER_CLASS", PER_CLASS)
    monkeypatch.setattr(published, "CIFARFS", CIFARFS)
    monkeypatch.setattr(published, "MINIIMAGENET", MINI)
    for split, classes in (("meta_train", 25), ("meta_val", 5), ("meta_test", 5)):
        levels = {f"c{i}": [(9 * i + 3 * j) % 256 for j in range(8)] for i in range(classes)}
        picture_folder(tmp_path / "data" / "mine" / split, levels)
    (tmp_path / "DATA").symlink_to("data/mine")
    picture_folder(tmp_path / "path" / "to" / "data", {"a": [1, 2, 3]})
    picture_folder(tmp_path / "data" / "few", {"a": [1, 2], "b": [200]})
    picture_folder(tmp_path / "data" / "unlabelled", {".": [7, 90]})
    (tmp_path / "path" / "to" / "fonts").symlink_to(Path(matplotlib.get_data_path(), "fonts", "ttf"))
    batches(tmp_path / "path" / "to" / "cifar100")
    caches(tmp_path / "path" / "to" / "miniimagenet")
    (tmp_path / "ckpt" / "pools").mkdir(parents=True)
    return tmp_path


def run_tiny(module, place, toy_pool, monkeypatch):
    """Have a measurement measure next to nothing."""
    monkeypatch.setattr(measure, "GLYPHS", toy_pool)
    monkeypatch.setattr(measure, "PAPER", UNET)
    if module in TINY_BENCHMARKS:
        monkeypatch.setattr(measure, "MATRIX", {"cpu": 32})
        for size in ("paper", "small"):
            monkeypatch.setitem(module.SIZES, size, module.SIZES[size] | TINY_BENCHMARKS[module][1])
    monkeypatch.setattr(table, "RESULTS", place)
    monkeypatch.setattr(demo, "TRAIN", SMALL_RUN)
    monkeypatch.setattr(demo, "TEST", SMALL_TEST)
    for each in (table, demo):
        monkeypatch.setattr(each, "ROOT", place)

    def call(script, *flags):
        monkeypatch.setattr("sys.argv", [script, *flags])
        MODULES[script.removesuffix(".py")].main()

    monkeypatch.setattr(table, "call", call)


@pytest.mark.parametrize("words", [words for words in ALL.values() if words[0].startswith("python")], ids=" ".join)
def test_runs(words, place, call, make_pool, toy_pool, trained, picture_folder, monkeypatch):
    name, flags = module_of(words)
    measures = name.startswith("benchmarks.")
    tiny = make_pool(place / "whole", [20, 20]) if name == "benchmarks.ladder" else toy_pool  # of all 40 glyphs
    for pool in ("glyphs", "fontchars"):
        (place / "ckpt" / pool).symlink_to(tiny if measures else ROOT / "ckpt" / pool)
    if name != "guided_diffusion.image_train":
        for pool in ("mine", "emojifs"):
            (place / "ckpt" / "pools" / pool).symlink_to(toy_pool)
    if name not in ("main", "benchmarks.demo", "benchmarks.table"):
        for run in ("glyphs/1-shot", "custom/1-shot", "a", "b"):
            shutil.copytree(trained, place / "ckpt" / "runs" / run)
    if name == "datasets.pseudo":
        folder = place / "ckpt" / "runs" / "glyphs" / "1-shot" / "pseudo" / "round00"
        pseudo.PseudoDataset(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.arange(2), 2).save(folder, {})
    if measures:
        run_tiny(MODULES[name], place, toy_pool, monkeypatch)
    if "subsets" in flags:
        picture_folder(place / "data" / "cifarfs" / "meta_train", {name: [1] for name in CIFARFS["meta_train"]})
    if name == "benchmarks.table":
        flags = ["--seeds", "1", *[word for word in flags if word != "--test"], *SMALL_RUN, "--test", *SMALL_TEST]
    elif "path/to/64x64_diffusion.pt" in flags:
        wide = make_pool(place / "wide", [4], num_channels=64, num_head_channels=64)
        checkpoint.save("path/to/64x64_diffusion.pt", checkpoint.load(subset_path(wide, 1))["model"])
        flags = [*flags, *SMALL[name], "--image-size", "16"]
    elif name == "guided_diffusion.export":
        pytest.importorskip("diffusers")
        shutil.copyfile(subset_path(make_pool(place / "wide", [4], num_channels=32), 1), "path/to/model.pt")
    elif "path/to/ddpm-cifar10-32" in flags:
        from tests.test_from_diffusers import pipeline  # skips without diffusers

        pipeline("path/to/ddpm-cifar10-32")
        flags = [*flags, *SMALL[name]]
    elif flags[:1] == ["glyphs"]:
        flags = [*flags, "--per-class", "1"]
    else:
        flags = [*flags, *SMALL[name]]
    places = {"RUN": "ckpt/runs/glyphs/1-shot", "POOL": "ckpt/pools/mine"}
    flags = [places.get(word, word) for word in flags]
    status, out, err = call(MODULES[name], *flags)
    assert status == 0, err
    assert (place / "RESULTS.md").exists() == ("--publish" in flags)


@pytest.mark.parametrize("words", [words for words in ALL.values() if words[0] == "make"], ids=" ".join)
def test_there_is_that_target(words):
    done = subprocess.run([*words, "-n", "DATA_ROOT=data/mine"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [words for words in ALL.values() if "torchrun" in words], ids=" ".join)
def test_torchrun_and_script_know_the_flags(words):
    # tests/test_survival.py runs the three scripts under torchrun
    given = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert (ROOT / given.training_script).exists()
    if given.training_script.endswith("image_train.py"):
        image_train.create_argparser().parse_args(given.training_script_args)
    else:
        parse(given.training_script_args, description="")


def test_the_two_commands_come_first():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [words[:2] for words in commands(text)][:2] == [["python", "main.py"], ["python", "diffusionmix.py"]]
    assert len([words for words in ALL.values() if words[0].startswith("python")]) > 20


def test_python_in_the_readme(place, trained, toy_pool):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    shutil.copytree(trained, place / "ckpt" / "runs" / "custom" / "1-shot")
    (place / "ckpt" / "pools" / "mine").symlink_to(toy_pool)
    (place / "snippet.py").write_text(code + "answer = classifier.predict(other_images)\n", encoding="utf-8")
    images = [Image.new("RGB", (16, 16), (level,) * 3) for level in (0, 250)]
    names = dict(images=images, labels=["dark", "bright"], other_images=images)
    found = runpy.run_path("snippet.py", init_globals=names)
    assert set(found["answer"]) <= {"dark", "bright"} and torch.isfinite(found["classifier"].heads_.weight).all()
