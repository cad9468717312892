import pytest
import torch

from models.conv4 import Conv4


@pytest.mark.parametrize(("size", "side"), [(32, 2), (64, 4), (84, 5)])
def test_map_is_a_sixteenth(size, side):
    assert Conv4().eval()(torch.zeros(2, 3, size, size)).shape == (2, 64, side, side)


def test_names(meta_keys):
    expected = [(name, shape) for name, shape in meta_keys["meta_model_conv4"] if name.startswith("base.")]
    assert [(f"base.{k}", list(v.shape)) for k, v in Conv4().state_dict().items()] == expected


def test_initial_weights_come_from_the_generator_and_keep_the_scale():
    first, second = (Conv4(generator=torch.Generator().manual_seed(3)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    weight = first["layers.3.layers.0.weight"]
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_small_images_are_refused():
    with pytest.raises(ValueError, match="15x20 images, expected sides of at least 16"):
        Conv4()(torch.zeros(1, 3, 15, 20))
