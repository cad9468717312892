"""What each augmentation does to the numbers of an image."""

import math
from dataclasses import replace

import pytest
import torch

from datasets.augment import AugmentSettings, augment
from utils.images import to_float
from utils.seeding import generator, noise

COLOURS = dict.fromkeys(("brightness", "contrast", "saturation", "hue", "grayscale"), 0.0)
IDENTITY = AugmentSettings(
    crop_padding=0.0, scale=(1.0, 1.0), aspect=1.0, rotate=0.0, flip=False, erase=0.0, **COLOURS
)  # changes nothing
LUMA = torch.tensor([0.299, 0.587, 0.114])


def pictures(count=64, size=8, reach=0.3):
    return (noise((3, size, size), range(count), 0, "pictures") * reach).clamp(-1, 1)


def run(images, seed=0, **settings):
    return augment(images, generator(seed, "augment"), replace(IDENTITY, **settings))


def test_identity():
    images = pictures(reach=1.0)
    assert torch.equal(run(images), images)
    pixels = torch.arange(192, dtype=torch.uint8).reshape(1, 3, 8, 8)
    assert torch.equal(run(pixels), to_float(pixels))


def test_the_crop_map_of_nothing_is_the_identity():
    """A turn of at most 1e-6 degrees takes the sampling path and must land on the pixels themselves."""
    images = pictures(size=9)
    torch.testing.assert_close(run(images, rotate=1e-6), images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [8, 32])
def test_deterministic_bounded_and_different_an_image(size):
    images = torch.cat([pictures(8, size, 1.0), pictures(1, size, 1.0).expand(600, -1, -1, -1)])
    first = augment(images, generator(1), AugmentSettings())
    assert first.dtype == torch.float32 and first.shape == images.shape
    assert torch.equal(first, augment(images, generator(1), AugmentSettings()))
    assert not torch.equal(first, augment(images, generator(2), AugmentSettings()))
    assert first.abs().max() <= 1 and first.isfinite().all()
    assert len(first[8:].flatten(1).unique(dim=0)) == 600


def test_flip_mirrors_half():
    images = pictures(400)
    out = run(images, flip=True)
    kept = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert abs(int(mirrored.sum()) - 200) < 50  # 5 standard deviations


def test_brightness_scales_from_black():
    images = pictures()
    out = run(images, brightness=0.4)
    factor = ((out + 1) / (images + 1)).flatten(1).nanmedian(1).values  # few are clipped, and black gives 0 / 0
    expected = (images + 1) * factor[:, None, None, None] - 1
    torch.testing.assert_close(out, expected.clamp(-1, 1), atol=1e-4, rtol=0)
    assert 0.6 <= factor.min() < 0.7 and 1.3 < factor.max() <= 1.4


def test_contrast_keeps_the_mean_luma():
    images = pictures(reach=0.2)
    out = run(images, contrast=0.4)
    mean = images.mean((2, 3)) @ LUMA
    torch.testing.assert_close(out.mean((2, 3)) @ LUMA, mean, atol=1e-5, rtol=0)
    ratio = (out - mean[:, None, None, None]) / (images - mean[:, None, None, None])
    factor = ratio.flatten(1).median(1).values
    torch.testing.assert_close(
        out, mean[:, None, None, None] + factor[:, None, None, None] * (images - mean[:, None, None, None]),
        atol=1e-4, rtol=0,
    )  # fmt: skip
    assert 0.6 <= factor.min() < 0.7 and 1.3 < factor.max() <= 1.4


def test_brightness_before_contrast():
    """Grey v becomes f * u however the contrast is set, as its mean is itself."""
    grey = torch.full((32, 3, 4, 4), 0.2)
    torch.testing.assert_close(run(grey, brightness=0.3, contrast=0.5), run(grey, brightness=0.3), atol=1e-5, rtol=0)


def test_saturation_keeps_luma_and_grey():
    images = pictures(reach=0.2)
    luma = torch.einsum("nchw,c->nhw", images, LUMA)
    out = run(images, saturation=0.4)
    torch.testing.assert_close(torch.einsum("nchw,c->nhw", out, LUMA), luma, atol=1e-5, rtol=0)
    assert not torch.allclose(out, images, atol=0.01)
    assert torch.allclose(run(images, grayscale=1.0), luma[:, None].expand_as(images), atol=1e-5)


def test_hue_turns_around_grey():
    images = pictures(reach=0.1)
    out = run(images, hue=0.5)
    torch.testing.assert_close(out.mean(1), images.mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.square().sum(1), images.square().sum(1), atol=1e-5, rtol=0)
    a, b = (x - x.mean(1, keepdim=True) for x in (images, out))
    cosine = ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-9)).flatten(1)
    assert (cosine.max(1).values - cosine.min(1).values).max() < 1e-2  # one angle an image
    assert cosine.mean(1).min() < -0.9 and cosine.mean(1).max() > 0.9
    few = run(images, hue=0.05)
    b = few - few.mean(1, keepdim=True)
    assert ((a * b).sum(1).sum((1, 2)) / a.square().sum((1, 2, 3))).min() > math.cos(0.1 * math.pi) - 1e-4


