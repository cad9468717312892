"""Public models in the format of diffusers as pools, and our own models written in that format."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import diffusionmix
import main
from guided_diffusion import export, image_train
from guided_diffusion.costs import image_bytes, image_flops
from guided_diffusion.guidance import sample
from guided_diffusion.mix import diffusion_mixes
from guided_diffusion.pool import Pool
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.synthesis import Synthesis, synthesise
from tests.conftest import NO_IMAGES, TINY
from utils import checkpoint

diffusers = pytest.importorskip("diffusers")
CPU = torch.device("cpu")
ATOL = 1e-4


def unet(seed=0, **changes):
    """A network of the architecture of google/ddpm-cifar10-32, small."""
    config = dict(
        sample_size=32, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, norm_eps=1e-6,
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(**config | changes).eval()


def pipeline(folder, seed=0, scheduler=None, **changes):
    """Write a pipeline and return its network."""
    network = unet(seed, **changes)
    diffusers.DDPMPipeline(network, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder)
    return network


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tree(folder):
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A pipeline. For reading only."""
    folder = tmp_path_factory.mktemp("public") / "model"
    pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory, alone):
    """Three of them as subset0, subset1, subset2. For reading only."""
    folder = tmp_path_factory.mktemp("public") / "pool"
    shutil.copytree(alone, folder / "subset0")
    for m in (1, 2):
        pipeline(folder / f"subset{m}", m)
    return folder


