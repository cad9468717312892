"""Settings: what flags give, what scenarios change, what is refused."""

import json
from dataclasses import fields

import pytest

from config import RECIPES, SCENARIOS, Settings, check_same, flag_of, parse
from datasets.sources import EMBEDDED


def read(text):
    return parse(text.split(), description="test")


def test_paper_command_parses():
    s = read("--dataset co_miniimagenet --save-dir ckpt/co_miniimagenet/1-shot -g 0 --nExemplars 1")
    assert (s.dataset, str(s.run_folder), s.device_name) == (
        "co_miniimagenet", "ckpt/co_miniimagenet/1-shot", "cuda:0",
    )  # fmt: skip
    assert (s.shot, s.num_classes, s.samples_per_class, s.max_epoch) == (1, 64, 600, 90)


def test_every_flag_of_the_paper_is_known():
    s = read(
        "-d custom -j 2 --height 84 --width 84 --optim sgd --lr 0.05 --weight-decay 5e-4 --max-epoch 9 --start-epoch 1 "
        "--recipe paper "
        "--train-batch 4 --test-batch 4 --scale_cls 7 --save-dir X --resume Y -g 1 --nKnovel 5 --nExemplars 5 "
        "--train_nTestNovel 30 --train_epoch_size 12 --nTestNovel 75 --epoch_size 6 --phase val --seed 3"
    )
    assert (s.height, s.lr, s.shot, s.test_split, s.train_epoch_size, s.epoch_size) == (84, 0.05, 5, "meta_val", 12, 6)


def test_new_flags_in_both_spellings():
    assert read("--samples-per-class 7") == read("--samples_per_class 7")
    assert read("--mix False").mix is False and read("--flip yes").flip is True
    s = read("--data-root D --pool P --refresh-every 4 --backbone resnet12 --device cpu --precision bf16")
    assert (list(map(str, s.data_paths)), s.pool_place, s.refresh_every, s.device_name) == (["D"], "P", 4, "cpu")


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios(name):
    s = read(f"-d {name}")
    classes = {"custom": 0, "cifar_mini": 104, **dict.fromkeys(EMBEDDED, 0)}
    assert s.num_classes == classes.get(name, 64 if name.startswith("co") else 52)
    assert s.pool_place == (f"ckpt/{name}" if name in EMBEDDED else f"ckpt/pools/{name}")
    assert SCENARIOS[name].embedded == (name in EMBEDDED)
    domains = ["cifarfs", "miniimagenet"] if name == "cifar_mini" else [name.removeprefix("co_").removeprefix("un_")]
    assert [str(path) for path in s.data_paths] == [f"data/{domain}" for domain in domains]
    assert json.loads(json.dumps(s.as_dict())) == s.as_dict()


def test_recipes():
    paper, own = read("--recipe paper"), read("")
    assert own.recipe == "clusters" and own == read("--recipe clusters")
    published = dict(features="pooled", renoise=0.0, guidance_scale=1.0, dense_weight=0.5, kl_weight=1.0,
                     learner_rate=0.1, optim="sgd", lr=0.1, weight_decay=5e-4, scale_cls=7.0)  # fmt: skip
    assert {name: getattr(paper, name) for name in published} == published
    changed = {f.name for f in fields(Settings) if getattr(paper, f.name) != getattr(own, f.name)}
    assert changed == {"recipe", *RECIPES["clusters"]}  # sizes are the scenario's either way
    assert read("--recipe paper --features map").features == "map"
    recipes = {name: read(f"-d {name}").recipe for name in SCENARIOS}
    assert {name for name, recipe in recipes.items() if recipe == "paper"} == {"co_miniimagenet", "co_cifarfs"}
    full = read("-d un_miniimagenet --recipe paper")
    sizes = dict(samples_per_class=600, sample_steps=25, refresh_every=10, max_epoch=90, train_batch=32,
                 train_nTestNovel=30, mix_level=200, head_steps=50)  # fmt: skip
    assert {name: getattr(full, name) for name in sizes} == sizes


def test_queries_follow_the_way():
    s = read("--nKnovel 4")
    assert (s.train_nTestNovel, s.nTestNovel) == (24, 60)
    assert read("--way 40").train_nTestNovel == 240 and read("--nKnovel 4 --nTestNovel 8").nTestNovel == 8


def test_given_flags_win_over_the_scenario():
    assert (
        read("").samples_per_class == SCENARIOS["glyphs"].defaults["samples_per_class"]
        and read("--samples-per-class 600").samples_per_class == 600
    )
    assert read("-d un_cifarfs --num-classes 12").num_classes == 12


@pytest.mark.parametrize("field", [f for f in fields(Settings) if f.metadata["low"] is not None], ids=lambda f: f.name)
def test_ranges(field):
    low = field.metadata["low"]
    with pytest.raises(ValueError, match=flag_of(field)):
        Settings(**{field.name: low - 1})
    if isinstance(field.default, float):
        with pytest.raises(ValueError, match=flag_of(field)):
            Settings(**{field.name: float("nan")})


