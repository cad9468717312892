"""The published class lists: sizes, no class twice, and nothing but the classes there are."""

import re

import pytest

from datasets.published import CIFARFS, MINIIMAGENET, PER_CLASS

# CIFAR-100's fine classes in the groups of its makers, written down apart from the split.
CIFAR100 = """
    beaver dolphin otter seal whale, aquarium_fish flatfish ray shark trout, orchid poppy rose sunflower tulip,
    bottle bowl can cup plate, apple mushroom orange pear sweet_pepper, clock keyboard lamp telephone television,
    bed chair couch table wardrobe, bee beetle butterfly caterpillar cockroach, bear leopard lion tiger wolf,
    bridge castle house road skyscraper, cloud forest mountain plain sea, camel cattle chimpanzee elephant kangaroo,
    fox porcupine possum raccoon skunk, crab lobster snail spider worm, baby boy girl man woman,
    crocodile dinosaur lizard snake turtle, hamster mouse rabbit shrew squirrel,
    maple_tree oak_tree palm_tree pine_tree willow_tree, bicycle bus motorcycle pickup_truck train,
    lawn_mower rocket streetcar tank tractor
"""


@pytest.mark.parametrize("classes", [CIFARFS, MINIIMAGENET])
def test_64_16_20_disjoint_and_sorted(classes):
    assert {split: len(names) for split, names in classes.items()} == {
        "meta_train": 64,
        "meta_val": 16,
        "meta_test": 20,
    }
    every = [name for names in classes.values() for name in names]
    assert len(set(every)) == 100 and PER_CLASS == 600
    assert all(list(names) == sorted(names) for names in classes.values())


def test_cifarfs_is_all_of_cifar100():
    groups = [group.split() for group in CIFAR100.split(",")]
    assert [len(group) for group in groups] == [5] * 20
    assert {name for group in groups for name in group} == {name for names in CIFARFS.values() for name in names}


def test_miniimagenet_classes_are_wordnet_numbers():
    assert all(re.fullmatch(r"n\d{8}", name) for names in MINIIMAGENET.values() for name in names)
    assert "n01532829" in MINIIMAGENET["meta_train"] and "n01930112" in MINIIMAGENET["meta_test"]
