"""The pool: a folder of pretrained diffusion models, the only source of data."""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guided_diffusion import from_diffusers
from guided_diffusion.costs import that_fit
from guided_diffusion.dist_util import compile_in_place, inference_dtype, may_gain_from_bf16, worth_compiling
from guided_diffusion.respace import SpacedDiffusion, respaced, space_timesteps
from guided_diffusion.script_util import (
    contents,
    infer_model_flags,
    model_and_diffusion_defaults,
    unwrapped,
)
from utils import checkpoint, processes
from utils.remote import local

_DEFAULTS = model_and_diffusion_defaults()
_PROCESS_FLAGS = (  # the process flags that affect sampling
    "diffusion_steps", "learn_sigma", "noise_schedule", "predict_xstart", "rescale_timesteps", "timestep_respacing",
)  # fmt: skip
_MOST = {"image_size": 4096, "num_classes": 10_000, "num_res_blocks": 100}  # upper limits of a checkpoint's flags
_LARGEST = 100_000  # upper limit of its other numbers
_LONGEST = 1000  # characters, the limit of its texts
SURELY = 0.9  # bf16 must take less than this share of the float32 time, as timings vary


def subset_path(pool: str | os.PathLike, m: int) -> Path:
    """Return the file of model m (from 1) of a pool: <pool>/subset{m}/ckpt/model.pt."""
    return Path(pool) / f"subset{m}" / "ckpt" / "model.pt"


@dataclass(frozen=True)
class PoolModel:
    """One loaded model of the pool.

    Attributes:
        network: the U-Net in eval mode, without gradients.
        flags: all its flags for `create_model_and_diffusion`, or the flags that `from_diffusers.describe` returns.
        num_classes: number of classes it was trained on; None if its checkpoint does not say.
        path: its file, or its folder in the format of diffusers.
    """

    network: nn.Module
    flags: dict[str, Any]
    num_classes: int | None
    path: Path

    @property
    def image_size(self) -> int:
        """Side of its images, in pixels."""
        return self.flags["image_size"]

    @property
    def class_cond(self) -> bool:
        """Whether the network needs local labels y."""
        return self.flags["class_cond"]

    @torch.no_grad()
    def trial(self, images: int) -> None:
        """Pass a batch of `images` blank images through the network and wait for the device, to measure the cost."""
        device = next(self.network.parameters()).device
        labels = [torch.zeros(images, dtype=torch.int64, device=device)] if self.class_cond else []
        t = torch.zeros(images, dtype=torch.int64, device=device)
        x = torch.zeros(images, 3, self.image_size, self.image_size, device=device)
        float(self.network(x, t, *labels).sum())

    def seconds(self, images: int) -> float:
        """Return the seconds that a batch of `images` takes: the fastest of up to three passes after a warm-up."""
        found = []
        for _ in range(4):  # the first pass is a warm-up
            started = time.perf_counter()
            self.trial(images)
            found.append(time.perf_counter() - started)
            if len(found) > 1 and found[-1] > 1:
                break
        return min(found[1:])

    def diffusion(self, kept: str | Sequence[int] = "") -> SpacedDiffusion:
        """Return its diffusion process, restricted to the timesteps `kept`.

        kept: a spacing such as "ddim25", or timestep numbers (from 0) of the training schedule; "" keeps all.
        Raises ValueError for timesteps that the process does not have.
        """
        flags = tuple((name, self.flags[name]) for name in (*_PROCESS_FLAGS, "scheduler") if name in self.flags)
        return _process(flags, kept if isinstance(kept, str) else tuple(kept))


@lru_cache(maxsize=8)  # copies its tables to the device once, not once per batch
def _process(flags: tuple[tuple[str, Any], ...], kept: str | tuple[int, ...]) -> SpacedDiffusion:
    trained_on = from_diffusers.create_process(dict(flags))
    if kept == "":
        return trained_on
    return respaced(trained_on, space_timesteps(trained_on.num_timesteps, kept) if isinstance(kept, str) else kept)


