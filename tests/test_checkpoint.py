"""Checkpoints: saved whole, loaded as data only, refused with one line."""

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.conftest import same
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


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle2", "pickle"])
def test_code_is_never_run(tmp_path, writer):
    path, target = tmp_path / "model.pt", tmp_path / "made by the pickle"
    if writer in ("torch", "legacy"):
        torch.save({"w": Hostile(target)}, path, _use_new_zipfile_serialization=writer == "torch")
    else:
        path.write_bytes(pickle.dumps({"w": Hostile(target)}, protocol=2 if writer == "pickle2" else 4))
    message = refusal(checkpoint.load, path)
    assert str(path) in message and "run code" in message
    assert writer == "pickle" or "posix.mkdir" in message  # newer pickles are refused before they name anything
    assert not target.exists()


def test_a_whole_module_and_a_program_are_refused(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    assert "the object torch.nn.modules.linear.Linear" in refusal(checkpoint.load, tmp_path / "module.pt")
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        for name in ("version", "data.pkl", "constants.pkl"):  # the last one makes it TorchScript
            archive.writestr(f"program/{name}", b"3")
    assert "TorchScript" in refusal(checkpoint.load, tmp_path / "program.pt")


# ---- files that claim more than they have


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """Write the zip at `path` anew, with change(name, content) as the content of each record."""
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def test_a_zip_that_claims_more_than_it_has_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    checkpoint.save(path, {"w": torch.zeros(10)})
    zeros = bytes(5_000_000)
    rewritten(path, lambda name, content: zeros if name.endswith("data/0") else content, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(torch, "load", None)
    message = refusal(checkpoint.load, path)
    assert "claim 5,000" in message and f"at most the {path.stat().st_size:,} of the file" in message


def test_a_storage_that_claims_more_than_its_record_is_refused(tmp_path):
    path, claim = tmp_path / "model.pt", b"J" + struct.pack("<i", 2**30)
    checkpoint.save(path, {"w": torch.zeros(1000)})
    rewritten(path, lambda _, content: content.replace(b"M" + struct.pack("<H", 1000), claim))
    assert "cut short" in refusal(checkpoint.load, path)


def test_an_older_file_that_claims_more_than_there_is(tmp_path):
    path, claim = tmp_path / "model.pt", b"\x8a\x07" + (2**48).to_bytes(7, "little")
    torch.save({"w": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"M" + struct.pack("<H", 1000), claim))
    assert f"asks for {4 * 2**48:,} bytes of memory" in refusal(checkpoint.load, path)


# ---- other formats


def test_older_files_of_torch_load(tmp_path):
    state = OrderedDict(nn.Linear(3, 2).state_dict())  # as guided-diffusion and improved-diffusion publish theirs
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "a.pt")
    assert same(checkpoint.load(tmp_path / "a.pt"), state)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_safetensors_load_whatever_their_name(tmp_path, name):
    state = {**nn.Linear(3, 2).state_dict(), "half": torch.ones(2).half(), "steps": torch.tensor(3)}
    save_file(state, tmp_path / name, metadata={"format": "pt"})
    assert same(checkpoint.load(tmp_path / name), state)


def safetensors(path, shape, end):
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(40))


@pytest.mark.parametrize("shape, end", [([10**12], 4 * 10**12), ([10**12], 40), ([5], 20), ([-1], 40)])
def test_safetensors_that_claim_what_they_have_not_are_refused(tmp_path, shape, end):
    path = tmp_path / "model.safetensors"
    safetensors(path, [10], 40)
    assert torch.equal(checkpoint.load(path)["w"], torch.zeros(10))
    safetensors(path, shape, end)
    message = refusal(checkpoint.load, path)
    assert str(path) in message and "cut short" in message


# ---- into a module


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
    assert "not a tensor of plain numbers: bias" in refusal(
        checkpoint.load_state, nn.Linear(1, 1), {"weight": torch.zeros(1, 1), "bias": 3}, "a.pt"
    )


@pytest.mark.parametrize(
    "value",
    [
        torch.empty(2, 3, device="meta"),
        torch.zeros(2, 3).to_sparse(),
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.zeros(2, 3), 1.0, 0, torch.quint8),
    ],
    ids=["meta", "sparse", "complex", "quantised"],
)
def test_load_state_refuses_tensors_of_other_kinds(value):
    state = {"weight": value, "bias": torch.zeros(2)}
    assert "not a tensor of plain numbers: weight" in refusal(checkpoint.load_state, nn.Linear(3, 2), state, "a.pt")


def test_load_state_keeps_the_dtype_and_refuses_what_overflows_it():
    module = nn.Linear(3, 2)
    checkpoint.load_state(module, {"weight": torch.ones(2, 3).half(), "bias": torch.ones(2).double()}, "a.pt")
    assert module.weight.dtype == module.bias.dtype == torch.float32
    assert torch.equal(module.weight, torch.ones(2, 3))
    state = {"weight": torch.ones(2, 3), "bias": torch.tensor([1e300, 0], dtype=torch.float64)}
    assert "NaN or infinite: bias" in refusal(checkpoint.load_state, module, state, "a.pt")


def test_check_state_needs_no_memory():
    with torch.device("meta"):
        module = nn.Linear(10**6, 10**6)
    message = refusal(checkpoint.check_state, module, {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)}, "a.pt")
    assert "weight (got (1, 1), expected (1000000, 1000000))" in message
