"""Checkpoints: saved whole, loaded as data only, refused with one line."""

import os
import pickle

import pytest
import torch
from torch import nn

from utils import checkpoint
from utils.checkpoint import CheckpointError


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def refusal(call, *arguments):
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_round_trip_makes_parents_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "a" / "b" / "last.pt"
    payload = {"epoch": 3, "state": {"w": torch.arange(6.0).reshape(2, 3)}, "name": "run", "rates": [0.1, 0.2]}
    checkpoint.save(path, payload)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["state"].pop("w"), payload["state"].pop("w"))
    assert loaded == payload
    assert [entry.name for entry in path.parent.iterdir()] == ["last.pt"]


def test_failed_save_keeps_the_older_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        checkpoint.save(path, {"epoch": 2, "function": lambda: None})
    assert checkpoint.load(path) == {"epoch": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_missing_file_and_folder(tmp_path):
    assert "no such checkpoint" in refusal(checkpoint.load, tmp_path / "none.pt")
    assert "is not a file" in refusal(checkpoint.load, tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_cut_short(tmp_path, share):
    path = tmp_path / "model.pt"
    checkpoint.save(path, {"w": torch.randn(100, 10)})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = refusal(checkpoint.load, path)
    assert str(path) in message and "cut short" in message


def test_text_is_no_checkpoint(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("<html>404 not found</html>")
    assert "no checkpoint" in refusal(checkpoint.load, path)


@pytest.mark.parametrize("writer", ["torch", "pickle2", "pickle"])
def test_code_is_never_run(tmp_path, writer):
    path, target = tmp_path / "model.pt", tmp_path / "made by the pickle"
    if writer == "torch":
        torch.save({"w": Hostile(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"w": Hostile(target)}, protocol=2 if writer == "pickle2" else 4))
    message = refusal(checkpoint.load, path)
    assert str(path) in message and "run code" in message
    assert not target.exists()


def test_load_state_is_exact():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    checkpoint.load_state(target, source.state_dict(), "a.pt")
    assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)


def test_load_state_names_what_does_not_fit():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = {"0.weight": torch.zeros(2, 5), "0.bias": torch.zeros(2), "other": torch.zeros(1)}
    message = refusal(checkpoint.load_state, module, state, "a.pt")
    assert message.startswith("a.pt: ")
    assert "missing: 1.weight, 1.bias, 2.weight and 1 more" in message
    assert "unexpected: other" in message
    assert "0.weight (got (2, 5), expected (2, 2))" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_load_state_refuses_non_finite_weights(value):
    module = nn.Linear(3, 2)
    state = {"weight": torch.zeros(2, 3), "bias": torch.tensor([0.0, value])}
    message = refusal(checkpoint.load_state, module, state, "a.pt")
    assert "bias" in message and "weight," not in message
    assert not torch.equal(module.weight, state["weight"])


def test_load_state_refuses_what_is_no_state_dict():
    assert "got list" in refusal(checkpoint.load_state, nn.Linear(1, 1), [1, 2], "a.pt")
    assert "not a tensor: bias" in refusal(
        checkpoint.load_state, nn.Linear(1, 1), {"weight": torch.zeros(1, 1), "bias": 3}, "a.pt"
    )
