"""Where real images come from."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from datasets.glyphs import make_split
from datasets.sources import GLYPHS_PER_CLASS, load_real
from tests.conftest import NO_IMAGES


def test_glyphs_are_drawn_where_there_is_no_folder():
    data = load_real("glyphs", [NO_IMAGES], "meta_val", 16, per_class=2)
    assert torch.equal(data.images, make_split("meta_val", 2, size=16).images)


def test_number_of_glyphs(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("datasets.sources.make_split", lambda split, count, size: asked.append((split, count, size)))
    load_real("glyphs", [tmp_path], "meta_test", 32)
    load_real("glyphs", [tmp_path], "meta_val", 32, 7)
    assert asked == [("meta_test", GLYPHS_PER_CLASS, 32), ("meta_val", 7, 32)]


@pytest.mark.parametrize("dataset", ["glyphs", "custom"])
def test_a_folder_that_is_there_is_read(dataset, picture_folder, tmp_path):
    picture_folder(tmp_path / "meta_val", {"b": [0, 10, 20], "a": [255]})
    data = load_real(dataset, [tmp_path], "meta_val", 16, per_class=2)
    assert data.class_names == ["a", "b"] and data.labels.tolist() == [0, 1, 1]
    assert data.images[:, 0, 0, 0].tolist() == [255, 0, 10]


def test_missing_folder_says_what_it_should_hold(tmp_path):
    with pytest.raises(ValueError, match="meta_test: no such folder; it should hold one folder per class"):
        load_real("custom", [tmp_path], "meta_test", 16)


def test_domains_are_put_side_by_side(tmp_path):
    for root, name, grey in (("a", "cat", 10), ("a", "dog", 20), ("b", "cat", 30)):
        folder = tmp_path / root / "meta_val" / name
        folder.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (grey, grey, grey)).save(folder / f"{i}.png")
    data = load_real("cifar_mini", [tmp_path / "a", tmp_path / "b"], "meta_val", 8)
    assert data.class_names == ["a/cat", "a/dog", "b/cat"] and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [int(image.float().mean()) for image in data.images] == [10, 10, 20, 20, 30, 30]


def test_a_given_folder_that_lacks_the_split_is_refused(picture_folder, tmp_path):
    """Else another data set would be used in silence."""
    picture_folder(tmp_path / "a" / "meta_train", {"b": [0]})
    picture_folder(tmp_path / "b" / "meta_val", {"b": [0]})
    with pytest.raises(ValueError, match="meta_val.*--data-root"):
        load_real("glyphs", [tmp_path / "a"], "meta_val", 16)
    with pytest.raises(ValueError, match="meta_val"):
        load_real("glyphs", [tmp_path / "none", tmp_path / "b"], "meta_val", 16)


def test_a_given_folder_without_splits_is_refused(tmp_path, monkeypatch):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    for wrong in ("nowhere", "photos"):
        with pytest.raises(ValueError, match=f"{wrong}: .*--data-root"):
            load_real("glyphs", [tmp_path / wrong], "meta_val", 16)
    (tmp_path / "mini.zip").touch()
    with pytest.raises(ValueError, match="mini.zip: is a file.*--data-root"):
        load_real("glyphs", [tmp_path / "mini.zip"], "meta_val", 16)
    monkeypatch.chdir(tmp_path)
    assert len(load_real("glyphs", [Path("data", "glyphs")], "meta_val", 16, per_class=1).labels) > 4  # the default
