"""What a user gets for a mistake: one line, exit status 2, and no half-made folder."""

import os
import subprocess
import sys

import pytest
import torch

import datasets.prepare as prepare
import diffusionmix
import guided_diffusion.image_train as image_train
import main
from guided_diffusion.pool import subset_path
from tests.conftest import ROOT, TINY
from utils import checkpoint


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
    return tmp_path


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
    (main, MAIN, "--lr x", "invalid float value"),
    (main, MAIN, "--lr nan", "--lr nan"),
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
    (main, MAIN, "--data-root few_classes", "got 4 classes, a 5-way episode needs 5"),
    (main, MAIN, "--data-root few_images", "has 2 images, an episode needs 3"),
    (main, MAIN, "--source real --nTestNovel 5 --data-root few_images", "has 2 images, an episode needs 3"),
    (main, MAIN, "--source real --data-root few_classes", "5-way"),
    (main, MAIN, "--resume nowhere.pt", "nowhere.pt: no such checkpoint"),
    (main, MAIN, "--resume dict.pt", "dict.pt: is no checkpoint of main.py"),
    (main, MAIN, "--resume list.pt", "list.pt: is no checkpoint of main.py"),
    (main, MAIN, "--save-dir a_file", "a_file: got a file"),
    # meta-testing
    (diffusionmix, MIX, "", "out/best_model.pt: no such checkpoint; make it with python main.py"),
    (diffusionmix, MIX, "--resume dict.pt", "dict.pt: is no checkpoint of main.py"),
    (diffusionmix, MIX, "--resume a_file", "a_file: is cut short or is no checkpoint"),
    (diffusionmix, MIX, "--mix-steps 300", "at most --mix-level, 200"),
    (diffusionmix, MIX, "--episodes 1", "--episodes 1"),
    (diffusionmix, MIX, "--split meta_train", "meta_val"),
    (diffusionmix, MIX, "--resume run.pt --data-root few_images", "few_images/meta_test: no such folder"),
    (diffusionmix, MIX, "--resume run.pt --data-root few_images --split meta_val", "an episode needs 3"),
    (diffusionmix, MIX, "--resume run.pt --pool nowhere", "got no diffusion models"),
    (diffusionmix, MIX, "--resume run.pt --pool cut", "subset2/ckpt/model.pt: is cut short"),
    # pretraining
    (image_train, TRAIN, "--data_dir nowhere", "nowhere"),
    (image_train, TRAIN, "--data_dir empty", "holds no images"),
    (image_train, TRAIN, "--frob 1", "unrecognized arguments"),
    (image_train, TRAIN, "--class_cond maybe", "true or false"),
    (image_train, TRAIN, "--class_cond True --data_dir flat", "got no class folders"),
    (image_train, TRAIN, "--steps 0", "steps 0"),
    (image_train, TRAIN, "--lr 0", "lr 0"),
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


def last_lines(err):
    """What stays on a terminal: text after the last carriage return of each line."""
    lines = [line.rsplit("\r", 1)[-1] for line in err.split("\n")]
    return [line for line in lines if line.strip()]


@pytest.mark.parametrize("module, fixed, flags, words", CASES, ids=lambda v: v if isinstance(v, str) else None)
def test_one_line_status_2_and_nothing_written(module, fixed, flags, words, call, place):
    if "run.pt" in flags:
        assert call(main, *MAIN, "--source", "none", "--save-dir", "made")[0] == 0
        os.rename("made/last.pt", "run.pt")
    before = sorted(place.iterdir())
    status, _, err = call(module, *fixed, *flags.split())
    lines = last_lines(err)
    assert len(lines) == 1, lines
    line = lines[0]
    assert status == 2 and line.startswith("error: ") and words in line
    assert sorted(place.iterdir()) == before  # no folder is left behind
    assert str(ROOT) not in line


def test_as_a_command(place):
    command = [sys.executable, ROOT / "diffusionmix.py", *MIX]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: out/best_model.pt: no such checkpoint; make it with python main.py, or name one with --resume\n"
    )