class Pool:
    """The models of a folder, in the order of their numbers. Each is read only when needed; nothing is written.

    Our own checkpoints hold their flags. For a bare state dict (a public checkpoint, also as safetensors), some flags
    follow from its tensors; the rest, such as heads, noise schedule and image size, come from `flags`. A folder in the
    format of diffusers holds nearly all; `flags` fills in what its configs lack.
    """

    def __init__(self, path: str | os.PathLike, flags: Mapping[str, Any] | None = None):
        """path: a folder with subset{1..M}/ckpt/model.pt (or model.safetensors), numbered from 1 or 0. Each subset{m}
        may also be a folder in the format of diffusers. For a pool of one: a checkpoint file, a folder with model.pt
        directly in it, or a folder in the format of diffusers.

        Raises ValueError if path is none of these, or if the numbers have a gap.
        """
        self.path, self._flags = Path(path), dict(flags or {})
        self._room: dict[str, int] = {}  # flags of a network and `other` -> how many images fit in memory
        if self.path.is_file():
            self.files = [self.path]
            return
        names, found = ("model.pt", "model.safetensors"), {}  # the first that exists counts
        for folder in self.path.glob("subset*"):
            if folder.name[6:].isdecimal():
                files = [file for name in names if (file := folder / "ckpt" / name).exists()]
                files += [folder] * from_diffusers.is_model(folder)
                if files:
                    found[int(folder.name[6:])] = files[0]
        direct = [file for name in names if (file := self.path / name).is_file()]
        direct += [self.path] * from_diffusers.is_model(self.path)
        if direct and not found:
            self.files = direct[:1]
            return
        if not found:
            raise ValueError(
                f"{self.path}: got no diffusion models, expected subset1/ckpt/model.pt and so on; make a pool with "
                f"python guided_diffusion/image_train.py --data_dir DATA/meta_train --pool {self.path} "
                "(DATA: your images, or what python -m datasets.prepare writes)"
            )
        gaps = sorted(set(range(1, max(found) + 1)) - set(found))
        if gaps:
            raise ValueError(
                f"{self.path}: got subsets up to {max(found)} but not {', '.join(map(str, gaps))}; "
                + (
                    "number them without a gap"
                    if any(file.is_dir() for file in found.values())
                    else "give the same image_train.py --pool command again to make them"
                )
            )
        self.files = [found[m] for m in sorted(found)]

    @classmethod
    def of(cls, settings: Any) -> "Pool":
        """Return the pool that `config.Settings` name.

        Raises ValueError as the constructor does, and for a flag that every model contradicts: it would have no effect.
        """
        pool = cls(local(settings.pool_place), settings.bare_checkpoint_flags())
        if given := settings.given_for_bare_checkpoints():
            recorded = [pool.load(m).flags for m in range(len(pool))]
            for name, value in given.items():
                if all(flags[name] != value for flags in recorded):
                    cure = f", or give --height {value} to resize its images" if name == "image_size" else ""
                    raise ValueError(
                        f"{pool.path}: got --{name.replace('_', '-')} {value}, its models were trained with "
                        f"{recorded[0][name]!r}; leave that flag out{cure}"
                    )
        return pool

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        """Return the SHA-256 of all files, in order, as hex digits."""
        whole = hashlib.sha256()
        for path in self.files:
            for file in from_diffusers.files_of(path) if path.is_dir() else [path]:
                with open(file, "rb") as stream:
                    whole.update(hashlib.file_digest(stream, "sha256").digest())
        return whole.hexdigest()

    def each(
        self, device: torch.device, precision: str = "float32", only: Sequence[int] | None = None
    ) -> Iterator[PoolModel]:
        """Yield the models numbered `only` (None: all) from `load`. The next is read while the caller uses this one."""
        wanted = range(len(self)) if only is None else only
        if not wanted:
            return
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(self.load, wanted[0], device, precision)
            for following in wanted[1:]:
                model = coming.result()
                coming = thread.submit(self.load, following, device, precision)
                yield model
            yield coming.result()

    def load(self, index: int, device: torch.device | str = "cpu", precision: str = "float32") -> PoolModel:
        """Load model `index` (from 0) strictly onto `device`, with weights of the dtype that `inference_dtype` returns.

        Raises CheckpointError for a file that is damaged, of another kind, or does not fit its flags.
        """
        path = self.files[index]
        weights, flags, num_classes, file = self._read(path)
        network = _on_meta(flags, path)
        checkpoint.check_state(network, weights, file)
        checkpoint.check_size(weights, file)
        network.to_empty(device="cpu")
        checkpoint.load_state(network, weights, file)
        dtype = inference_dtype(precision, torch.device(device))
        layout = torch.contiguous_format if dtype == torch.float32 else torch.channels_last
        network = network.to(device, dtype, memory_format=layout)
        if worth_compiling(torch.device(device), flags["num_channels"]):
            compile_in_place(network)
        model = PoolModel(network.eval().requires_grad_(False), flags, num_classes, path)
        try:
            model.diffusion()
        except ValueError as error:
            cure = _cure(path, "its flags")
            raise checkpoint.CheckpointError(f"{path}: no process is like this ({error}); {cure}") from error
        return model

    def precision(self, asked: str, device: torch.device) -> str:
        """Return the number format to draw in: "float32" or "bf16".

        For "auto" on a CPU with bf16 instructions, time the first model in both formats and pick the faster.
        """
        if asked != "auto" or not may_gain_from_bf16(device):
            return "bf16" if inference_dtype(asked, device) == torch.bfloat16 else "float32"
        exact, half = (self.load(0, device, each) for each in ("float32", "bf16"))
        images = 2 if exact.seconds(2) > 0.1 else 32  # few for a large network
        faster = "bf16" if half.seconds(images) < SURELY * exact.seconds(images) else "float32"
        return processes.broadcast(faster)  # each process has timed for itself

    def room(
        self, model: PoolModel, batch: int, device: torch.device, *, other: int = 0, found: int | None = None
    ) -> int:
        """Return how many of `batch` images fit in memory at once with `model`, by the memory free at the first call.

        Models with the same flags share the answer. other: as for `costs.that_fit`. found: a number that turned out to
        fit, used from now on.
        """
        kind = f"{other} {sorted(model.flags.items())}"
        if found is not None:
            self._room[kind] = found
        elif kind not in self._room:
            self._room[kind] = that_fit(model.flags, batch, device, other=other)
        return min(batch, self._room[kind])

    def share_classes(self, num_classes: int = 0, per_model: int = 0) -> list[int]:
        """Return how many pseudo classes each model has, in order.

        num_classes: total for the pool; 0 uses the number in each checkpoint.
        per_model: classes per model, except that the last one has the rest; 0 shares them out evenly.
        Raises ValueError if this needs a pool of another size, or if a checkpoint does not say its number.
        """
        if num_classes:
            least, more = divmod(num_classes, len(self))
            counts = [least + (m < more) for m in range(len(self))]
            if per_model:
                counts = [min(per_model, num_classes - per_model * m) for m in range(len(self))]
            if min(counts) < 1 or sum(counts) != num_classes:
                share = per_model or 1
                raise ValueError(
                    f"{self.path}: got {len(self)} models for {num_classes} pseudo classes, {share} or more per model, "
                    f"expected {-(-num_classes // share)} models; give another --pool or --num-classes"
                )
            return counts
        counts = [self._num_classes(path) for path in self.files]
        if None in counts:
            path = self.files[counts.index(None)]
            raise ValueError(f"{path}: does not say how many classes it was trained on; give --num-classes")
        return counts

    def check(self, classes: Sequence[int], steps: int, unconditional: bool = False) -> None:
        """Load every model once, so that a bad one is found before hours of drawing from the rest.

        classes: number of pseudo classes of each model; steps: DDIM steps; unconditional: refuse conditional models.
        Raises ValueError if a model does not load, has too few timesteps, or is conditional on fewer classes.
        """
        for m, count in enumerate(classes):
            model = self.load(m)
            try:
                model.diffusion(f"ddim{steps}")
            except ValueError as error:
                raise ValueError(
                    f"{model.path}: cannot take {steps} DDIM steps ({error}); give another --sample-steps"
                ) from None
            if model.class_cond and unconditional:
                raise ValueError(
                    f"{model.path}: is conditional, so its images have a class already, and --recipe clusters is for "
                    "unconditional models; give --recipe paper"
                )
            if model.class_cond and count > model.flags["num_classes"]:
                raise ValueError(
                    f"{model.path}: got {count} pseudo classes for a model of {model.flags['num_classes']}; give fewer "
                    "--num-classes"
                )

    def _read(self, path: Path) -> tuple[Mapping, dict[str, Any], int | None, Path]:
        """Return a model's weights, flags and number of classes, and the file that holds the weights."""
        if not path.is_dir():
            return *self._describe(checkpoint.load(path), path), path
        flags = self._public_flags(path)
        weights, file = from_diffusers.read_weights(path)
        return weights, flags, flags["num_classes"] or None, file

    def _num_classes(self, path: Path) -> int | None:
        """Return the number of classes a model was trained on; None if it does not say."""
        if path.is_dir():  # its config says, so its large weights are not read
            return self._public_flags(path)["num_classes"] or None
        return self._describe(checkpoint.load(path), path)[2]

    def _public_flags(self, folder: Path) -> dict[str, Any]:
        """Return the flags of a model in the format of diffusers."""
        from_diffusers.library()  # raises if diffusers is missing
        unsaid = {name: self._flags.get(name, _DEFAULTS[name]) for name in ("image_size", *_PROCESS_FLAGS)}
        return from_diffusers.describe(folder, unsaid)

    def _describe(self, payload: Any, path: Path) -> tuple[Mapping, dict[str, Any], int | None]:
        """Return weights, flags and number of classes of our own checkpoint, or of any that holds a state dict."""
        if not isinstance(payload, Mapping):
            raise checkpoint.CheckpointError(f"{path}: got {type(payload).__name__}, expected a state dict")
        if "model" in payload and "flags" in payload:
            weights, flags = payload.get("ema", payload["model"]), payload["flags"]  # a training checkpoint has both
            if not isinstance(weights, Mapping) or not isinstance(flags, Mapping):
                raise checkpoint.CheckpointError(f"{path}: holds no weights with their flags; make the model again")
            _check_flags(flags, path)
            classes = payload.get("num_classes") or (flags.get("num_classes") if flags.get("class_cond") else None)
            _check_flags({"num_classes": classes or 0}, path)
            return weights, {name: flags.get(name, default) for name, default in _DEFAULTS.items()}, classes
        weights = unwrapped(payload)
        if weights is None:
            raise checkpoint.CheckpointError(f"{path}: holds {contents(payload)}; give the checkpoint of a U-Net")
        flags = {**_DEFAULTS, **self._flags}
        try:
            flags.update(infer_model_flags(weights, flags["image_size"]))
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{path}: {error}") from None
        return weights, flags, flags["num_classes"] if flags["class_cond"] else None


