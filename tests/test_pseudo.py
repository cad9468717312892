"""The pseudo dataset keeps its classes from round to round."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import datasets.pseudo
from datasets.pseudo import PseudoDataset, learnt, read_manifest


def dataset(classes=13, per_class=2, size=4):
    labels = torch.arange(classes).repeat(per_class)
    images = labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, size, size).contiguous()  # pixels say the class
    return PseudoDataset(images, labels, classes)


def test_class_c_stays_class_c(tmp_path):
    """With more than ten classes: sorted folder names would put class10 second."""
    first = dataset()
    for name in ("round10", "round02"):
        first.save(tmp_path / name, {"round": 2})
        loaded = PseudoDataset.load(tmp_path / name)
        assert loaded.num_classes == 13
        assert torch.equal(loaded.images[:, 0, 0, 0].long(), loaded.labels)
        assert torch.equal(loaded.images, first.images) and torch.equal(loaded.labels, first.labels)
    manifest = read_manifest(tmp_path / "round02")
    assert [entry["index"] for entry in manifest["class_to_index"]] == list(range(13))
    assert manifest["class_to_index"][10] == {"class": "class10", "index": 10, "images": 2}
    assert (manifest["round"], manifest["num_classes"], manifest["num_images"]) == (2, 13, 26)


def test_manifest_is_written_last(tmp_path, monkeypatch):
    dataset().save(tmp_path, {})
    real, calls = np.save, []

    def fail_on_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("disk full")
        return real(*arguments)

    monkeypatch.setattr(np, "save", fail_on_second)
    with pytest.raises(OSError, match="disk full"):
        dataset(12).save(tmp_path, {})
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(ValueError, match="no complete pseudo dataset"):
        PseudoDataset.load(tmp_path)


def test_damage_is_found(tmp_path):
    dataset().save(tmp_path, {})
    content = (tmp_path / "images.npy").read_bytes()
    (tmp_path / "images.npy").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="damaged"):
        PseudoDataset.load(tmp_path)
    dataset().save(tmp_path, {})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "num_images": 3}))
    with pytest.raises(ValueError, match="holds 26 images, its manifest says 3"):
        PseudoDataset.load(tmp_path)


def test_what_is_no_dataset_is_refused(tmp_path):
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="labels from 0 to 1"):
        PseudoDataset(images, labels, 1)
    with pytest.raises(ValueError, match="uint8"):
        PseudoDataset(images.float(), labels, 2)
    with pytest.raises(ValueError, match="one per image"):
        PseudoDataset(images, labels[:1], 2)
    with pytest.raises(ValueError, match="num_classes"):
        PseudoDataset(images, labels, 2).save(tmp_path, {"num_classes": 5})


def test_sheet_has_a_row_a_class(tmp_path):
    few = dataset(3, 2)
    few.sheet(tmp_path / "sheet.png", 3)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    for c in range(3):
        row = pixels[2 + 18 * c : 6 + 18 * c]
        assert (row[:, 2:6] == c).all() and (row[:, 8:12] == c).all() and (row[:, 14:18] == 255).all()


def test_what_a_run_learnt_as_folders(tmp_path, call):
    data, run = dataset(), tmp_path / "run"
    for name in ("round00", "round01"):
        data.save(run / "pseudo" / name, {})
    np.save(run / "pseudo" / "round00" / "clusters.npy", (data.labels + 1).numpy() % 13)
    np.save(run / "pseudo" / "round00" / "labels01.npy", (data.labels + 2).numpy() % 13)
    for number, more in ((99, 3), (100, 4)):  # the name has three digits from here on
        np.save(run / "pseudo" / "round01" / f"labels{number}.npy", (data.labels + more).numpy() % 13)
    assert torch.equal(learnt(run).labels[26:], (data.labels + 4) % 13)
    for path in (run / "pseudo" / "round01").glob("labels*0.npy"):
        path.unlink()
    (run / "pseudo" / "round01" / "labels99.npy").unlink()
    found = learnt(run)
    assert torch.equal(found.images, torch.cat([data.images] * 2))
    assert torch.equal(found.labels, torch.cat([(data.labels + 2) % 13, data.labels]))
    status, out, err = call(datasets.pseudo, run, "--as-folders", tmp_path / "out")
    assert status == 0 and "52 images of 13 classes" in out, err
    for number, label in enumerate(found.labels.tolist()):
        with Image.open(tmp_path / "out" / f"class{label:02d}" / f"{number:06d}.png") as image:
            assert (np.asarray(image).transpose(2, 0, 1) == found.images[number].numpy()).all()
    for odd in ((run, "--as-folders", tmp_path / "out"), (tmp_path, "--as-folders", tmp_path / "new")):
        assert call(datasets.pseudo, *odd)[0] == 2
    assert not (tmp_path / "new").exists()