def test_the_noise_is_that_of_the_library(alone, arr):
    x, t, model = arr(1, 2, 3, 32, 32), torch.tensor([3, 900]), Pool(alone).load(0)
    with torch.no_grad():
        expected = unet()(x, t).sample
    assert float((model.network(x, t) - expected).abs().max()) < ATOL
    rough = Pool(alone).load(0, precision="bf16").network(x, t)
    assert rough.dtype == torch.float32 and float((rough - expected).abs().max()) < 0.1 * float(expected.std())
    assert model.image_size == 32 and not model.class_cond


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195),
        dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=500),
        dict(prediction_type="sample"),
    ],
    ids=repr,
)
def test_ddim_is_that_of_the_library(tmp_path, arr, options):
    network, noise = pipeline(tmp_path, scheduler=diffusers.DDPMScheduler(**options)), arr(1, 2, 3, 32, 32)
    scheduler = diffusers.DDIMScheduler(set_alpha_to_one=True, timestep_spacing="leading", **options)
    scheduler.set_timesteps(5)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            # ours takes the noise from the clipped image, too
            x = scheduler.step(network(x, t).sample, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
    model = Pool(tmp_path).load(0)
    ours = sample(model.network, model.diffusion(sorted(scheduler.timesteps.tolist())), noise)
    assert float((ours - x).abs().max()) < ATOL


@pytest.mark.usefixtures("enough_memory")
def test_a_pool_of_one_and_of_three(alone, three):
    plan = Synthesis(classes=[2], per_class=2, steps=2, size=32, seed=1, stream=0, precision="float32")
    one = synthesise(Pool(alone), plan, CPU)[0]
    every = synthesise(Pool(three), Synthesis(**vars(plan) | {"classes": [2, 2, 2]}), CPU)[0]
    assert len(Pool(three)) == 3 and one.shape == (4, 3, 32, 32)
    assert torch.equal(every[:4], one) and not torch.equal(every[4:8], one)


def test_mixes(alone, arr):
    model, (a, b, noise) = Pool(alone).load(0), (arr(seed, 2, 3, 32, 32).clamp(-1, 1) for seed in (1, 2, 3))
    mixed = diffusion_mixes(model, a, b, torch.tensor([0.2, 0.9]), noise, level=200, steps=2)
    swapped = diffusion_mixes(model, b, a, torch.tensor([0.8, 0.1]), noise, level=200, steps=2)
    assert mixed.shape == a.shape and float(mixed.abs().max()) <= 1
    assert float((mixed - swapped).abs().max()) < ATOL < float((mixed - a).abs().max())


def test_costs(alone):
    model = Pool(alone).load(0)
    half = Pool(alone, {"image_size": 16}).load(0)
    assert half.flags == model.flags | {"image_size": 32}  # which the model tells
    convolution = 2 * 9 * 3 * 8 * 32 * 32  # the first one, a small part of all
    assert image_flops(model.flags) > 10 * convolution and image_bytes(model.flags) > 4 * 8 * 32 * 32


def test_the_digest_is_of_weights_and_settings(alone, tmp_path):
    copied = shutil.copytree(alone, tmp_path / "copy")
    before = Pool(alone).digest()
    assert Pool(copied).digest() == before
    edit(copied / "scheduler" / "scheduler_config.json", beta_end=0.01)
    assert Pool(copied).digest() != before


@pytest.mark.usefixtures("few_glyphs", "enough_memory")
def test_main_trains_from_it_and_writes_nothing_there(call, three, tmp_path):
    flags = ("--pool", three, "--data-root", NO_IMAGES, "--save-dir", tmp_path / "run", "--num-classes", 6)
    before = tree(three)
    status, out, err = call(main, *TINY, *flags)
    assert status == 0, err
    assert checkpoint.load(tmp_path / "run" / "last.pt")["epoch"] == 2
    status, out, err = call(diffusionmix, "--resume", tmp_path / "run" / "best_model.pt", *flags[:6], "--episodes", 2,
                            "--nTestNovel", 10, "--head-steps", 2, "--device", "cpu")  # fmt: skip
    assert status == 0 and "with mixes" in out, err
    status, out, err = call(main, *TINY, *flags, "--dry-run", "--save-dir", tmp_path / "other")
    assert status == 0 and "TFLOP" in out and not (tmp_path / "other").exists()
    status, _, err = call(main, *TINY, *flags[:4], "--save-dir", tmp_path / "other")
    assert status == 2 and "--num-classes" in err
    assert tree(three) == before


@pytest.fixture
def copied(alone, tmp_path):
    return shutil.copytree(alone, tmp_path / "model")


def test_all_in_one_folder_with_old_names_of_attention(copied, alone, arr):
    weights = checkpoint.load(copied / "unet" / "diffusion_pytorch_model.safetensors")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in weights.items():
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = value
    assert set(old) != set(weights)
    flat = copied / "flat"
    flat.mkdir()
    checkpoint.save(flat / "diffusion_pytorch_model.bin", old)
    for path in (copied / "unet" / "config.json", copied / "scheduler" / "scheduler_config.json"):
        shutil.copy(path, flat)
    x, t = arr(1, 2, 3, 32, 32), torch.tensor([3, 900])
    assert torch.equal(Pool(flat).load(0).network(x, t), Pool(alone).load(0).network(x, t))


def test_all_in_one_folder_of_links_as_in_the_download_cache(alone, tmp_path, arr):
    folder, blobs = tmp_path / "snapshots" / "0", tmp_path / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(tree(alone)):
        shutil.copy(path, blobs / str(number))
        (folder / path.name).symlink_to(f"../../blobs/{number}")
    linked, model = Pool(folder).load(0), Pool(alone).load(0)
    x, t = arr(1, 2, 3, 32, 32), torch.tensor([3, 900])
    assert torch.equal(linked.network(x, t), model.network(x, t)) and linked.flags == model.flags
    assert Pool(folder).digest() == Pool(alone).digest()


def test_the_folder_unet_takes_the_scheduler_beside_it(tmp_path):
    pipeline(tmp_path, scheduler=diffusers.DDPMScheduler(beta_end=0.01, num_train_timesteps=500))
    process = Pool(tmp_path / "unet").load(0).diffusion()
    assert process.num_timesteps == 500 and float(process.betas[-1]) == pytest.approx(0.01)


def test_without_a_scheduler_the_flags_tell(copied):
    shutil.rmtree(copied / "scheduler")
    edit(copied / "unet" / "config.json", sample_size=None)
    model = Pool(copied, {"image_size": 16, "noise_schedule": "linear", "diffusion_steps": 500}).load(0)
    assert model.image_size == 16 and model.diffusion().num_timesteps == 500
    assert float(model.diffusion().betas[0]) == pytest.approx(2e-4)


REFUSED = {
    "unet/config.json": [
        dict(_class_name="UNet2DConditionModel"), dict(in_channels=4), dict(sample_size=[32, 16]),
        dict(class_embed_type="timestep"), dict(layers_per_block=10**9), dict(from_the_future=1),
        dict(block_out_channels=[8, 8]), dict(down_block_types=["DownBlock2D", "NoSuchBlock"]),
        dict(time_embedding_type="fourier"), dict(num_class_embeds="x"),
    ],
    "scheduler/scheduler_config.json": [
        dict(beta_schedule="sigmoid"), dict(prediction_type="v_prediction"), dict(variance_type="learned"),
        dict(variance_type="learned_range"), dict(trained_betas=[0.1]), dict(rescale_betas_zero_snr=True),
        dict(num_train_timesteps=0), dict(num_train_timesteps=1000.5), dict(beta_end=float("nan")), dict(beta_end=1),
    ],
    "model_index.json": [dict(vqvae=["diffusers", "VQModel"])],
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "changes"), [(file, each) for file, every in REFUSED.items() for each in every], ids=repr
)
def test_what_is_not_supported_is_refused_by_name(copied, file, changes):
    edit(copied / file, **changes)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        Pool(copied).load(0)
    text = str(caught.value)
    assert "\n" not in text and str(copied) in text and "image_train" not in text
    assert next(iter(changes)).strip("_") in text or "does not fit" in text or "NoSuchBlock" in text


