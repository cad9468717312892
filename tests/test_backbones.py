"""The registry of backbones, and what `docs/extending.md` says about adding one."""

import re
import sys

import pytest
import torch
from torch import nn

import main
from config import Settings, parse
from datasets.pseudo import PseudoDataset
from few_shot import load_model
from models import backbones
from models.learners import ClusterLearners
from models.meta_model import MetaModel
from models.wrn import WideResNet
from tests.conftest import ROOT, TINY, same
from utils import checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [*backbones.BACKBONES, "timm:resnet18"])
def test_every_backbone_keeps_its_contract(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    backbone = backbones.build(name, generator=torch.Generator().manual_seed(1)).eval()
    side = backbone.map_side(40)
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        maps = backbone(images)
        assert maps.shape == (2, backbone.feature_dim, side, side) and maps.dtype == torch.float32
        assert float((backbone(images[:1]) - maps[:1]).abs().max()) < 1e-4
    again, other = (backbones.build(name, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert same(dict(again.state_dict()), dict(backbone.state_dict()))
    assert not same(dict(other.state_dict()), dict(backbone.state_dict()))


@pytest.mark.parametrize(
    ("depth", "widen", "millions"), [(28, 10, 36.5), (40, 4, 8.9), (16, 8, 11.0)], ids=repr
)  # table 5 of the paper
def test_wide_resnet_is_that_of_the_paper(depth, widen, millions):
    with torch.device("meta"):
        network = WideResNet(depth, widen)
    head = (64 * widen + 1) * 10  # of CIFAR-10
    assert round((sum(p.numel() for p in network.parameters()) + head) / 1e6, 1) == millions
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in network.modules()) == depth - 3
    assert network(torch.zeros(1, 3, 32, 32, device="meta")).shape == (1, 64 * widen, 8, 8)


def test_odd_wide_resnets_are_refused():
    for options in (dict(depth=27), dict(depth=4), dict(widen=0)):
        with pytest.raises(ValueError, match="expected"):
            WideResNet(**options)


def test_names_help_and_errors_come_from_the_registry(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], description="")
    shown = " ".join(capsys.readouterr().out.split())
    for name in backbones.BACKBONES:
        assert name in shown and Settings(backbone=name).backbone == name
        assert backbones.is_known(name)
    assert not backbones.is_known(None) and not backbones.is_known(3)  # as a stranger's checkpoint may have it
    for name in ("vgg", "timm:", "timm:hf-hub:a/b", "timm:../x"):
        assert not backbones.is_known(name)
        with pytest.raises(ValueError, match="conv4, resnet12, wrn28-10, or timm:NAME"):
            Settings(backbone=name)
    with pytest.raises(ValueError, match="only in resnet12"):
        backbones.build("wrn28-10", drop_rate=0.1)


def test_timm_refuses_what_it_lacks_and_what_is_no_map(monkeypatch):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="lacks"):
        backbones.build("timm:no_such_network")
    for name in ("timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"):
        with pytest.raises(ValueError, match=name) as caught:
            MetaModel(4, backbone=name)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        backbones.build("timm:resnet18")


@pytest.mark.usefixtures("few_glyphs")
def test_a_run_with_timm_can_be_tested(call, tmp_path):
    pytest.importorskip("timm")
    status, _, err = call(main, *TINY, "--source", "none", "--backbone", "timm:resnet10t", "--save-dir", tmp_path)
    assert status == 0, err
    model, _, settings = load_model(tmp_path / "best_model.pt", CPU)
    saved = checkpoint.load(tmp_path / "best_model.pt")
    assert settings["backbone"] == "timm:resnet10t" and same(dict(model.state_dict()), dict(saved["model"]))


def test_a_backbone_added_as_the_document_says_trains(monkeypatch):
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    part = re.search(r"## Another backbone\n(.*?)\n## ", text, re.DOTALL)[1]
    code = re.search(r"```python\n(.*?)```", part, re.DOTALL)[1]
    name = re.search(r"`--backbone (\w+)`", part)[1]
    monkeypatch.setattr(backbones, "BACKBONES", dict(backbones.BACKBONES))
    exec(compile(code, "backbones.py", "exec"), dict(vars(backbones)))  # at the end of that file
    settings = Settings(recipe="clusters", backbone=name, features="map", image_batch=8, max_epoch=40)
    learners = ClusterLearners(settings, 3, 16, CPU)
    assert learners.model.feature_dim == 16 * 4 * 4
    before = {key: value.clone() for key, value in learners.model.state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=rng)
    entries = learners.train_meta_model(PseudoDataset(images, torch.arange(3).repeat(4), 3), [0.01], rng, 0)
    after = learners.model.state_dict()
    assert entries["loss"] > 0 and not same(before["base.conv.weight"], after["base.conv.weight"])
    state = learners.state()
    other = ClusterLearners(settings, 3, 16, CPU)
    other.load(state, ROOT)
    assert same(dict(other.model.state_dict()), dict(after))