@pytest.mark.parametrize(
    "text, words",
    [
        ("--dataset nope", "glyphs, fontchars, co_miniimagenet"),
        ("--frobnicate 1", "unrecognized arguments: --frobnicate"),
        ("--lr fast", "--lr"),
        ("--mix maybe", "True or False"),
        ("--nTestNovel 76", "multiple of the 5 classes"),
        ("--train_nTestNovel 31", "such as 30"),
        ("--width 64", "square"),
        ("--height 64 --width 84", "square"),
        ("--mix-steps 20 --mix-level 10", "at most --mix-level"),
        ("--start-epoch 40", "less than --max-epoch, 40"),
        ("--start-epoch 4", "without --resume"),
        ("--data-root a/x,b/x", "different names"),
        ("--source stolen", "guided"),
        ("--split meta_train", "meta_val"),
        ("--features both", "'pooled', 'map'"),
        ("--recipe paper --source by_model", "--source unguided"),
        ("--max-epoch 20", "more than --refresh-every, 20"),
        ("--support S", "got --support, expected both --support"),
        ("--query Q --out P.csv", "got --query and --out, expected"),
        ("--support S --query Q --out P", "ends in .csv"),
    ],
)
def test_refused(text, words):
    with pytest.raises(ValueError, match=words) as error:
        read(text)
    assert "\n" not in str(error.value)


def test_a_run_from_before_a_setting_was_taken_out_resumes():
    check_same("f", {"a": 1, "sampler": "ddim"}, {"a": 1}, set())
    with pytest.raises(ValueError, match="sampler 'dpmpp2m'"):
        check_same("f", {"a": 1, "sampler": "dpmpp2m"}, {"a": 1}, set())


def test_check_same_names_the_first_difference():
    check_same("f", {"a": 1, "b": 2}, {"a": 1, "b": 3}, {"b"})
    with pytest.raises(ValueError, match=r"f: was made with b 2 \(got 3\)"):
        check_same("f", {"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a"})


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as end:
        read("--help")
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert all(flag_of(f) in out for f in fields(Settings))


@pytest.mark.parametrize(
    "flags, counts, answer",
    [
        ("", {"a": 16, "b": 16, "c": 16, "d": 16, "e": 16}, ""),
        (
            "", {"a": 30, "b": 20, "c": 7, "d": 9},
            "val: got 4 classes, 7 images in class c (1 other has too few); an episode needs 5 classes of 16 images "
            "(1 to learn from, 15 to label); add some, or give --way 4 --queries 24",
        ),
        ("--nExemplars 5", {c: 20 for c in "abcd"}, "--way 4 --queries 60"),
        ("", {"a": 16, "b": 1, "c": 16, "d": 16, "e": 16}, "add some"),
        ("", {"a": 99}, "val: got 1 class; an episode needs 5 classes of 16"),
    ],
)  # fmt: skip
def test_what_images_lack(flags, counts, answer):
    s = read(flags)
    if not answer:
        return s.check_images("val", counts)
    with pytest.raises(ValueError) as error:
        s.check_images("val", counts)
    assert answer in str(error.value)
    if "give" in str(error.value):  # what it says to give does
        read(f"{flags} {str(error.value).partition('give ')[2]}").check_images("val", counts)


def test_all_that_is_lacking_is_said_at_once():
    s = read("--recipe paper --samples-per-class 2")
    with pytest.raises(ValueError) as error:
        s.check_suffices(8, 3, {"meta_val": {"a": 3}})
    for words in (
        "data/glyphs/meta_val: got 1 class",
        "needs 16;",
        "got 3 classes to train on",
        "--samples-per-class 2",
    ):
        assert words in str(error.value)


def test_one_advice_for_all_splits():
    s = read("--source real --recipe paper --nKnovel 8 --train_nTestNovel 400 --nTestNovel 400 --samples-per-class 60")
    counts = {c: 20 for c in "abcdef"}
    with pytest.raises(ValueError) as error:
        s.check_suffices(32, 6, {"meta_val": counts, "meta_train": {**counts, "g": 12}})
    assert str(error.value).count("an episode needs") == 2 and str(error.value).count("or give") == 1
    flags = str(error.value).partition("or give ")[2]
    read(f"--source real --recipe paper {flags} --samples-per-class 60").check_suffices(
        32, 6, {"meta_val": counts, "meta_train": {**counts, "g": 12}}
    )


def test_help_beside_a_mistake(capsys):
    with pytest.raises(SystemExit) as end:
        read("--dataset custom --frobnicate 1 --help")
    assert end.value.code == 0 and "--dataset custom --recipe clusters" in capsys.readouterr().out
