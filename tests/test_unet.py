"""The U-Net: golden outputs, names and order of its state dict, attention, checkpointing, dtypes."""

import json

import numpy as np
import pytest
import torch

from guided_diffusion.nn import normalization, timestep_embedding
from guided_diffusion.script_util import create_model, create_model_and_diffusion
from guided_diffusion.unet import AttentionBlock, ResBlock

SMALL = dict(image_size=32, num_channels=16, num_res_blocks=1, channel_mult="1,2", attention_resolutions="16")
ADM = dict(num_channels=256, num_res_blocks=2, class_cond=True, num_classes=1000, learn_sigma=True)
ADM |= dict(resblock_updown=True, num_head_channels=64, attention_resolutions="32,16,8")


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Noise on every parameter, so that no branch is left at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("name", ["uncond64", "classcond32"])
def test_golden_output_and_state_dict(name, goldens, fill, arr):
    case = json.loads((goldens / "guided_diffusion.json").read_text())[name]
    model, _ = create_model_and_diffusion(**case["config"])
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == case["keys"]
    fill(model).eval()
    size = case["config"]["image_size"]
    t = torch.tensor(case["t"])
    y = torch.tensor(case["y"]) if case["y"] else None
    with torch.no_grad():
        output = model(arr(case["input_seed"], len(t), 3, size, size), t, y)
    expected = np.load(goldens / "guided_diffusion.npz")[f"{name}/output"]
    np.testing.assert_allclose(output.numpy(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("flags", "millions"),
    [
        (ADM | dict(image_size=64, num_channels=192, num_res_blocks=3), 296),
        (ADM | dict(image_size=128, num_head_channels=-1, num_heads=4), 422),
        (ADM | dict(image_size=256), 554),
        (ADM | dict(image_size=512), 559),
    ],
)
def test_parameter_counts_of_the_published_networks(flags, millions):
    """ADM (arXiv 2105.05233), tables of hyperparameters: sizes of the four ImageNet networks."""
    with torch.device("meta"):
        model = create_model(**flags)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_resblock_updown_names():
    keys = create_model(**SMALL, resblock_updown=True).state_dict()
    assert "input_blocks.2.0.in_layers.2.weight" in keys and "input_blocks.2.0.op.weight" not in keys
    assert "output_blocks.1.2.in_layers.2.weight" in keys and "output_blocks.1.2.conv.weight" not in keys
    assert not any("upd" in key for key in keys)


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_against_plain_softmax(new_order):
    heads, width, height, depth = 3, 4, 5, 8
    block = randomised(AttentionBlock(heads * depth, heads, new_order=new_order)).double()
    x = torch.randn(2, heads * depth, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        actual = block(x)
        tokens = block.norm(x).reshape(2, heads * depth, -1)
        qkv = torch.einsum("oc,nct->not", block.qkv.weight[..., 0], tokens) + block.qkv.bias[:, None]
        mixed = torch.zeros_like(tokens)
        for head in range(heads):
            if new_order:  # all q, all k, all v
                starts = [part * heads * depth + head * depth for part in range(3)]
            else:  # q, k, v of the first head, then of the next
                starts = [(head * 3 + part) * depth for part in range(3)]
            q, k, v = (qkv[:, start : start + depth] for start in starts)
            weights = torch.softmax(torch.einsum("ndt,nds->nts", q, k) / depth**0.5, dim=-1)
            mixed[:, head * depth : (head + 1) * depth] = torch.einsum("nts,nds->ndt", weights, v)
        out = torch.einsum("oc,nct->not", block.proj_out.weight[..., 0], mixed) + block.proj_out.bias[:, None]
    torch.testing.assert_close(actual, x + out.reshape(x.shape), atol=1e-12, rtol=0)


def test_the_two_attention_orders_differ_only_in_the_reading_of_qkv():
    legacy = randomised(AttentionBlock(16, 2))
    new = AttentionBlock(16, 2, new_order=True)
    new.load_state_dict(legacy.state_dict())
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    assert (legacy(x) - new(x)).abs().max() > 1e-3
    for name in ("weight", "bias"):
        value = getattr(legacy.qkv, name).data
        getattr(new.qkv, name).data = value.unflatten(0, (2, 3, 8)).transpose(0, 1).flatten(0, 2)
    torch.testing.assert_close(legacy(x), new(x))


@pytest.mark.parametrize("updown", [False, True])
def test_checkpointing_gives_the_same_gradients(updown):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for use_checkpoint in (False, True):
        model = create_model(**SMALL, resblock_updown=updown, use_checkpoint=use_checkpoint)
        for index, parameter in enumerate(model.parameters()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
        model(x, torch.tensor([3, 700])).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-7, rtol=1e-5)


def test_a_new_network_predicts_zero_and_its_residual_blocks_do_nothing():
    model = create_model(**SMALL)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert model(x, torch.tensor([0, 999])).abs().max() == 0
    h, emb = torch.randn(2, 16, 8, 8), torch.randn(2, 64)
    assert torch.equal(ResBlock(16, 16, 64)(h, emb), h)
    assert torch.equal(AttentionBlock(16, 2)(h), h)


def test_scale_shift_norm_formula():
    block = randomised(ResBlock(8, 8, 4, use_scale_shift_norm=True))
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    h = block.in_layers(x)
    scale, shift = block.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
    expected = x + block.out_layers[1:](block.out_layers[0](h) * (1 + scale) + shift)
    torch.testing.assert_close(block(x, emb), expected)


@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (24, 6), (6, 1), (32, 32), (96, 32), (128, 32)])
def test_group_norm_groups(channels, groups):
    assert normalization(channels).num_groups == groups


def test_timestep_embedding_values():
    emb = timestep_embedding(torch.tensor([0, 7]), 7)
    assert emb.shape == (2, 7) and emb.dtype == torch.float32
    assert emb[0].tolist() == [1, 1, 1, 0, 0, 0, 0]
    frequency = 10000 ** (-1 / 3)
    torch.testing.assert_close(emb[1, [1, 4]], torch.tensor([np.cos(7 * frequency), np.sin(7 * frequency)]).float())


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("channels", [16, 24])
def test_an_image_does_not_depend_on_its_batch(size, channels):
    model = randomised(create_model(**SMALL | dict(num_channels=channels), class_cond=True, num_classes=3))
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, 1, 2])
    with torch.no_grad():
        together = model(x, t, y)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_other_dtypes_and_memory_formats():
    model = randomised(create_model(**SMALL))
    x, t = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    with torch.no_grad():
        expected = model(x, t)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x.to(memory_format=torch.channels_last), t), expected, atol=1e-5, rtol=1e-4)
        brain = model.to(torch.bfloat16)(x, t)
    assert brain.dtype == torch.float32
    assert (brain - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_wrong_inputs_and_settings_are_told():
    x, t = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="labels y for an unconditional"):
        create_model(**SMALL)(x, t, t)
    with pytest.raises(ValueError, match="no labels y for a conditional"):
        create_model(**SMALL, class_cond=True)(x, t)
    with pytest.raises(ValueError, match="multiples of 2"):
        create_model(**SMALL)(torch.zeros(1, 3, 33, 32), t)
    with pytest.raises(ValueError, match="heads"):
        create_model(**SMALL, num_heads=5)
    with pytest.raises(ValueError, match="num_head_channels 7"):
        create_model(**SMALL, num_head_channels=7)
