"""A row of the paper's table: what is run, printed, kept and refused."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from benchmarks import paper
from config import parse
from datasets import published
from guided_diffusion import memorisation, train_flags, train_util
from guided_diffusion.pool import Pool
from tests import test_prepare
from tests.conftest import UNET
from tests.test_commands import MODULES, module_of

PER_CLASS = 8  # 5 shots, 2 queries and one more
CIFARFS = {"meta_train": tuple("abcdef"), "meta_val": tuple("gh"), "meta_test": tuple("ij")}
MINI = {split: tuple(f"n{name}" for name in names) for split, names in CIFARFS.items()}
TRAIN = (
    "--way 2 --samples-per-class 4 --sample-steps 2 --train_epoch_size 2 --train-batch 2 --train_nTestNovel 4 "
    "--max-epoch 3 --refresh-every 2 --epoch_size 2 --nTestNovel 4 --device cpu --precision float32 --num-classes"
).split()
REST = [
    *("--pretrain", *[word for name, value in UNET.items() for word in (f"--{name}", str(value))]),
    *"--steps 2 --batch_size 2 --device cpu --test --episodes 3 --head-steps 2".split(),
]
GIVEN = "--scenario un_cifarfs --data from --seeds 1 3".split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A top folder, and data sets of few classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "ROOT", tmp_path)
    for module in (published, test_prepare):
        monkeypatch.setattr(module, "PER_CLASS", PER_CLASS)
    monkeypatch.setattr(published, "CIFARFS", CIFARFS)
    monkeypatch.setattr(published, "MINIIMAGENET", MINI)
    return tmp_path


@pytest.fixture
def made(place, monkeypatch):
    """Commands that were called, in order. A stand-in makes what each would, and exits with 7 at the one in `FAIL`."""
    called = []

    def stand_in(words):
        called.append(words)
        if words[1] == os.environ.get("FAIL"):
            sys.exit(7)
        given = dict(zip(words[2::2], words[3::2], strict=True))
        if words[1] == "diffusionmix.py":
            results(Path(given["--save-dir"]), int(given["--nExemplars"]), int(given["--seed"]))
        elif words[1] == "main.py":
            Path(given["--save-dir"]).mkdir(parents=True, exist_ok=True)
            Path(given["--save-dir"], "best_model.pt").touch()
        elif words[1] != "-m":
            Path(given["--pool"]).mkdir(parents=True, exist_ok=True)
            Path(given["--pool"], "pool.json").touch()
        else:
            Path(words[-3] if "--from" in words else words[-1]).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(paper, "call", stand_in)
    return called


def results(folder, shot, seed):
    """Write what a test would: 40 and 42 % at 1 shot with mixes, 20 points more at 5, `seed` points more."""
    mixed = [40 + seed + 5 * (shot - 1), 42 + seed + 5 * (shot - 1)]
    found = {"by_episode": mixed, "by_episode_without_mix": [30, 30], "dataset": "d", "way": 5, "shot": shot}
    found |= {"split": "meta_test", "accuracy": 41, "accuracy_without_mix": 30, "episodes": 2, "seed": seed}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found))
    (folder.parent / "config.json").write_text("{}")


@pytest.mark.slow
def test_from_data_to_table(place, call, monkeypatch, few_rounds, enough_memory):
    test_prepare.batches(place / "cifar", names=sorted(test_prepare.every(CIFARFS)), test_from=PER_CLASS - 1)
    test_prepare.caches(place / "mini", MINI)
    monkeypatch.setattr(memorisation, "SAMPLES", 2)
    monkeypatch.setattr(train_util, "SHEET", 2)
    called = []

    def in_process(words):
        called.append(words)
        if words[0] == "sh":
            return subprocess.run(words, check=True)
        name, flags = module_of(words)
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", [name, *flags])
            return MODULES[name].main()

    monkeypatch.setattr(paper, "call", in_process)
    for scenario, data, classes, steps in (
        ("un_cifarfs", "cifar", 8, 5),
        ("cifar_mini", "cifar,mini", 16, 8),  # the data of before are there; two folders of links
        ("co_miniimagenet", "mini", 6, 4),
    ):
        given = ("--scenario", scenario, "--data", data, *TRAIN, classes, *REST)
        called.clear()
        status, out, err = call(paper, *given)
        assert status == 0, err
        assert len(called) == steps
        folder = place / "ckpt" / "runs" / "paper" / scenario
        found = [json.loads((folder / "seed1" / f"{shot}-shot" / "results.json").read_text()) for shot in (1, 5)]
        assert [one["shot"] for one in found] == [1, 5]
        cells = [f"{one['accuracy']:.2f} ± {one['ci95']:.2f} ± ?" for one in found]
        assert f"| ours, with mixes | {cells[0]} | {cells[1]} |" in out
        assert cells[1] in (folder / "paper.html").read_text()
        called.clear()
        assert call(paper, *given)[0] == 0 and not called
    pools = place / "ckpt" / "pools"
    files = [file.resolve().relative_to(pools).parts[:2] for file in Pool(pools / "cifar_mini").files]
    assert files == [(f"un_{name}", f"subset{m}") for name in ("cifarfs", "miniimagenet") for m in (1, 2)]
    for name, conditional in (("cifar_mini", False), ("co_miniimagenet", True)):
        assert {Pool(pools / name).load(m).class_cond for m in range(2)} == {conditional}


def test_no_row_of_mixes_without_mixes(made, call):
    assert call(paper, *GIVEN)[0] == 0
    for file in Path("ckpt/runs/paper").rglob("results.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pool_models": 0}))
    status, out, _ = call(paper, *GIVEN, "--table")
    assert status == 0 and "with mixes" not in out and "without mixes" in out


@pytest.mark.parametrize(
    "entry", [{"split": "meta_val"}, {"images": "other"}] + [{n: 3} for n in paper.TESTED_ALIKE[5:]]
)
def test_tests_that_differ_make_no_row(made, call, entry):
    assert call(paper, *GIVEN)[0] == 0
    file = sorted(Path("ckpt/runs/paper").rglob("results.json"))[0]
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    status, out, err = call(paper, *GIVEN, "--table")
    assert status == 2 and not out and [*entry][0] in err and str([*entry.values()][0]) in err
    shutil.rmtree(file.parent)  # as the error says
    assert call(paper, *GIVEN)[0] == 0 and file.exists()


@pytest.mark.parametrize("flags", [("--dry-run",), ("--test", "--support", "x", "--query", "y")])
def test_flags_of_other_work_are_refused(made, call, flags):
    assert call(paper, *GIVEN, *flags)[0] == 2 and not made


def test_every_step_in_order_and_none_again(made, call):
    status, out, err = call(paper, *GIVEN, "--lr", "0.3", "--pretrain", "--steps", "9", "--test", "--episodes", "4")
    assert status == 0, err
    names = ["-m", "guided_diffusion/image_train.py", *["main.py"] * 2, *["diffusionmix.py"] * 4]
    assert [words[1] for words in made] == names
    assert ["--lr" in words for words in made] == [False] * 2 + [True] * 6
    assert ["--steps" in words for words in made] == [False, True] + [False] * 6
    assert ["--episodes" in words for words in made] == [False] * 4 + [True] * 4
    # at 1 shot of seeds 1 and 3 over episodes t(3) = 3.182446 times sqrt(8 / 3) / 2; over seeds t(1) = 12.7062 times 1
    assert "| ours, with mixes | 43.00 ± 2.60 ± 12.71 | 63.00 ± 2.60 ± 12.71 |" in out
    assert "published.json" in out
    made.clear()
    given = (*GIVEN, "--lr", "0.3", "--pretrain", "--steps", "9", "--test", "--episodes", "4")
    assert call(paper, *given)[1].count("is there") == 8 and not made
    assert call(paper, *given, "--head-steps", "3")[0] == 0
    assert [words[1] for words in made] == ["diffusionmix.py"] * 4
    made.clear()
    assert call(paper, *given)[0] == 0  # the files are those of other flags by now
    assert [words[1] for words in made] == ["diffusionmix.py"] * 4
    made.clear()
    longer = (*GIVEN, "--lr", "0.3", "--pretrain", "--steps", "10", "--test", "--episodes", "4")
    status, _, err = call(paper, *longer)  # another pool: main.py would refuse the runs, after hours of pretraining
    assert status == 2 and err.count("\n") == 1 and "--steps 9" in err and "--folder" in err and not made
    status, _, err = call(paper, "--folder", "other", *longer)
    assert status == 0 and [words[1] for words in made] == names, err
    made.clear()
    assert "43.00" in call(paper, *GIVEN, "--table")[1] and not made


def test_a_step_that_fails_stops_the_run_and_is_taken_up_again(made, call, monkeypatch):
    monkeypatch.setenv("FAIL", "main.py")
    assert call(paper, *GIVEN)[0] == 7
    assert [words[1] for words in made] == ["-m", "guided_diffusion/image_train.py", "main.py"]
    monkeypatch.delenv("FAIL")
    made.clear()
    assert call(paper, *GIVEN)[0] == 0
    assert made[0][1] == "main.py" and len(made) == 6
    monkeypatch.setenv("FAIL", "main.py")
    assert call(paper, *GIVEN, "--lr", "0.3")[0] == 7
    monkeypatch.delenv("FAIL")
    made.clear()
    assert call(paper, *GIVEN)[0] == 0 and made[0][1] == "main.py"  # the other command may have changed the run


@pytest.mark.parametrize("program", ["python", "torchrun", "sh"])
def test_exits_as_the_command_does(program, monkeypatch):
    monkeypatch.setitem(paper.PROGRAMS, program, ["sh"])
    with pytest.raises(SystemExit, match="^5$"):
        paper.call([program, "-c", "exit 5"])
    paper.call([program, "-c", "exit 0"])


def test_data_that_is_there_needs_no_source(place, made, call):
    for split, names in MINI.items():
        for name in names:
            for index in range(PER_CLASS):
                test_prepare.save(place / "data" / "miniimagenet" / split / name / f"{index:05d}.png",
                                  test_prepare.pixels(name, index, side=4))  # fmt: skip
    assert call(paper, "--scenario", "co_miniimagenet")[0] == 0
    assert made[0][1] == "guided_diffusion/image_train.py" and made[0][-2:] == ["--class_cond", "True"]
    assert call(paper, "--scenario", "co_miniimagenet", "--print", "sbatch")[1].splitlines()[0].endswith("--wrap true)")


def test_published_figures_stand_beside_ours(place, made, call, monkeypatch):
    source = {"paper": "A. Author, 2020", "table": "table 3", "url": "https://example.org/a"}
    each = [("theirs", 1, 44.1, 0.5), ("theirs", 5, 61.25, None), ("others", 5, 50, 1)]
    entries = [dict(method=m, shot=n, accuracy=a, interval=i, **source) for m, n, a, i in each]
    monkeypatch.setattr(paper, "FIGURES", place / "figures.json")
    paper.FIGURES.write_text(json.dumps({"un_cifarfs": entries, "co_cifarfs": []}))
    out = call(paper, *GIVEN)[1]
    told = "A. Author, 2020, table 3, https://example.org/a"
    assert f"| theirs | 44.1 ± 0.5 | 61.25 | {told} |\n| others |  | 50 ± 1 | {told} |" in out
    assert "no published figure" not in out
    page = (place / "ckpt" / "runs" / "paper" / "un_cifarfs" / "paper.html").read_text()
    assert "44.1 ± 0.5" in page and told in page and "seed 3" in page


def test_every_published_figure_has_its_source():
    found = json.loads(paper.FIGURES.read_text(encoding="utf-8"))
    assert found.keys() == {"un_cifarfs", "un_miniimagenet", "co_cifarfs", "co_miniimagenet", "cifar_mini"}
    for each in sum(found.values(), []):
        assert each.keys() == {"method", "shot", "accuracy", "interval", "paper", "table", "url"}
        assert each["shot"] in paper.SHOTS and 0 < each["accuracy"] < 100 and each["url"].startswith("https://")


def known(words):
    """Whether the script of a command takes its flags."""
    name, flags = module_of(words)
    if name == "guided_diffusion.image_train":
        assert train_flags.parse(flags).image_size == 64
    elif name in ("main", "diffusionmix"):
        parse(flags, description="")
    return name


def test_lines_for_one_machine(place, call):
    out = call(paper, "--scenario", "co_cifarfs", "--gpus", "4", "--print", "torchrun")[1]
    lines = [shlex.split(line) for line in out.splitlines()]
    assert [line[0] for line in lines] == ["python", *["torchrun"] * 4, "python"]
    for line in lines[1:-1]:
        given = get_args_parser().parse_args(line[1:])
        assert given.standalone and given.nproc_per_node == "4"
        known(["python", given.training_script, *given.training_script_args])
    assert lines[0][2:4] == ["datasets.prepare", "cifarfs"] and "--table" in lines[-1]
    assert not list(place.iterdir())


PYTHON = """#!/bin/sh
echo "$(basename "$0")" "$@" >> LOG
"""
SBATCH = """#!/bin/sh
for word; do case $word in
    --job-name=*) name=${word#--job-name=};;
    --array=*) tasks=${word#--array=};;
    --dependency=*) after=${word#--dependency=};;
esac; wrap=$word; done
echo "sbatch $name" "${tasks-one}" "${after-nothing}" >> LOG
for task in $(echo "${tasks-one}" | sed 's/1-2/1 2/; s/,/ /g'); do SLURM_ARRAY_TASK_ID=$task sh -c "$wrap"; done
echo "id-of-$name"
"""


def test_lines_for_slurm_submit_each_job_after_what_it_needs(place, call):
    """The lines are run by stand-ins for sbatch, which runs a job at once, for python and for torchrun."""
    given = "--scenario cifar_mini --data from,place --seeds 1 3 --gpus 2 --print sbatch --lr 0.3".split()
    lines, log = call(paper, *given)[1], place / "log"
    assert not list(place.iterdir())
    for name, text in (("sbatch", SBATCH), ("python", PYTHON), ("torchrun", PYTHON)):
        (place / name).write_text(text.replace("LOG", str(log)))
        (place / name).chmod(0o755)
    subprocess.run(["sh", "-e", "-c", lines], check=True, env=os.environ | {"PATH": f"{place}:{os.environ['PATH']}"})
    ran = [line.split() for line in log.read_text().splitlines()]
    pool, train, test = (f"id-of-cifar_mini-{name}" for name in ("pool", "train", "test"))
    assert [" ".join(words[1:]).removeprefix("cifar_mini-") for words in ran if words[0] == "sbatch"] == [
        "data one nothing",
        "pool 1-2 afterok:id-of-cifar_mini-data",
        "pool 1-2 afterok:id-of-cifar_mini-data",
        f"train 1,3 afterok:{pool}:{pool}",
        f"test 1,3 aftercorr:{train}",
        f"table one afterok:{test}",
    ]
    several = [words[:1] + words[4:] for words in ran if words[0] == "torchrun"]
    assert [known(words) for words in several] == ["main"] * 2 + ["diffusionmix"] * 4
    places = [words[words.index("--save-dir") + 1] for words in several]
    assert places == [f"ckpt/runs/paper/cifar_mini/seed{end}" for end in ("1", "3", "1/1-shot", "1/5-shot", "3/1-shot",
                                                                         "3/5-shot")]  # fmt: skip
    pools = [words for words in ran if words[:2] == ["python", "guided_diffusion/image_train.py"]]
    assert [words[-2:] for words in pools] == [["--subsets", "1"], ["--subsets", "2"]] * 2
    assert {known(words) for words in pools} == {"guided_diffusion.image_train"}
    links = {link.name: os.readlink(link) for link in (place / "ckpt" / "pools" / "cifar_mini").iterdir()}
    assert links == {
        "subset1": "../un_cifarfs/subset1", "subset2": "../un_cifarfs/subset2",
        "subset3": "../un_miniimagenet/subset1", "subset4": "../un_miniimagenet/subset2",
    }  # fmt: skip


def test_the_published_sets_need_13_models():
    assert [paper.models(domain) for domain in ("cifarfs", "miniimagenet")] == [13, 13]


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--scenario glyphs", "glyphs"),
        ("--scenario un_cifarfs --gpus 0", "--gpus 0"),
        ("--scenario cifar_mini --data one", "miniimagenet"),
        ("--scenario un_cifarfs --data_root data/other", "--data_root"),
        ("--scenario un_cifarfs --test --shot 3", "--shot"),
        ("--scenario un_cifarfs --max-epch 3", "--max-epoch"),
        ("--scenario un_cifarfs --pretrain --image_size x", "image_size"),
        ("--scenario un_miniimagenet --print sbatch", "no --data for miniimagenet"),
        ("--scenario un_miniimagenet --table", "seed1/1-shot/results.json"),
        ("--scenario un_cifarfs --table", "seed1/1-shot/results.json"),
    ],
)
def test_refused_in_one_line_before_anything_runs(flags, word, made, call):
    status, out, err = call(paper, *flags.split())
    assert status == 2 and word in err and err.count("\n") == 1 and not made
