"""Labels and pixel ranges as people give them to `FewShotClassifier`: taken right, or refused in one line."""

import numpy as np
import pytest
import torch

from few_shot import FewShotClassifier
from tests.test_few_shot import pictures


@pytest.fixture
def model(trained):
    return trained / "best_model.pt"


@pytest.fixture
def plain(model):
    return FewShotClassifier(model, head_steps=50, head_scale=30)


@pytest.fixture(scope="module")
def fitted(trained):
    """Fitted on three images each of the classes 0, 1 and 2; with the images, and with what it predicts of them."""
    images, labels = pictures({0: 3, 1: 3, 2: 3})
    classifier = FewShotClassifier(trained / "best_model.pt", head_steps=50, head_scale=30).fit(images, labels)
    return classifier, images, classifier.predict(images)


def refused(function, *given, names):
    """Check that a call is refused in one line that holds all of `names`."""
    with pytest.raises(ValueError) as error:
        function(*given)
    text = str(error.value)
    assert "\n" not in text and all(name in text for name in names), text


def column(values):
    return np.array(values)[:, None]


# ---- labels

SHAPES = {
    "list": list,
    "floats": lambda y: [float(v) for v in y],
    "array": np.array,
    "column": column,
    "column of floats": lambda y: column(y).astype(float),
    "list of lists": lambda y: [[v] for v in y],
    "numbers of NumPy": lambda y: [np.int64(v) for v in y],
    "arrays of one": lambda y: [np.array([v]) for v in y],
    "tensor": torch.tensor,
    "tensor column": lambda y: torch.tensor(y)[:, None],
    "tensors": lambda y: [torch.tensor(v) for v in y],
    "tensors of one": lambda y: [torch.tensor([v]) for v in y],
    "objects": lambda y: np.array(y, object),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_in_any_shape_of_one_an_image_are_the_same_labels(fitted, model, shape):
    classifier, images, found = fitted
    mixed = [0, 2, 1, 1, 1, 0, 2, 2, 0]
    right = sum(int(a) == b for a, b in zip(found, mixed, strict=True)) / 9
    assert classifier.score(images, SHAPES[shape](found.tolist())) == 1.0
    assert classifier.score(images, SHAPES[shape](mixed)) == right
    again = FewShotClassifier(model, head_steps=50, head_scale=30)
    again.fit(images, SHAPES[shape]([0] * 3 + [1] * 3 + [2] * 3))
    assert again.classes_.tolist() == [0, 1, 2] and again.predict(images).tolist() == found.tolist()


ONE_HOT = {
    "array": np.eye(3, dtype=int).repeat(3, 0),
    "tensor": torch.eye(3).repeat_interleave(3, 0),
    "lists": np.eye(3, dtype=int).repeat(3, 0).tolist(),
    "two columns": np.eye(2).repeat([4, 5], 0),
    "three axes": np.zeros((9, 1, 2)),
    "rows in a list": list(np.eye(3).repeat(3, 0)),
    "none in it": np.zeros((9, 0)),
}


@pytest.mark.parametrize("kind", ONE_HOT)
def test_one_hot_labels_are_refused(fitted, plain, kind):
    classifier, images, _ = fitted
    refused(classifier.score, images, ONE_HOT[kind], names=["argmax(1)"])
    refused(plain.fit, images, ONE_HOT[kind], names=["argmax(1)"])


@pytest.mark.parametrize(
    "given, names",
    [
        (list("012012012"), ["text", "number"]),
        (np.array(list("012012012")), ["text", "number"]),
        ([b"0"] * 9, ["bytes", "number"]),
        ([0] * 8 + ["0"], ["text", "number"]),
        ([None] * 9, ["NoneType", "number"]),
        ([0] * 8 + [np.nan], ["NaN"]),
        (np.ma.array([0] * 9, mask=[0] * 8 + [1]), ["NoneType"]),
        ({i: 0 for i in range(9)}, ["dict"]),
        (set(range(9)), ["set"]),
        (frozenset(range(9)), ["frozenset"]),
        (np.array(3), ["labels"]),
        ([(0, 1)] * 9, ["tuple", "number"]),
    ],
    ids=str,
)
def test_score_refuses_labels_that_none_predicted_can_equal(fitted, given, names):
    classifier, images, _ = fitted
    refused(classifier.score, images, given, names=names)


def test_score_counts_a_class_that_was_not_learnt_as_wrong(fitted):
    classifier, images, found = fitted
    assert classifier.score(images, [7, *found[1:]]) == pytest.approx(8 / 9)
    assert classifier.score(images, [7] * 9) == 0


def test_score_of_texts_refuses_numbers(plain):
    images, labels = pictures({"0": 2, "1": 2})
    plain.fit(images, labels)
    refused(plain.score, images, [0, 0, 1, 1], names=["number", "text"])
    assert plain.score(images, np.array(plain.predict(images))[:, None]) == 1.0


@pytest.mark.parametrize("given", [{"a": 0, "b": 1}, {"a", "b"}, np.array("a")], ids=["mapping", "set", "array"])
def test_fit_refuses_what_has_no_order(plain, given):
    images, _ = pictures({"a": 1, "b": 1})
    refused(plain.fit, images, given, names=["labels"])
    if not isinstance(given, np.ndarray):
        refused(plain.fit, given, [0, 1], names=["images"])


def test_fit_refuses_measurements(plain):
    """Numbers that differ for every image, as in a regression, are no classes; a few fractions are."""
    images, _ = pictures({0: 6})
    refused(plain.fit, images, np.linspace(0.1, 0.9, 6), names=["text"])
    assert plain.fit(images, [0.5, 0.5, 1.5, 1.5, 2.5, 2.5]).classes_.tolist() == [0.5, 1.5, 2.5]


def test_huge_numbers_and_texts_with_zero_bytes_stay_what_they_are(plain):
    images, _ = pictures({0: 4})
    for labels in ([2**63, -1, -1, 2**63], ["a\0", "a", "a", "a\0"], [2**53 + 1, 2**53, 5, 5]):
        assert plain.fit(images, labels).classes_.tolist() == sorted(set(labels))


def test_tables_of_pandas(fitted):
    pandas = pytest.importorskip("pandas")
    classifier, images, found = fitted
    table = pandas.DataFrame({"y": found})
    for given in (table, table["y"], table["y"].astype("category")):
        assert classifier.score(images, given) == 1.0
    refused(classifier.score, images, table["y"].astype("Int64").mask(table.index == 0), names=["missing"])


def test_scikit_learn_gives_the_same(fitted):
    """Its accuracy where it has one, its refusal where it refuses."""
    metrics = pytest.importorskip("sklearn.metrics")
    classifier, images, found = fitted
    for given in (column(found), [0, 2, 1] * 3, np.eye(3, dtype=int)[found], found.astype(str), found.astype(float)):
        try:
            expected = metrics.accuracy_score(given, found)
        except ValueError:
            with pytest.raises(ValueError):
                classifier.score(images, given)
        else:
            assert classifier.score(images, given) == expected


# ---- the range of floats


@pytest.fixture
def floats():
    """Images as uint8, as floats in [0, 1] and as floats in [-1, 1], and their labels."""
    images, labels = pictures({"a": 3, "b": 3})
    unit = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    return images, unit, unit * 2 - 1, labels


def as_list(x):
    return list(x)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, as_list, np.float64, lambda x: torch.tensor(x).half()])
