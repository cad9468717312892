import numpy as np
import pytest
import torch

from models.resnet12 import drop_block, resnet12


def test_names(meta_keys):
    assert [[k, list(v.shape)] for k, v in resnet12().state_dict().items()] == meta_keys["resnet12"]


@pytest.mark.parametrize(("key", "seed", "n", "size"), [("features", 15, 2, 64), ("features84", 16, 1, 84)])
@torch.no_grad()
def test_golden(meta_goldens, fill, arr, key, seed, n, size):
    features = fill(resnet12(drop_rate=0.3)).eval()(arr(seed, n, 3, size, size))
    np.testing.assert_allclose(features, meta_goldens[f"resnet12/{key}"], rtol=0, atol=1e-4)


def test_drop_block_drops_whole_blocks_at_the_rate_and_keeps_the_mean():
    x = torch.ones(64, 32, 20, 20)
    out = drop_block(x, 0.1, 5, torch.Generator().manual_seed(0))
    assert out.mean().item() == pytest.approx(1, abs=1e-5)
    share = (out == 0).float().mean().item()
    # Blocks fall independently; overlap makes the share a little smaller than the rate.
    assert 0.085 < share < 0.1
    # Opening by a 5x5 square leaves the dropped set as it is exactly if it is a union of 5x5 squares.
    dropped = (out == 0).float()
    eroded = -torch.nn.functional.max_pool2d(-dropped, 5, stride=1)
    opened = torch.nn.functional.max_pool2d(torch.nn.functional.pad(eroded, [4] * 4), 5, stride=1)
    assert torch.equal(opened, dropped)


def test_drop_block_on_a_map_smaller_than_a_block_drops_whole_channels():
    out = drop_block(torch.ones(100, 50, 4, 4), 0.2, 5, torch.Generator().manual_seed(0))
    dropped = (out == 0).flatten(2)
    assert torch.equal(dropped.any(-1), dropped.all(-1))
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_drop_block_follows_its_generator_in_train_mode():
    model = resnet12(drop_rate=0.3).train()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def features(seed):
        model.generator = torch.Generator().manual_seed(seed)
        return model(images)

    assert torch.equal(features(0), features(0))
    assert not torch.equal(features(0), features(1))


@pytest.mark.parametrize("options", [{"drop_rate": 1.0}, {"drop_rate": -0.1}, {"drop_block_size": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        resnet12(**options)
