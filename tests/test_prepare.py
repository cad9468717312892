"""Image folders made by datasets.prepare."""

import torch

import datasets.prepare as prepare
from datasets.folder import load_split
from datasets.glyphs import make_split


def test_glyphs_on_disk_are_the_glyphs(call, tmp_path):
    status, out, _ = call(prepare, "glyphs", "--out", tmp_path, "--per-class", 3, "--splits", "meta_val")
    assert status == 0 and "10 classes of 3 images" in out
    drawn, read = make_split("meta_val", 3), load_split(tmp_path, "meta_val", 32)
    assert torch.equal(drawn.images, read.images) and torch.equal(drawn.labels, read.labels)
    assert drawn.class_names == read.class_names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta_val"]


def test_what_is_there_is_kept(call, tmp_path):
    arguments = ("glyphs", "--out", tmp_path, "--per-class", 2, "--splits", "meta_val")
    call(prepare, *arguments)
    first = tmp_path / "meta_val" / "glyph040" / "00000.png"
    (first.parent / "00001.png").unlink()
    before = first.stat().st_mtime_ns
    assert call(prepare, *arguments)[0] == 0
    assert first.stat().st_mtime_ns == before and (first.parent / "00001.png").exists()