def test_grayscale_share():
    images = pictures(400)
    grey = run(images, grayscale=0.3).std(1).flatten(1).amax(1) < 1e-5
    assert abs(int(grey.sum()) - 120) < 46


def test_erase_is_one_rectangle_of_one_colour():
    images = pictures(400, 16)
    changed = (run(images, erase=0.5, erase_area=(0.1, 0.2)) != images).any(1)  # (N, H, W)
    hit = changed.flatten(1).any(1)
    assert abs(int(hit.sum()) - 200) < 50
    rows, columns = changed.any(2), changed.any(1)
    assert torch.equal(changed, rows[:, :, None] & columns[:, None, :])
    assert ((rows.diff(dim=1).int().abs().sum(1)) <= 2).all()  # one run of rows
    share = changed[hit].float().mean((1, 2))
    assert 0.06 < share.min() and share.max() < 0.27 and abs(share.mean().item() - 0.15) < 0.02
    assert rows[:, 0].any() and rows[:, -1].any() and columns[:, 0].any() and columns[:, -1].any()
    out = run(images, erase=1.0)
    index = 3
    where = (out[index] != images[index]).any(0)
    assert out[index][:, where].std(1).max() < 1e-6


def ramp(size=16):
    """x grows by 1 / size a pixel along the columns in red and along the rows in green."""
    steps = (torch.arange(size) + 0.5) / size * 2 - 1  # the pixel centres
    red, green = steps.expand(size, size), steps[:, None].expand(size, size)
    return torch.stack([red, green, torch.zeros(size, size)])


def test_crop_takes_a_rectangle_inside_the_image():
    images = ramp().expand(300, -1, -1, -1)
    out = run(images, scale=(0.25, 0.64))
    across = (out[:, 0, :, -5] - out[:, 0, :, 4]) / (images[:, 0, :, -5] - images[:, 0, :, 4])  # share of the width
    down = (out[:, 1, -5] - out[:, 1, 4]) / (images[:, 1, -5] - images[:, 1, 4])
    torch.testing.assert_close(across[:, :1].expand_as(across), across, atol=1e-4, rtol=0)
    torch.testing.assert_close(down[:, 0], across[:, 0], atol=1e-4, rtol=0)  # a square
    area = across[:, 0] * down[:, 0]
    assert 0.249 < area.min() < 0.28 and 0.6 < area.max() < 0.641
    stretched = run(images, scale=(0.25, 0.25), aspect=2.0)
    across = (stretched[:, 0, 8, -5] - stretched[:, 0, 8, 4]) / (images[:, 0, 8, -5] - images[:, 0, 8, 4])
    down = (stretched[:, 1, -5, 8] - stretched[:, 1, 4, 8]) / (images[:, 1, -5, 8] - images[:, 1, 4, 8])
    torch.testing.assert_close(across * down, torch.full_like(across, 0.25), atol=1e-3, rtol=0)
    assert 0.5 <= (across / down).min() < 0.55 and 1.8 < (across / down).max() <= 2.001


def test_padding_shifts_by_at_most_its_share():
    images = ramp().expand(400, -1, -1, -1)
    out = run(images, crop_padding=0.25)
    shift = out[:, :2, 8, 8] - images[:, :2, 8, 8]
    for axis in range(2):
        assert 0.47 < shift[:, axis].abs().max() < 0.501  # a quarter of a side that spans 2
    assert abs(shift.mean().item()) < 0.06


def test_rotation_turns_by_at_most_its_angle():
    images = ramp(17).expand(300, -1, -1, -1)
    out = run(images, rotate=30)
    right = out[:, :2, 8, 10] - out[:, :2, 8, 8]  # where a step to the right leads
    angle = torch.atan2(right[:, 1], right[:, 0]) * 180 / math.pi
    torch.testing.assert_close(right.norm(dim=1), torch.full((300,), 4 / 17), atol=1e-4, rtol=0)
    assert angle.abs().max() <= 30.01 and angle.min() < -28 and angle.max() > 28


@pytest.mark.parametrize(
    "bad",
    [{"erase": 1.5}, {"scale": (0.5, 0.2)}, {"scale": (0.0, 1.0)}, {"aspect": 0.5}, {"hue": 0.6}, {"brightness": -1}],
)
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match=f"got {next(iter(bad))}") as caught:
        AugmentSettings(**bad)
    assert "\n" not in str(caught.value)
