import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.losses import dense_cross_entropy
from models.meta_model import MetaModel, prototype_scores

LABELS = torch.arange(5).repeat(2, 1)
QUERY_LABELS = torch.arange(5).repeat_interleave(2).repeat(2, 1)


def close(actual, expected):
    np.testing.assert_allclose(actual.detach(), expected, rtol=0, atol=1e-4)


@pytest.fixture
def model(fill):
    return fill(MetaModel(20)).eval()


@pytest.fixture
def images(arr):
    return arr(11, 2, 5, 3, 64, 64), arr(12, 2, 10, 3, 64, 64)


def test_names(meta_keys):
    assert [[k, list(v.shape)] for k, v in MetaModel(20).state_dict().items()] == meta_keys["meta_model_conv4"]


@torch.no_grad()
def test_golden_eval(meta_goldens, model, images, arr):
    support, query = images
    close(model.scores(support, LABELS, query, 5), meta_goldens["meta_model/eval_scores"])
    five = model.scores(arr(13, 1, 25, 3, 64, 64), torch.arange(25)[None] % 5, query[:1], 5)
    # Means taken after normalisation are 4e-5 away.
    np.testing.assert_allclose(five, meta_goldens["meta_model/eval_scores_5shot"], rtol=0, atol=1e-5)
    close(model.embed(query[0]), meta_goldens["meta_model/embeddings"])


@torch.no_grad()
def test_golden_train(meta_goldens, model, images):
    logits, scores = model.train()(images[0], LABELS, images[1], 5)
    close(logits, meta_goldens["meta_model/train_logits"])
    close(scores, meta_goldens["meta_model/train_scores"])
    close(dense_cross_entropy(scores, QUERY_LABELS), meta_goldens["dense_cross_entropy"])


@torch.no_grad()
def test_scores_follow_from_embeddings(model, images):
    embeddings = [model.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in images]
    torch.testing.assert_close(
        prototype_scores(embeddings[0], LABELS, embeddings[1], 5, 7), model.scores(images[0], LABELS, images[1], 5)
    )


@torch.no_grad()
def test_eval_scores_are_inductive(model, images):
    support, query = images
    expected = model.scores(support, LABELS, query, 5)
    changed = query.clone()
    changed[:, 1:] = 3
    assert torch.equal(model.scores(support, LABELS, changed, 5)[:, 0], expected[:, 0])
    single = model.scores(support[1:], LABELS[1:], query[1:, 3:4], 5)  # alone, sums may round otherwise
    torch.testing.assert_close(single, expected[1:, 3:4], rtol=0, atol=1e-5)


def test_prototype_scores_by_hand():
    support = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 1.0]]])
    query = torch.tensor([[[3.0, 4.0]]])
    scores = prototype_scores(support, torch.tensor([[1, 0, 1, 0]]), query, 2, 10)
    torch.testing.assert_close(scores, torch.tensor([[[8.0, 6.0]]]))


def test_dense_cross_entropy_is_the_mean_over_locations():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(6, 5, 3, 2, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = torch.stack([F.cross_entropy(scores[:, :, i, j], labels) for i in range(3) for j in range(2)]).mean()
    torch.testing.assert_close(dense_cross_entropy(scores, labels), expected)


def test_both_losses_reach_the_backbone(model, images):
    logits, scores = model.train()(images[0], LABELS, images[1], 5)
    loss = F.cross_entropy(logits, torch.arange(20)) + 0.5 * dense_cross_entropy(scores, QUERY_LABELS)
    loss.backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert "base.layers.0.layers.0.weight" in used and "classifier.linear2.weight" in used
    assert not any("time_embed" in name for name in used)


@torch.no_grad()
def test_heads_and_cosines_stay_in_float32_under_autocast(model, images):
    support, query = images
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [model.scores(support, LABELS, query, 5), *model(support, LABELS, query, 5), model.embed(query[0])]
        learned = model.classifier(outputs[-1], torch.arange(10))
        inside = prototype_scores(outputs[-1][None], QUERY_LABELS[:1], outputs[-1][None], 5, 7)
    assert all(x.dtype == torch.float32 for x in [*outputs, learned])
    assert torch.equal(inside, prototype_scores(outputs[-1][None], QUERY_LABELS[:1], outputs[-1][None], 5, 7))


@torch.no_grad()
def test_resnet12_backbone():
    model = MetaModel(20, backbone="resnet12", drop_rate=0.1).eval()
    assert model.feature_dim == 512
    embeddings = model.embed(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))
    assert model.classifier(embeddings).shape == (2, 20)


def test_wrong_inputs_are_refused(images):
    support, query = images
    model = MetaModel(20).eval()
    cases = [
        (lambda: model.embed(torch.zeros(3, 64, 64)), r"\(3, 64, 64\) float32, expected \(N, 3, H, W\)"),
        (lambda: model.embed(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)), "uint8, expected"),
        (lambda: model.scores(support, LABELS, query, 1), "way is 1, expected at least 2"),
        (lambda: model.scores(support, LABELS, query, 6), r"labels do not cover 0\.\.5"),
        (lambda: model.scores(support, LABELS, query, 4), r"labels do not cover 0\.\.3"),
        (lambda: model.scores(support, LABELS[0], query, 5), r"support labels are \(5,\)"),
        (lambda: model.scores(support, LABELS, query[0], 5), r"\(E, Q, 3, H, W\)"),
        (lambda: model.train().scores(support, LABELS, query, 5), "eval mode"),
        (lambda: MetaModel(20, backbone="vgg"), "'vgg', expected one of conv4, resnet12"),
        (lambda: MetaModel(20, drop_rate=0.1), "DropBlock is only in resnet12"),
        (lambda: dense_cross_entropy(torch.zeros(4, 5, 2, 2), torch.zeros(3).long()), "with 3 labels"),
        (lambda: prototype_scores(torch.zeros(2, 5, 8), LABELS, torch.zeros(2, 3, 9), 5, 7), r"expected \(2, Q, 8\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