def test_floats_without_a_negative_value_are_refused_where_the_range_was_not_said(plain, floats, kind):
    images, unit, whole, labels = floats
    names = ["[-1, 1]", "[0, 1]", "value_range=(0, 1)", "value_range=(-1, 1)"]
    refused(plain.fit, kind(unit), labels, names=names)
    plain.fit(images, labels)
    refused(plain.predict, kind(unit), names=names)
    refused(plain.predict_proba, kind(unit[:1]), names=names)
    refused(plain.score, kind(unit), labels, names=names)
    refused(plain.predict, [images[0], *unit], names=names)  # of these some are no floats
    assert plain.predict(kind(whole)).tolist() == plain.predict(images).tolist()


def test_the_range_can_be_said(plain, floats):
    images, unit, whole, labels = floats
    expected = plain.fit(images, labels).predict_proba(images)
    for value_range, given in (((0, 1), unit), ([0, 1], unit), ((0.0, 1.0), torch.tensor(unit)), ((-1, 1), whole)):
        plain.set_params(value_range=value_range)
        np.testing.assert_array_equal(plain.fit(given, labels).predict_proba(given), expected)
        np.testing.assert_array_equal(plain.predict_proba(images), expected)  # uint8 has one range
    bright = plain.set_params(value_range=None).fit(images, labels).predict_proba((images // 2 + 128)[:1])
    plain.set_params(value_range=(-1, 1))
    given = to_signed((images // 2 + 128)[:1])
    assert given.min() >= 0
    np.testing.assert_array_equal(plain.predict_proba(given), bright)


def to_signed(images):
    return images.transpose(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize(
    "value_range, low, high",
    [(None, -1.5, 1), (None, -1, 1.2), (None, 0, 255), ((-1, 1), -1, 2), ((0, 1), -0.5, 1), ((0, 1), 0, 1.5),
     ((0, 1), 0, 255), (None, np.nan, 1), ((0, 1), np.nan, 1), ((-1, 1), np.nan, 1), (None, -np.inf, 1),
     ((0, 1), 0, np.inf)],
)  # fmt: skip
def test_floats_outside_of_the_range_are_refused(plain, floats, value_range, low, high):
    images, _, _, labels = floats
    given = np.linspace(-0.9 if value_range != (0, 1) else 0.1, 0.9, 6 * 3 * 16 * 16).reshape(6, 3, 16, 16)
    given[4, 0, 0, 0], given[4, 0, 0, 1] = low, high
    plain.fit(images, labels).set_params(value_range=value_range)
    refused(plain.predict, given, names=["image number 4", "[0, 1]" if value_range == (0, 1) else "[-1, 1]"])
    refused(plain.fit, given, labels, names=["image number 4"])


@pytest.mark.parametrize("value_range", [(0, 255), (1, 0), 1, "01", (0, 0.5, 1), (-1, np.nan)])
def test_another_range_is_refused(plain, floats, value_range):
    images, *_, labels = floats
    refused(plain.set_params(value_range=value_range).fit, images, labels, names=["value_range", "(0, 1)", "(-1, 1)"])


def test_the_range_is_a_parameter(model):
    classifier = FewShotClassifier(model, value_range=(0, 1))
    assert classifier.get_params()["value_range"] == (0, 1) and "value_range=(0, 1)" in repr(classifier)
    base = pytest.importorskip("sklearn.base")
    assert base.clone(classifier).get_params() == classifier.get_params()
