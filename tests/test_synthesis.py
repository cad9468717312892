"""Drawing a round's images."""

import pytest
import torch

import guided_diffusion.synthesis as synthesis
from guided_diffusion.pool import Pool
from guided_diffusion.synthesis import Synthesis, synthesise
from models.class_learner import ClassLearner
from models.guides import class_learner_guide
from models.meta_model import MetaModel

CPU = torch.device("cpu")


def plan(**changes):
    return Synthesis(**{**dict(classes=[4] * 2, per_class=2, steps=3, size=16, seed=1, stream=0), **changes})


def guide(classes=8):
    rng = torch.Generator().manual_seed(5)
    return class_learner_guide(MetaModel(classes, generator=rng), ClassLearner(classes, 64, generator=rng))


def levels(a, b):
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("how", [dict(guide_on="x_t"), dict(guide_on="x_0", renoise=0.6)])
def test_images_do_not_depend_on_the_batch(two_models, how):
    pool, log_p = Pool(two_models), guide()
    small, labels, hits = synthesise(pool, plan(batch=3, **how), CPU, log_p)
    large, labels_7, hits_7 = synthesise(pool, plan(batch=7, **how), CPU, log_p)
    assert levels(small, large) <= 1 and torch.equal(labels, labels_7)
    assert hits.shape == (16,) and hits.dtype == torch.bool and (hits != hits_7).sum() <= 1
    assert small.dtype == torch.uint8 and small.shape == (16, 3, 16, 16)
    assert torch.equal(labels, torch.arange(8).repeat_interleave(2))


@pytest.mark.parametrize("guide_on", ["x_t", "x_0"])
def test_a_guide_sees_images_of_the_size_it_learns_from(two_models, guide_on):
    seen = []

    def log_p(x, t):
        seen.append(x.shape[-1])
        return (x.mean((1, 2, 3))[:, None] * torch.arange(8.0)).log_softmax(1)

    images, _, _ = synthesise(Pool(two_models), plan(size=32, guide_on=guide_on), CPU, log_p)  # models of 16 pixels
    assert images.shape[-1] == 32 and set(seen) == {32}


def test_memory_of_the_guide_counts(two_models, monkeypatch):
    asked, room = [], Pool.room
    monkeypatch.setattr(Pool, "room", lambda *a, other, **more: asked.append(other) or room(*a, other=other, **more))
    synthesise(Pool(two_models), plan(), CPU)
    synthesise(Pool(two_models), plan(), CPU, guide())
    of_a_map = 16 * 16 * 64 * 4  # side, side, channels, bytes, of the first of four blocks
    assert asked[:2] == [0, 0] and all(of_a_map < other < 20 * of_a_map for other in asked[2:]) and len(asked) == 4


def test_seed_stream_and_model_matter(two_models):
    pool = Pool(two_models)
    first, _, hits = synthesise(pool, plan(), CPU)
    assert hits is None
    assert torch.equal(first, synthesise(pool, plan(), CPU)[0])
    assert levels(first, synthesise(pool, plan(seed=2), CPU)[0]) > 20
    assert levels(first, synthesise(pool, plan(stream=1), CPU)[0]) > 20
    assert levels(first[:8], first[8:16]) > 20  # models of equal weights, other noise
    fresh = synthesise(pool, plan(renoise=0.5), CPU)[0]
    assert torch.equal(fresh, synthesise(pool, plan(renoise=0.5), CPU)[0]) and levels(first, fresh) > 20


def test_guidance_changes_images_and_zero_scale_does_not(two_models):
    pool, log_p = Pool(two_models), guide()
    plain = synthesise(pool, plan(), CPU)[0]
    assert levels(plain, synthesise(pool, plan(scale=0.0), CPU, log_p)[0]) <= 1
    assert levels(plain, synthesise(pool, plan(scale=5000.0), CPU, log_p)[0]) > 20


def test_asked_for_classes_of_choice(two_models):
    pool, log_p = Pool(two_models), guide()
    usual, labels, _ = synthesise(pool, plan(scale=500.0), CPU, log_p)
    wanted = labels.clone()
    wanted[1] = 3  # from class 0 of the same model
    images, asked, hits = synthesise(pool, plan(scale=500.0), CPU, log_p, wanted)
    assert torch.equal(asked, wanted) and hits.shape == (16,)
    assert levels(usual[1], images[1]) > 20  # another class from the same noise
    assert levels(usual[:1], images[:1]) <= 1 and levels(usual[2:], images[2:]) <= 1
    assert plan().first_of(torch.tensor([0, 3, 4, 7])).tolist() == [0, 0, 4, 4]


def test_every_model_draws_its_own_classes(paint_pool):
    images, labels, _ = synthesise(Pool(paint_pool), plan(classes=[4, 1, 4, 3, 2]), CPU)
    assert plan(classes=[4, 1, 4, 3, 2]).first_class(3) == 9
    owner = torch.tensor([0] * 4 + [1] + [2] * 4 + [3] * 3 + [4] * 2)[labels]
    grey = images.float().mean((1, 2, 3)) / 127.5 - 1
    torch.testing.assert_close(grey, -0.8 + 0.4 * owner.float(), atol=0.01, rtol=0)


def test_models_of_other_sizes_come_out_at_one_size(make_pool, tmp_path):
    make_pool(tmp_path, [2, 2], lambda network, m: None)
    make_pool(tmp_path / "large", [2], image_size=32)
    (tmp_path / "large" / "subset1").rename(tmp_path / "subset3")
    images, labels, _ = synthesise(Pool(tmp_path), plan(classes=[2, 2, 2], size=24), CPU)
    assert images.shape == (12, 3, 24, 24) and labels.tolist() == [c for c in range(6) for _ in range(2)]


def test_bf16_is_close_to_float32(two_models):
    pool, log_p = Pool(two_models), guide()
    exact, half = (synthesise(pool, plan(precision=p), CPU, log_p)[0].float() for p in ("float32", "bf16"))
    assert float((exact - half).abs().mean()) < 12
    assert float((exact - half).abs().max()) > 0


def test_bf16_weights_draw_nearly_the_same(two_models):
    exact = synthesise(Pool(two_models), plan(), CPU)[0].float() / 127.5
    for batch in (3, 8):
        rough = synthesise(Pool(two_models), plan(precision="bf16", batch=batch), CPU)[0].float() / 127.5
        assert 0 < float((exact - rough).abs().mean()) < 0.02  # on [-1, 1]


def test_too_little_memory_changes_no_image(two_models, monkeypatch, capsys):
    expected, real = synthesise(Pool(two_models), plan(batch=8), CPU)[0], synthesis.sample

    def small_machine(network, process, x_t, **options):
        if len(x_t) > 4:
            raise torch.cuda.OutOfMemoryError("full")
        return real(network, process, x_t, **options)

    monkeypatch.setattr(synthesis, "sample", small_machine)
    assert levels(expected, synthesise(Pool(two_models), plan(batch=8), CPU)[0]) <= 1
    assert "out of memory: going on with batches of 4" in capsys.readouterr().err