@pytest.mark.parametrize("missing", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
def test_a_missing_file_is_named(copied, missing):
    (copied / missing).unlink()
    with pytest.raises(checkpoint.CheckpointError, match="diffusion_pytorch_model.safetensors") as caught:
        Pool(copied).load(0)
    assert "image_train" not in str(caught.value)


def test_a_gap_is_named(three, tmp_path):
    pool = shutil.copytree(three, tmp_path / "pool")
    shutil.rmtree(pool / "subset1")
    with pytest.raises(ValueError, match="not 1") as caught:
        Pool(pool)
    assert "image_train" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--save_dir", "--pool"])
def test_pretraining_writes_nothing_there(call, alone, three, picture_folder, tmp_path, flag):
    data = picture_folder(tmp_path / "data", {"a": [1] * 3, "b": [2] * 3})
    for folder in (alone, three / "subset1", *[three] * (flag == "--pool")):
        before = tree(folder)
        status, _, err = call(image_train, "--data_dir", data, flag, folder, "--classes_per_model", 1)
        assert status == 2 and "diffusers" in err and tree(folder) == before


def test_without_the_library_one_line_says_what_to_install(call, alone, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    status, _, err = call(main, *TINY, "--pool", alone, "--save-dir", tmp_path, "--num-classes", 5)
    assert status == 2 and "pip install diffusers" in err and err.count("\n") == 1


OURS = dict(
    image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="8", num_heads=1,
)  # fmt: skip
EXPRESSIBLE = [
    {},
    dict(use_scale_shift_norm=True, resblock_updown=True, learn_sigma=True),
    dict(num_head_channels=16, use_new_attention_order=True, attention_resolutions="16,8", resblock_updown=True),
    dict(num_head_channels=16, num_res_blocks=2, channel_mult="1,1,3", noise_schedule="linear", predict_xstart=True),
    dict(class_cond=True, num_classes=3, use_scale_shift_norm=True, diffusion_steps=500, num_head_channels=32),
]


def own(folder, fill, **changes):
    """Write a checkpoint of our own, and return its path."""
    flags = model_and_diffusion_defaults() | dict(num_classes=0, class_cond=False) | OURS | changes
    weights = fill(create_model_and_diffusion(**flags)[0]).state_dict()
    checkpoint.save(folder / "model.pt", {"model": weights, "flags": flags, "num_classes": 3})
    return folder / "model.pt"


@pytest.mark.parametrize("changes", EXPRESSIBLE, ids=repr)
def test_export_predicts_the_same(call, fill, arr, tmp_path, changes):
    path, out = own(tmp_path, fill, **changes), tmp_path / "out"
    status, _, err = call(export, path, out)
    assert status == 0, err
    ours, again = Pool(path).load(0), Pool(out).load(0)
    x, t, y = arr(1, 2, 3, 16, 16), torch.tensor([3, 400]), torch.tensor([0, 2])
    pipe = diffusers.DDPMPipeline.from_pretrained(out)
    labels = [y] if ours.class_cond else []
    with torch.no_grad():
        expected = ours.network(x, t, *labels)
        assert float((pipe.unet.eval()(x, t, *labels).sample - expected).abs().max()) < ATOL
    assert float((again.network(x, t, *labels) - expected).abs().max()) < ATOL
    assert float(expected.std()) > 0.1  # it depends on the weights
    betas = torch.from_numpy(ours.diffusion().betas).float()
    assert float((pipe.scheduler.betas - betas).abs().max()) < 1e-6
    assert float(abs(again.diffusion().betas - ours.diffusion().betas).max()) < 1e-6
    drawn = (sample(each.network, each.diffusion("ddim5"), x, local_labels=y if labels else None)
             for each in (ours, again))  # fmt: skip
    assert float((next(drawn) - next(drawn)).abs().max()) < ATOL


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        (dict(num_channels=16, channel_mult="1,2,4", attention_resolutions="4"), "groups"),
        (dict(num_heads=4, attention_resolutions="16,8"), "heads"),
        (dict(channel_mult="2,2"), "channel_mult"),
        (dict(timestep_respacing="250"), "timesteps"),
        (dict(rescale_timesteps=True, diffusion_steps=400), "timesteps"),
    ],
    ids=repr,
)
def test_export_names_what_it_cannot_express(call, fill, tmp_path, changes, word):
    status, _, err = call(export, own(tmp_path, fill, **changes), tmp_path / "out")
    assert status == 2 and word in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_export_refuses_a_checkpoint_without_settings(call, fill, tmp_path):
    path = own(tmp_path, fill)
    checkpoint.save(path, checkpoint.load(path)["model"])
    status, _, err = call(export, path, tmp_path / "out")
    assert status == 2 and "noise schedule" in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_export_keeps_what_is_there(call, fill, tmp_path):
    path = own(tmp_path, fill)
    status, _, err = call(export, path, tmp_path)
    assert status == 2 and "already" in err and sorted(tmp_path.iterdir()) == [path]
