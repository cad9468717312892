"""A classifier for one's own pictures: the class, and the command that is built on it."""

import csv
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import diffusionmix
import few_shot
import own_images
from few_shot import RATES, FewShotClassifier
from guided_diffusion.pool import subset_path
from models.episode_head import predict
from tests.conftest import NO_IMAGES, slow
from utils import checkpoint
from utils.images import to_float
from utils.pieces import Pieces

QUICK = dict(mix_steps=2, head_steps=5, device="cpu", sample_batch=7)
FLAGS = "--mix-steps 2 --head-steps 5 --device cpu --sample-batch 7".split()


@pytest.fixture
def model(trained):
    return trained / "best_model.pt"


@pytest.fixture
def classifier(model, two_models):
    return FewShotClassifier(model, two_models, **QUICK)


def pictures(counts, size=16, seed=0):
    """(N, size, size, 3) uint8 and their labels: noise around a colour of each class, `counts` of it."""
    rng = np.random.default_rng(seed)
    labels = [name for name, count in counts.items() for _ in range(count)]
    colours = {name: rng.integers(40, 216, 3) for name in counts}
    noise = rng.integers(-40, 40, (len(labels), size, size, 3))
    return (np.stack([colours[label] for label in labels])[:, None, None] + noise).astype(np.uint8), labels


def folders(root, images, labels):
    """Write pictures to <root>/<label>/; returns the paths, in order."""
    paths = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        paths.append(root / label / f"{number:03d}.png")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(paths[-1])
    return paths


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def probabilities(rows):
    return np.array([[float(value) for name, value in row.items() if name not in ("path", "label")] for row in rows])


# ---- the head


