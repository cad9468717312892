"""The pool: a folder of pre-trained diffusion models, the only source of data that there is."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from guided_diffusion.costs import that_fit
from guided_diffusion.dist_util import compile_in_place, inference_dtype, worth_compiling
from guided_diffusion.respace import SpacedDiffusion, respaced, space_timesteps
from guided_diffusion.script_util import (
    contents,
    create_gaussian_diffusion,
    infer_model_flags,
    model_and_diffusion_defaults,
    network_of,
    unwrapped,
)
from guided_diffusion.unet import UNetModel
from utils import checkpoint

_DIFFUSION_FLAGS = ("learn_sigma", "noise_schedule", "predict_xstart", "rescale_timesteps", "timestep_respacing")
_LARGEST = 100_000  # number among a checkpoint's flags
_MOST = {"image_size": 4096, "num_classes": 10_000, "num_res_blocks": 100}  # of those that it is less for
_LONGEST = 1000  # characters of a text among them


def subset_path(pool: str | os.PathLike, m: int) -> Path:
    """Where model m (from 1) of a pool lies: <pool>/subset{m}/ckpt/model.pt."""
    return Path(pool) / f"subset{m}" / "ckpt" / "model.pt"


@dataclass(frozen=True)
class PoolModel:
    """One loaded model of the pool.

    Attributes:
        network: the U-Net in eval mode, without gradients.
        flags: every flag of `create_model_and_diffusion` that it was made with.
        num_classes: how many classes it was trained on, None where its checkpoint does not tell.
        path: the file.
    """

    network: UNetModel
    flags: dict[str, Any]
    num_classes: int | None
    path: Path

    @property
    def image_size(self) -> int:
        """Side of its images, in pixels."""
        return self.flags["image_size"]

    @property
    def class_cond(self) -> bool:
        """Whether it takes local labels y."""
        return self.flags["class_cond"]

    @torch.no_grad()
    def trial(self, images: int) -> None:
        """A forward pass of that many images of zeros, to see what it takes; waits for the device."""
        device = next(self.network.parameters()).device
        labels = [torch.zeros(images, dtype=torch.int64, device=device)] if self.class_cond else []
        t = torch.zeros(images, dtype=torch.int64, device=device)
        x = torch.zeros(images, 3, self.image_size, self.image_size, device=device)
        float(self.network(x, t, *labels).sum())

    def diffusion(self, kept: str | Sequence[int] = "") -> SpacedDiffusion:
        """Return its process, visiting of the timesteps that it was trained on only `kept`.

        kept: "ddim25" and the like; or a list of numbers, from 0 on, among those it was trained on; "" keeps all.
        Raises ValueError for timesteps that it does not have.
        """
        chosen = tuple(self.flags[name] for name in _DIFFUSION_FLAGS)
        return _process(self.flags["diffusion_steps"], kept if isinstance(kept, str) else tuple(kept), chosen)


@lru_cache(maxsize=8)  # its tables then go to the device once, not once a batch
def _process(steps: int, kept: str | tuple[int, ...], chosen: tuple) -> SpacedDiffusion:
    trained_on = create_gaussian_diffusion(steps=steps, **dict(zip(_DIFFUSION_FLAGS, chosen, strict=True)))
    if kept == "":
        return trained_on
    return respaced(trained_on, space_timesteps(trained_on.num_timesteps, kept) if isinstance(kept, str) else kept)


class Pool:
    """The models of a folder, in the order of their numbers; each is read when it is asked for.

    Our own checkpoints carry their flags. Of a bare state dict (a public checkpoint, also as safetensors) what the
    tensors tell is read off them, and the rest, such as heads, noise schedule and image size, comes from `flags`.
    """

    def __init__(self, path: str | os.PathLike, flags: Mapping[str, Any] | None = None):
        """path: a folder with subset{1..M}/ckpt/model.pt (or model.safetensors). Or, then M = 1, one checkpoint file,
        or a folder with model.pt directly in it.

        Raises ValueError where there is neither, or where the numbers have a gap.
        """
        self.path, self._flags = Path(path), dict(flags or {})
        self._room: dict[str, int] = {}  # of networks by their flags: images at once that there is memory for
        if self.path.is_file():
            self.files = [self.path]
            return
        found = {}
        for name in ("model.safetensors", "model.pt"):  # of both the latter counts
            for file in self.path.glob(f"subset*/ckpt/{name}"):
                number = re.fullmatch(r"subset(\d+)", file.parent.parent.name)
                if number:
                    found[int(number[1])] = file
        direct = [self.path / name for name in ("model.pt", "model.safetensors") if (self.path / name).is_file()]
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
                "the same image_train.py --pool command again makes those that are missing"
            )
        self.files = [found[m] for m in sorted(found)]

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        """SHA-256 of what all files hold, in their order, as hex digits: it changes with any of them."""
        whole = hashlib.sha256()
        for path in self.files:
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def each(
        self, device: torch.device, precision: str = "float32", only: Sequence[int] | None = None
    ) -> Iterator[PoolModel]:
        """The models `only` (None: all), as `load` gives them; the next is read while the last one given is at work."""
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
        """Read model `index` (from 0) onto `device`, strictly, with weights as `inference_dtype` has them.

        Raises CheckpointError for a file that is damaged, of another kind, or does not fit its flags.
        """
        path = self.files[index]
        payload = checkpoint.load(path)
        weights, flags, num_classes = self._describe(payload, path)
        flags["use_fp16"] = False  # says how it was trained; how it draws is for `precision` to say
        network = _on_meta(flags, path)
        checkpoint.check_state(network, weights, path)
        checkpoint.check_size(weights, path)
        network.to_empty(device="cpu")
        checkpoint.load_state(network, weights, path)
        dtype = inference_dtype(precision, torch.device(device), flags["num_channels"])
        layout = torch.contiguous_format if dtype == torch.float32 else torch.channels_last
        network = network.to(device, dtype, memory_format=layout)
        if worth_compiling(torch.device(device), flags["num_channels"]):
            compile_in_place(network)
        model = PoolModel(network.eval().requires_grad_(False), flags, num_classes, path)
        try:
            model.diffusion()
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{path}: no process is like this ({error}); give its flags") from error
        return model

    def room(self, model: PoolModel, batch: int, device: torch.device, *, found: int | None = None) -> int:
        """How many of `batch` images to pass `model` at once, by the memory at hand when first asked of one like it.

        found: images at once that turned out to fit, which counts from then on.
        """
        alike = repr(sorted(model.flags.items()))
        if found is not None:
            self._room[alike] = found
        elif alike not in self._room:
            self._room[alike] = that_fit(model.flags, batch, device)
        return min(batch, self._room[alike])

    def share_classes(self, num_classes: int = 0, per_model: int = 0) -> list[int]:
        """Pseudo classes of each model, in order.

        num_classes: of the whole pool; 0 takes what each checkpoint says that it was trained on.
        per_model: classes a model, the last one having what is left; 0 shares them out evenly.
        Raises ValueError where the pool is of another size than that needs, or where a checkpoint does not tell.
        """
        if num_classes:
            least, more = divmod(num_classes, len(self))
            counts = [least + (m < more) for m in range(len(self))]
            if per_model:
                counts = [min(per_model, num_classes - per_model * m) for m in range(len(self))]
            if min(counts) < 1 or sum(counts) != num_classes:
                share = per_model or 1
                raise ValueError(
                    f"{self.path}: got {len(self)} models for {num_classes} pseudo classes, {share} or more a model, "
                    f"expected {-(-num_classes // share)} models; give another --pool or --num-classes"
                )
            return counts
        counts = [self._describe(checkpoint.load(path), path)[2] for path in self.files]
        if None in counts:
            path = self.files[counts.index(None)]
            raise ValueError(f"{path}: does not tell how many classes it was trained on; give --num-classes")
        return counts

    def check(self, classes: Sequence[int], steps: int, unconditional: bool = False) -> None:
        """Read every model once, so that what is wrong with one is said before hours of drawing from others.

        classes: pseudo classes of each model; steps: of DDIM; unconditional: whether a model must not take labels.
        Raises ValueError where one does not load, or cannot do that, or is conditional on fewer classes.
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
                    f"{model.path}: is conditional, so what it draws has a class already; clusters and likely classes "
                    "are for unconditional models: give --recipe paper"
                )
            if model.class_cond and count > model.flags["num_classes"]:
                raise ValueError(
                    f"{model.path}: is conditional on {model.flags['num_classes']} classes, got {count} pseudo classes "
                    "for it; give fewer --num-classes"
                )

    def _describe(self, payload: Any, path: Path) -> tuple[Mapping, dict[str, Any], int | None]:
        """Weights, flags and number of classes of a checkpoint of ours, or of what else holds a state dict."""
        if not isinstance(payload, Mapping):
            raise checkpoint.CheckpointError(f"{path}: got {type(payload).__name__}, expected a state dict")
        if "model" in payload and "flags" in payload:
            weights, flags = payload.get("ema", payload["model"]), payload["flags"]  # the former of a training's state
            if not isinstance(weights, Mapping) or not isinstance(flags, Mapping):
                raise checkpoint.CheckpointError(f"{path}: holds no weights with their flags; make the model again")
            _check_flags(flags, path)
            classes = payload.get("num_classes") or (flags.get("num_classes") if flags.get("class_cond") else None)
            _check_flags({"num_classes": classes or 0}, path)
            return weights, {**model_and_diffusion_defaults(), **flags}, classes
        weights = unwrapped(payload)
        if weights is None:
            raise checkpoint.CheckpointError(f"{path}: holds {contents(payload)}; give the checkpoint of a U-Net")
        flags = {**model_and_diffusion_defaults(), **self._flags}
        try:
            flags.update(infer_model_flags(weights, flags["image_size"]))
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{path}: {error}") from None
        return weights, flags, flags["num_classes"] if flags["class_cond"] else None


def _check_flags(flags: Mapping[str, Any], path: Path) -> None:
    """Refuse flags of a type or a size that no model has: a network or a process of them could fill the memory."""
    for name, default in model_and_diffusion_defaults().items():
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


def _on_meta(flags: Mapping[str, Any], path: Path) -> UNetModel:
    """The U-Net of `flags` without memory for its weights, which would be slow to draw and are replaced at once."""
    try:
        with torch.device("meta"):
            return network_of(flags)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise checkpoint.CheckpointError(f"{path}: no U-Net is like this ({error}); give the flags it has") from error