def _check_flags(flags: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for flags of a wrong type or size: such a network could fill the memory."""
    for name, default in _DEFAULTS.items():
        value, most = flags.get(name, default), _MOST.get(name, _LARGEST)
        number, whole = isinstance(default, int | float), isinstance(default, int)
        kind = f"a text of up to {_LONGEST} characters"
        if number:
            kind = f"a {'whole ' * isinstance(value, float)}number up to {most}"
        if not isinstance(value, str if not number else int if whole else int | float):
            got = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
        elif (number and not abs(value) <= most) or (not number and len(value) > _LONGEST):
            got = repr(value)
        else:
            continue
        raise checkpoint.CheckpointError(f"{path}: got flag {name} {got:.40}, expected {kind}; make it again")


def _on_meta(flags: Mapping[str, Any], path: Path) -> nn.Module:
    """Return the U-Net of `flags` on the meta device: initial weights are slow to draw, and are replaced at once."""
    try:
        with torch.device("meta"):
            return from_diffusers.create_network(flags)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        cure = _cure(path, "the flags it has")
        raise checkpoint.CheckpointError(f"{path}: no U-Net is like this ({error}); {cure}") from error


def _cure(path: Path, flags: str) -> str:
    return "give another model" if path.is_dir() else f"give {flags}"