@pytest.mark.usefixtures("few_glyphs")
@pytest.mark.parametrize("init", ["prototypes", slow("zeros"), slow("random")])
def test_equal_shots_give_the_head_of_the_first_test_episode(classifier, model, two_models, tmp_path, init):
    flags = ("--resume", model, "--pool", two_models, "--data-root", NO_IMAGES, "--save-dir", tmp_path / "run", *FLAGS,
             "--episodes", 2, "--nTestNovel", 10, "--nExemplars", 3, "--head-init", init)  # fmt: skip
    settings = diffusionmix.parse(list(map(str, flags)), description="test")
    testing = diffusionmix.Testing(settings, settings.data_paths[0])
    e, images = testing.episodes, testing.images.images
    features = testing.fitter.features(to_float(images))
    targets = F.one_hot(e.support_labels, 5).float()
    heads = testing.fitter.fit(features[e.support], targets, testing.mixes(targets))
    logits = predict(heads, features[e.query])[0].double()
    pixels = images.permute(0, 2, 3, 1)
    classifier.set_params(head_init=init).fit(pixels[e.support[0]], e.support_labels[0])
    torch.testing.assert_close(classifier.heads_.weight[0], heads.weight[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(classifier.heads_.bias[0], heads.bias[0], atol=1e-6, rtol=0)
    expected = (classifier.sharpness_ * logits).softmax(-1).numpy()
    np.testing.assert_allclose(classifier.predict_proba(pixels[e.query[0]]), expected, atol=1e-5)


def test_unequal_shots_are_class_weighted_cross_entropy(classifier):
    """Against autograd: torch's own class weights, in the support set as in the mixes."""
    images, labels = pictures({"a": 5, "b": 1, "c": 3})
    classifier.set_params(head_steps=20).fit(images, labels)
    fitter = classifier.fitter_
    pixels, targets = torch.from_numpy(images).permute(0, 3, 1, 2), F.one_hot(torch.arange(3), 3).float()
    targets = targets.repeat_interleave(torch.tensor([5, 1, 3]), 0)
    support = fitter.features(to_float(pixels))
    mixes, mix_targets, _ = fitter.mixes(pixels, torch.arange(9)[None], targets[None], Pieces())
    assert mixes.shape == (1, 2 * 9, 64)
    weights = 9 / (3 * torch.tensor([5.0, 1, 3]))  # scikit-learn's "balanced"
    head = torch.nn.Linear(64, 3)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    sets = ((support, targets), (mixes[0], mix_targets[0]), (support, targets))
    for (inputs, wanted), rate in zip(sets, RATES, strict=True):
        optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(head(inputs), wanted, weight=weights).backward()
            optimizer.step()
    torch.testing.assert_close(classifier.heads_.weight[0], head.weight.detach(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(classifier.heads_.bias[0], head.bias.detach(), atol=1e-6, rtol=1e-4)


def test_one_picture_counts_as_much_as_five(model):
    """Without mixes, as if the single one were there five times."""
    images, labels = pictures({"a": 5, "b": 1})
    plain = FewShotClassifier(model, head_steps=20)
    weights = plain.fit(images, labels).heads_.weight
    repeated = plain.fit([*images, *images[5:].repeat(4, 0)], [*labels, *"bbbb"]).heads_.weight
    torch.testing.assert_close(weights, repeated, atol=1e-6, rtol=1e-4)
    assert float(plain.heads_.bias.abs().max()) < 0.01


def test_mixes_matter_and_need_a_pool(model, paint_pool):
    images, labels = pictures({"a": 3, "b": 2})
    settings = QUICK | dict(head_steps=50, mix_level=900, head_scale=3)
    plain = FewShotClassifier(model, **settings).fit(images, labels).predict_proba(images)
    mixed = FewShotClassifier(model, paint_pool, **settings).fit(images, labels).predict_proba(images)
    assert np.abs(plain - mixed).max() > 0.01


def test_leave_one_out(classifier):
    images, labels = pictures({"a": 4, "b": 3, "c": 1})
    fitter = classifier.set_params(head_steps=20).fit(images, labels).fitter_
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    features, numbers = fitter.features(to_float(pixels)), torch.tensor([0] * 4 + [1] * 3 + [2])
    right = 0
    for i in range(7):  # of the third class there is no other
        rest = [j for j in range(8) if j != i]
        heads = fitter.fit(features[None, rest], F.one_hot(numbers[rest])[None].float())
        right += int(diffusionmix.predict(heads, features[None, None, i]).argmax()) == int(numbers[i])
    logits, left_out = fitter.leave_one_out(features, numbers)
    assert left_out.tolist() == [0] * 4 + [1] * 3 and int((logits.argmax(1) == left_out).sum()) == right
    assert len(fitter.leave_one_out(features, numbers, most=3)[1]) == 3
    assert len(fitter.leave_one_out(features[[0, 4]], torch.tensor([0, 1]))[1]) == 0


def test_probabilities_are_as_sure_as_the_images_left_out_are_right():
    logits = 0.01 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    labels = logits.argmax(1)
    labels[:150] = (labels[:150] + 1) % 4  # 70 % are right
    factor = few_shot.sharpness(logits, labels)
    assert float((factor * logits).softmax(1).amax(1).mean()) == pytest.approx(351 / 502, abs=1e-3)
    assert float(logits.softmax(1).amax(1).mean()) < 0.27
    assert few_shot.sharpness(logits[:0], labels[:0]) == 1.0
    assert few_shot.sharpness(100 * logits, 3 - labels) == pytest.approx(1.0)  # never less sure than the head


@pytest.mark.parametrize("names", [(1, "a"), ("a", "a\0"), (2**53 + 1, 0.5), (True, 2)])
def test_labels_and_parameters_are_loaded_as_they_were(classifier, tmp_path, names):
    classifier.set_params(head_steps=np.int64(3), head_scale=np.float64(2))
    classifier.fit(pictures({"a": 4})[0], [*names, *names]).save(tmp_path / "mine.pt")
    again = FewShotClassifier.load(tmp_path / "mine.pt")
    found, wanted = again.classes_.tolist(), classifier.classes_.tolist()
    assert found == wanted and [*map(type, found)] == [*map(type, wanted)] and again.head_steps == 3


def test_an_open_image_may_be_there_twice(tmp_path):
    pixels = pictures({"a": 1})[0][0]
    Image.fromarray(np.asarray(pixels)).resize((600, 600)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        found = few_shot._read([image] * 16, 16, None)
    assert (found == found[0]).all()


def test_save_and_load(classifier, tmp_path):
    images, labels = pictures({"a": 3, "b": 2, "c": 1})
    expected = classifier.fit(images, labels).predict_proba(images)
    classifier.save(tmp_path / "mine.pt")
    again = FewShotClassifier.load(tmp_path / "mine.pt")
    assert (again.predict_proba(images) == expected).all() and again.classes_.tolist() == ["a", "b", "c"]
    assert again.get_params()["mix_steps"] == QUICK["mix_steps"]
    classifier.set_params(model="for/the/next/fit.pt", value_range=(0, 1)).save(tmp_path / "mine.pt")
    assert FewShotClassifier.load(tmp_path / "mine.pt").value_range == (0, 1)
    assert (FewShotClassifier.load(tmp_path / "mine.pt").predict_proba(images) == expected).all()
    checkpoint.save(tmp_path / "other.pt", {"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"other\.pt"):
        FewShotClassifier.load(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="fit"):
        FewShotClassifier(classifier.model).save(tmp_path / "no.pt")
    assert not (tmp_path / "no.pt").exists()


def test_transform_gives_features_of_unit_length(classifier):
    images, labels = pictures({"a": 2, "b": 2})
    found = classifier.fit(images, labels).transform(images)
    own = classifier.fitter_.features(to_float(torch.from_numpy(images).permute(0, 3, 1, 2)))
    np.testing.assert_array_equal(found, own.numpy())
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("way", [2, 12])
def test_any_number_of_classes(classifier, way):
    images, labels = pictures({f"class {c:02d}": 1 + c % 3 for c in range(way)}, size=24)
    classifier.set_params(head_steps=50, head_scale=30).fit(images, labels)
    found = classifier.predict_proba(images)
    assert found.shape == (len(images), way) and found.dtype == np.float64
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    assert classifier.score(images, labels) > 1.5 / way  # random weights, and colours of their own
    assert classifier.predict(images[:3]).tolist() == classifier.classes_[found[:3].argmax(1)].tolist()


def test_seed_batch_and_order_of_classes(classifier):
    images, labels = pictures({"a": 2, "b": 3, "c": 2})
    expected = classifier.fit(images, labels).predict_proba(images)
    classifier.set_params(sample_batch=100)
    np.testing.assert_allclose(classifier.fit(images, labels).predict_proba(images), expected, atol=1e-6)
    order = [4, 0, 5, 2, 3, 1, 6]  # of a, b and c the order within the class differs only for b
    order.sort(key=lambda i: (labels[i] != "c", labels[i] != "a", i))
    again = classifier.fit(images[order], [labels[i] for i in order])
    np.testing.assert_allclose(again.predict_proba(images), expected, atol=1e-6)
    other = classifier.set_params(seed=2).fit(images, labels).predict_proba(images)
    assert np.abs(other - expected).max() > 1e-6


def test_global_random_state_is_left_alone(classifier):
    images, labels = pictures({"a": 2, "b": 1})
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    expected = classifier.set_params(head_init="random").fit(images, labels).predict_proba(images)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    torch.manual_seed(9)
    assert (classifier.fit(images, labels).predict_proba(images) == expected).all()


# ---- what it is given


def test_paths_pictures_and_arrays_agree(classifier, tmp_path):
    images, labels = pictures({"a": 2, "b": 2}, size=40)
    images = images[:, :30]  # 30 x 40 pixels
    paths = folders(tmp_path, images, labels)
    expected = classifier.fit(images, labels).predict_proba(images)
    floats = images.transpose(0, 3, 1, 2) / 127.5 - 1
    given = (
        paths, [str(path) for path in paths], np.array(list(map(str, paths))), [Image.open(path) for path in paths],
        [Image.fromarray(image).convert("RGBA") for image in images], list(images), torch.from_numpy(images), floats,
        torch.from_numpy(floats).float(), (image for image in images), [paths[0], images[1], floats[2], images[3]],
    )  # fmt: skip
    for each in given:
        assert (classifier.predict_proba(each) == expected).all()
    assert (classifier.fit(paths, labels).predict_proba(images) == expected).all()
    classifier.sharpness_ = 1.0  # the head's own probabilities
    expected, square = classifier.predict_proba(images), classifier.predict_proba(images[:, :, 5:35])
    np.testing.assert_allclose(square, expected, atol=1e-3)  # the central one, but for what its edges border on


@pytest.mark.parametrize(
    "names",
    [
        ("b", "a"),
        (2, 1),
        (1.5, -2),
        (True, False),
        (("x", 1), ("w", 2)),
        (None, 3),
        (np.int64(4), np.int64(3)),
        ("z", "ä"),
    ],
    ids=str,
)
def test_labels_of_any_kind(model, names):
    images, numbers = pictures({0: 2, 1: 2})
    plain = FewShotClassifier(model, head_steps=50, head_scale=30).fit(images, [names[n] for n in numbers])
    assert plain.classes_.shape == (2,) and set(plain.classes_.tolist()) == set(names)
    found = plain.predict(images).tolist()
    assert plain.score(images, [names[n] for n in numbers]) == np.mean(
        [found[i] == names[numbers[i]] for i in range(4)]
    )
    if None not in names:
        assert plain.classes_.tolist() == sorted(names)


def test_labels_as_arrays(model):
    images, labels = pictures({3: 1, 5: 2})
    for given in (np.array(labels), torch.tensor(labels), np.array(labels, object), (label for label in labels)):
        assert FewShotClassifier(model).fit(images, given).classes_.tolist() == [3, 5]


GOOD = np.zeros((2, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    "images, labels, words",
    [
        (GOOD, "ab", "got labels of type str"),
        (GOOD, 5, "got labels of type int"),
        (GOOD, ["a"] * 2, "got 1 classes, expected 2 or more"),
        (GOOD, [], "got 0 classes"),
        (GOOD, ["a", "b", "b"], "got 2 images and 3 labels"),
        (GOOD, [[1, 0], [0, 1]], "one hashable value"),
        (GOOD, np.eye(2), "one hashable value"),
        (GOOD, [1.0, float("nan")], "NaN"),
        ([], ["a", "b"], "got no images"),
        (GOOD[:0], ["a", "b"], "got no images"),
        ("a.png", ["a", "b"], "got images str, expected a list"),
        (Image.new("RGB", (8, 8)), ["a", "b"], "put a single one into a list"),
        (GOOD[0], ["a", "b"], r"got images \(16, 16, 3\)"),
        (GOOD[..., :1], ["a", "b"], r"image number 0 \(from 0\): is \(16, 16, 1\) uint8, expected a path"),
        (GOOD.transpose(0, 3, 1, 2), ["a", "b"], r"is \(3, 16, 16\) uint8, expected"),
        (GOOD.astype(float), ["a", "b"], r"is \(16, 16, 3\) float64, expected"),
        (GOOD.astype(np.int64), ["a", "b"], "int64"),
        (np.full((2, 3, 16, 16), 255.0), ["a", "b"], "has values from 255 to 255"),
        (np.full((2, 3, 16, 16), np.nan), ["a", "b"], "has values from nan"),
        (GOOD[:, :0], ["a", "b"], r"is \(0, 16, 3\) uint8"),
        ([GOOD[0], {}], ["a", "b"], "image number 1 .*is of type dict"),
        ([GOOD[0], GOOD.astype(object)[1]], ["a", "b"], "object"),
        ([GOOD[0], "no/such.png"], ["a", "b"], "no/such.png: no such file"),
    ],
)  # fmt: skip
def test_what_it_refuses(model, images, labels, words):
    with pytest.raises(ValueError, match=words) as error:
        FewShotClassifier(model).fit(images, labels)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "params, words",
    [
        (dict(model="no/such.pt"), "no/such.pt: no such checkpoint"),
        (dict(pool="no/such/pool"), "got no diffusion models"),
        (dict(mix_steps=300), "at most --mix-level"),
        (dict(head_init="ones"), "--head-init"),
        (dict(device="toaster"), "lacks"),
        (dict(seed=-1), "--seed"),
        (dict(pool_flags={"heads": 4}), "pool_flags with heads, expected some of image_size, num_heads"),
    ],
)
def test_parameters_are_checked_by_fit(classifier, params, words):
    with pytest.raises(ValueError, match=words):
        classifier.set_params(**params).fit(GOOD, ["a", "b"])


# ---- as scikit-learn's users know it


@pytest.mark.parametrize("method", ["predict", "predict_proba", "score"])
def test_not_fitted(classifier, method):
    given = (GOOD, ["a", "b"]) if method == "score" else (GOOD,)
    with pytest.raises(ValueError, match=r"not fitted yet; call fit\(images, labels\) first"):
        getattr(classifier, method)(*given)


def test_parameters(classifier, model, two_models):
    params = classifier.get_params()
    assert params["model"] is model and params["pool"] is two_models and params["mix_steps"] == 2
    assert FewShotClassifier(**params).get_params() == params and "mix_steps=2" in repr(classifier)
    assert classifier.set_params(mix_steps=1) is classifier and classifier.get_params()["mix_steps"] == 1
    with pytest.raises(ValueError, match="'steps', expected one of model, pool"):
        classifier.set_params(steps=1)


def test_a_failed_fit_leaves_the_last_one_and_a_pickle_predicts(classifier):
    images, labels = pictures({"a": 2, "b": 1})
    assert classifier.fit(images, labels) is classifier
    expected = classifier.predict_proba(images)
    with pytest.raises(ValueError, match="3 images and 2 labels"):
        classifier.fit(images, ["c", "d"])
    assert (classifier.predict_proba(images) == expected).all()
    assert (pickle.loads(pickle.dumps(classifier)).predict_proba(images) == expected).all()
    with pytest.raises(ValueError, match="got 3 images and 1 labels"):
        classifier.score(images, ["a"])


def test_scikit_learn_takes_it(model):
    base = pytest.importorskip("sklearn.base")
    selection = pytest.importorskip("sklearn.model_selection")
    images, labels = pictures({"a": 4, "b": 4})
    plain = FewShotClassifier(model, head_steps=50, head_scale=30)
    copy = base.clone(plain.fit(images, labels))
    assert copy.get_params() == plain.get_params() and not hasattr(copy, "heads_")
    assert base.is_classifier(plain)
    assert len(selection.cross_val_score(plain, images, labels, cv=2)) == 2
    search = selection.GridSearchCV(plain, {"head_scale": [1, 30]}, cv=2).fit(list(images), labels)
    assert search.predict(images).tolist() == search.best_estimator_.predict(images).tolist()


# ---- the command


@pytest.fixture
def label(call, model, two_models, tmp_path):
    """label(*flags) -> status, output, errors of the command, in `tmp_path`: from few/ it learns, more/ it labels."""

    def run(*flags, pool=two_models):
        places = ("--support", tmp_path / "few", "--query", tmp_path / "more", "--save-dir", tmp_path / "run")
        return call(diffusionmix, *places, "--resume", model, "--pool", pool, *FLAGS, *flags)

    return run


def test_the_command_and_the_class_agree(label, classifier, tmp_path):
    images, labels = pictures({"zebra": 3, "ape": 1, "cow, brown": 2}, size=20)
    few = folders(tmp_path / "few", images[::-1], labels[::-1])
    more = folders(tmp_path / "more", *pictures({"deep/er": 2, ".": 3}, seed=1))
    status, out, err = label()
    assert status == 0, err
    rows = rows_of(tmp_path / "run" / "predictions.csv")
    assert list(rows[0]) == ["path", "label", "p_ape", "p_cow, brown", "p_zebra"]
    assert [row["path"] for row in rows] == sorted(map(str, more))
    few.sort()
    classifier.fit(few, [path.parent.name for path in few])
    expected = classifier.predict_proba([row["path"] for row in rows])
    np.testing.assert_allclose(probabilities(rows), expected, atol=1e-6)
    assert [row["label"] for row in rows] == classifier.predict([row["path"] for row in rows]).tolist()
    np.testing.assert_allclose(probabilities(rows).sum(1), 1, atol=3e-6)
    assert re.search("labelled 5 .* 3 classes.* 6", out) and "the 5 most" in out
    with Image.open(tmp_path / "run" / "predictions.png") as sheet:
        assert sheet.format == "PNG" and sheet.width > 900
    assert not (tmp_path / "run" / "own_mixes").exists() and not (tmp_path / "run" / "results.json").exists()
    first = (tmp_path / "run" / "predictions.csv").read_bytes()
    assert label("--out", tmp_path / "new" / "x.csv", "--sample-batch", 3)[0] == 0
    assert (tmp_path / "new" / "x.png").exists()
    close = np.array(
        [[float(row[f"p_{name}"]) for name in classifier.classes_] for row in rows_of(tmp_path / "new" / "x.csv")]
    )
    again = np.array([[float(row[f"p_{name}"]) for name in classifier.classes_] for row in rows])
    np.testing.assert_allclose(close, again, atol=2e-6)
    assert label()[0] == 0 and (tmp_path / "run" / "predictions.csv").read_bytes() == first


def test_the_command_without_mixes_and_with_many_pictures(label, tmp_path, monkeypatch):
    monkeypatch.setattr(own_images, "SHEET", 4)
    folders(tmp_path / "few", *pictures({"a": 1, "b": 2}))
    folders(tmp_path / "more", *pictures({"x": 9}, seed=1))
    status, out, err = label("--mix", "False", pool="no/such/pool")
    assert status == 0 and err == "" and "the 4 most" in out
    assert len(rows_of(tmp_path / "run" / "predictions.csv")) == 9


def test_class_names_that_the_font_lacks(label, tmp_path):
    folders(tmp_path / "few", *pictures({"日本語の本": 1, "b\nc": 2}))
    folders(tmp_path / "more", *pictures({"x": 2}))
    assert label("--mix", "False")[0] == 0
    assert list(rows_of(tmp_path / "run" / "predictions.csv")[0])[2:] == ["p_b\\nc", "p_日本語の本"]


def test_public_checkpoints_as_the_pool(model, two_models, tmp_path):
    checkpoint.save(tmp_path / "bare.pt", checkpoint.load(subset_path(two_models, 1))["model"])
    images, labels = pictures({"a": 2, "b": 1})
    flags = dict(image_size=16, num_heads=1)
    bare = FewShotClassifier(model, tmp_path / "bare.pt", pool_flags=flags, **QUICK).fit(images, labels)
    own = FewShotClassifier(model, subset_path(two_models, 1), **QUICK).fit(images, labels)
    assert (bare.predict_proba(images) == own.predict_proba(images)).all()


def test_damaged_pictures_are_left_out_with_their_reason(label, tmp_path):
    folders(tmp_path / "few", *pictures({"a": 2, "b": 2}))
    more = folders(tmp_path / "more", *pictures({"x": 3}))
    (tmp_path / "few" / "a" / "000.png").write_bytes(b"")
    more[1].write_text("no image")
    status, _, err = label("--mix", "False")
    assert status == 0 and "left out 1 unreadable image(s), the first a/000.png: is empty" in err
    assert "left out 1 unreadable image(s), the first x/001.png: is no image" in err
    assert [row["path"] for row in rows_of(tmp_path / "run" / "predictions.csv")] == [str(more[0]), str(more[2])]
    reasons = {row["path"]: row["reason"] for row in rows_of(tmp_path / "run" / "skipped_images.csv")}
    assert reasons.keys() == {str(tmp_path / "few" / "a" / "000.png"), str(more[1])}


def test_too_little_left_is_said_in_one_line(label, tmp_path):
    few = folders(tmp_path / "few", *pictures({"a": 1, "b": 1}))
    more = folders(tmp_path / "more", *pictures({"x": 1}))
    more[0].write_text("no image")
    assert label()[::2] == (2, f"error: {tmp_path}/more: has no readable image (left out 1 unreadable image(s), the "
                               "first x/000.png: is no image (PNG, JPEG, GIF, WEBP, BMP, DIB, TIFF, PPM, AVIF "
                               "and so on), or damaged from its start); "
                               "expected some to label\n")  # fmt: skip
    few[1].write_text("no image")
    status, _, err = label()
    assert status == 2 and err.startswith(f"error: {tmp_path}/few/b: is a class without a readable image")
    few[1].unlink()
    few[1].parent.rmdir()
    status, _, err = label()
    assert status == 2 and "few: got 1 class, expected 2 or more" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_model_that_ships_labels_where_none_was_trained(label, model, toy_pool, tmp_path, call):
    folders(tmp_path / "few", *pictures({"a": 1, "b": 2}))
    folders(tmp_path / "more", *pictures({"x": 3}, seed=1))
    pool = shutil.copytree(toy_pool, tmp_path / "pool")
    places = (
        "--save-dir",
        tmp_path / "new",
        "--support",
        tmp_path / "few",
        "--query",
        tmp_path / "more",
        "--pool",
        pool,
    )
    assert call(diffusionmix, *places, *FLAGS)[0] == 2  # neither trained nor shipped
    shutil.copyfile(model, pool / "meta_model.pt")
    status, out, err = call(diffusionmix, *places, *FLAGS)
    assert status == 0 and "meta_model.pt" in out, err
    assert len(rows_of(tmp_path / "new" / "predictions.csv")) == 3
