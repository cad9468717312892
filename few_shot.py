"""Few-shot classification: linear heads on a frozen meta-model, fitted on images and their diffusion mixes.

    classifier = FewShotClassifier("ckpt/runs/glyphs/1-shot/best_model.pt", pool="ckpt/glyphs")
    classifier.fit(images, labels)
    classifier.predict(images)

`HeadFitter` is the method, for many episodes at once, as `diffusionmix.py` runs it. `FewShotClassifier` fits one.
"""

import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from config import BARE, Settings, that_affect
from guided_diffusion.dist_util import pick_device
from guided_diffusion.mix import diffusion_mixes, mix_labels, timesteps_of
from guided_diffusion.pool import Pool, PoolModel
from guided_diffusion.pool_work import work_through
from models.class_learner import load_statistics
from models.episode_head import Heads, fit_heads, meta_test_stages, predict
from models.meta_model import MetaModel
from models.saved import MODEL_ENTRIES, WHAT
from utils import checkpoint
from utils.images import ImageError, pixels_of, resized, shown, to_float, to_uint8
from utils.labels import as_array, check_kinds, encoded, plain_labels
from utils.pieces import Pieces, digest_of
from utils.remote import local
from utils.seeding import generator, noise, numpy_generator

# settings that may differ when a stopped test resumes; images and pool are compared by their contents instead
MAY_CHANGE = that_affect("nothing") | {"compare", "support", "query", "out", "pool", "data_root"}
RATES = (0.05, 0.01, 0.05)  # learning rates of the head's three stages
MIX_BETA = 0.4  # lambda ~ Beta(0.4, 0.4)
RANGES = ((-1, 1), (0, 1))  # accepted for float images
TOLERANCE = 0.001  # how far rounding may push floats outside their range


class HeadFitter:
    """Fits the heads of episodes, with a trained meta-model and the pool that makes the mixes.

    A head is fitted on the support set, on diffusion mixes of it from every pool model, and on the support set again
    (Wei et al., IEEE TCSVT 2024). Classes count the same even with unequal shots: the cross-entropy of class c is
    weighted by S / (way * images of c), on the mixes as on the support set. With equal shots this weight is 1.

    Attributes:
        s: the settings.
        path: the meta-model's checkpoint.
        device: the device of the networks.
        model: the meta-model, in eval mode.
        size: side of the meta-model's images, in pixels.
        trained: the meta-model's training settings, with its num_classes and image_size.
        pool: the diffusion models; None without mixes.
        precision: number format of the pool models; without mixes, --precision as given.
    """

    def __init__(self, settings: Settings):
        """Load the meta-model and check the pool. Raises ValueError for a missing, damaged or unsuitable checkpoint."""
        s = self.s = settings
        self.device = pick_device(s.device_name)
        self.path = local(s.resume) if s.resume else s.run_folder / "best_model.pt"
        self.model, self.size, self.trained = load_model(self.path, self.device)
        self.pool = Pool.of(s) if s.mix else None
        self.precision = self.pool.precision(s.precision, self.device) if self.pool else s.precision
        for m in range(len(self.pool) if self.pool else 0):  # fail on a bad model before any starts work
            timesteps_of(self.pool.load(m), s.mix_level, s.mix_steps)

    def pieces(self, folder: str, *data: Tensor) -> Pieces:
        """Return the store of mix features in the run folder, its name a hash of model, pool, data and settings."""
        same = {k: v for k, v in self.s.as_dict().items() if k not in MAY_CHANGE}
        with open(self.path, "rb") as file:
            model = hashlib.file_digest(file, "sha256").hexdigest()
        pool = self.pool.digest() if self.pool else ""
        made_with = hashlib.sha256(json.dumps([model, pool, self.precision, digest_of(*data), same]).encode())
        return Pieces(self.s.run_folder / folder / made_with.hexdigest()[:16])

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return features (N, D) of unit length, on the CPU, of images (N, 3, H, W), float in [-1, 1]."""
        return torch.cat([self.model.embed(part.to(self.device)).cpu() for part in images.split(500)])

    def fit(self, support: Tensor, targets: Tensor, mixes: tuple[Tensor, Tensor] | None = None) -> Heads:
        """Fit the heads of E episodes on the device, --test-batch at a time. Return them on the CPU.

        support: (E, S, D) features; targets: (E, S, way) float, one-hot.
        mixes: their features (E, M * S, D) and soft labels (E, M * S, way); None fits on the support set alone.
        """
        s, parts = self.s, []
        for start in range(0, len(support), s.test_batch):
            part = slice(start, start + s.test_batch)
            own = [each[part].to(self.device) for each in (support, targets)]
            mixed = [each[part].to(self.device) for each in mixes] if mixes else None
            stages = meta_test_stages(*own, mixed, steps=s.head_steps, rates=RATES)
            numbers = range(start, start + len(own[0]))
            rngs = [generator(s.seed, "head", i) for i in numbers] if s.head_init == "random" else None
            parts.append(fit_heads(*own, stages, scale=s.head_scale, init=s.head_init, generators=rngs))
        return Heads(torch.cat([h.weight for h in parts]).cpu(), torch.cat([h.bias for h in parts]).cpu(), s.head_scale)

    def learn(self, images: Tensor, labels: Tensor, way: int, pieces: Pieces) -> tuple[Heads, tuple[Tensor, Tensor]]:
        """Fit the head of one episode. Return it, and the logits and labels that `leave_one_out` returns.

        images: (N, 3, size, size) uint8; labels: (N,) int64, 0 to way - 1; pieces: stores the features of finished
        mixes.
        """
        order = labels.argsort(stable=True)
        images, labels = images[order], labels[order]
        targets, mixes = F.one_hot(labels, way).float()[None], None  # (1, N, way)
        if self.pool:
            *mixes, _ = self.mixes(images, torch.arange(len(images))[None], targets, pieces)
        features = self.features(to_float(images))
        return self.fit(features[None], targets, mixes), self.leave_one_out(features, labels)

    def leave_one_out(self, features: Tensor, labels: Tensor, most: int = 100) -> tuple[Tensor, Tensor]:
        """Return logits (K, way) and labels (K,) of K left-out images. Each head is fitted on the N - 1 other images.

        These heads use no mixes. The left-out images are evenly spread over those whose class has another image: at
        most `most`, fewer if N is large. K is 0 if there are none, or only one class.

        features: (N, D); labels: (N,) int64, 0 to way - 1.
        """
        asked = (labels.bincount()[labels] > 1).nonzero().flatten()
        if not len(asked) or len(labels.unique()) < 2:
            return features.new_zeros(0, int(labels.max()) + 1), labels[:0]
        most = max(1, min(most, len(asked), 50_000 // len(labels)))  # 50,000 rows of 1,024 features take 200 MB
        asked = asked[torch.linspace(0, len(asked) - 1, most).long()]
        others = torch.arange(len(labels)).expand(len(asked), -1)[torch.arange(len(labels)) != asked[:, None]]
        others = others.view(len(asked), -1)  # (K, N - 1)
        targets = F.one_hot(labels)[others].float()
        return predict(self.fit(features[others], targets), features[asked][:, None])[:, 0], labels[asked]

    def mixes(
        self, images: Tensor, support: Tensor, targets: Tensor, pieces: Pieces,
        keep: Callable[[int, int], bool] = lambda m, item: False,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Make the mixes of every pool model. Return features (E, M * S, D), soft labels (E, M * S, way), some images.

        The pool models work one after another, so each checkpoint is read once. `pieces` stores finished batches, and
        several processes share the work.

        images: (N, 3, size, size) uint8; support: (E, S) int64 indices of images; targets: (E, S, way) labels.
        keep: (m, item) -> whether to return the image of mix `item` (numbered from 0 over all episodes) of model m.
            The images are (K, 3, size, size) uint8.
        """
        s, (count, shots) = self.s, support.shape
        partners = [self.partners(m, count, shots) for m in range(len(self.pool))]
        made = work_through(
            self.pool,
            [count * shots] * len(self.pool),
            partial(self.mix_part, images, support, partners, keep),
            pieces,
            batch=s.sample_batch,
            device=self.device,
            precision=self.precision,
            desc="mixes",
        )
        features = made["features"].unflatten(0, (len(self.pool), count, shots))
        labels = [
            mix_labels(targets, targets.gather(1, order[..., None].expand_as(targets)), weight)
            for order, weight in partners
        ]
        return features.transpose(0, 1).flatten(1, 2), torch.cat(labels, 1), made["pictures"]

    def partners(self, m: int, episodes: int, shots: int) -> tuple[Tensor, Tensor]:
        """Return each support image's partner (E, S) in the mixes of model m, and its own share (E, S) of its mix."""
        rngs = [numpy_generator(self.s.seed, "mix", m, i) for i in range(episodes)]
        order = torch.stack([torch.from_numpy(rng.permutation(shots)) for rng in rngs])
        weight = torch.stack([torch.from_numpy(rng.beta(MIX_BETA, MIX_BETA, shots)) for rng in rngs])
        return order, weight.float()

    def mix_part(
        self, images: Tensor, support: Tensor, partners: list[tuple[Tensor, Tensor]], keep: Callable[[int, int], bool],
        member: PoolModel, m: int, part: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return the `features` of the mixes numbered `part` of pool model m, and the mixes to keep as `pictures`."""
        mixed = resized(self.mixed(images, support, partners[m], member, m, part), self.size)
        kept = torch.tensor(
            [i for i, item in enumerate(part.tolist()) if keep(m, item)], dtype=torch.int64, device=mixed.device
        )
        return {"features": self.features(mixed), "pictures": to_uint8(mixed[kept]).cpu()}

    def mixed(
        self, images: Tensor, support: Tensor, partners: tuple[Tensor, Tensor], member: PoolModel, m: int, part: Tensor
    ) -> Tensor:
        """Return the mixes numbered `part` of pool model m, at its size: (N, 3, size, size), float in [-1, 1]."""
        s, size, (order, weight) = self.s, member.image_size, partners
        pairs = (support.flatten()[part], support.gather(1, order).flatten()[part])
        x_a, x_b = (resized(to_float(images[index].to(self.device)), size) for index in pairs)
        eps = noise((3, size, size), part.tolist(), s.seed, "mix noise", m).to(self.device)
        local_labels = None
        if member.class_cond:  # drawn, so that a mix's class says nothing about its label
            drawn = numpy_generator(s.seed, "mix class", m).integers(member.flags["num_classes"], size=support.numel())
            local_labels = torch.from_numpy(drawn)[part].to(self.device)
        return diffusion_mixes(
            member, x_a, x_b, weight.flatten()[part].to(self.device), eps,
            level=s.mix_level, steps=s.mix_steps, local_labels=local_labels,
        )  # fmt: skip


class FewShotClassifier:
    """A classifier that learns each class from a few images, with scikit-learn's methods.

    Images are a list of paths, PIL images or single arrays; or one array or tensor of RGB images, (N, H, W, 3) uint8 or
    (N, 3, H, W) float in [-1, 1], or in [0, 1] with value_range=(0, 1). They may have any size: the central square of
    each is resized by Lanczos to the meta-model's size. Labels are a list, array or column of one hashable value per
    image.

    All randomness comes from `seed`. The order of the classes does not matter; the order of the images in a class
    decides which are mixed. scikit-learn is not required, but its `clone`, pipelines and cross-validation work, and so
    does `pickle`.

    Args:
        model: path or address of best_model.pt or last.pt of a run of main.py.
        pool: folder, checkpoint or address of the diffusion models that make mixes; None fits on the images alone.
        mix_level, mix_steps, head_steps, head_init, head_scale, seed, sample_batch, precision, device: as the flags of
            `diffusionmix.py`; config.py has their ranges.
        pool_flags: flags that bare public checkpoints in the pool lack, such as {"num_heads": 4}.
        value_range: range of float images: (-1, 1), or (0, 1) as from torchvision's ToTensor. None means (-1, 1), but
            a call whose floats are never negative is refused, because they may be in [0, 1].

    Attributes:
        classes_: (way,) array of the labels, sorted; by type and text if they do not compare.
        fitter_: the loaded model and pool.
        heads_: the fitted head, as the `Heads` of one episode.
        left_out_: logits (K, way) and labels (K,) of `HeadFitter.leave_one_out`; only after `fit`, not after `load`.
        sharpness_: factor of the logits in `predict_proba`: `sharpness` of left_out_.
    """

    _estimator_type = "classifier"

    def __init__(
        self,
        model: str | os.PathLike,
        pool: str | os.PathLike | None = None,
        *,
        mix_level: int = Settings.mix_level,
        mix_steps: int = Settings.mix_steps,
        head_steps: int = Settings.head_steps,
        head_init: str = Settings.head_init,
        head_scale: float = Settings.head_scale,
        seed: int = Settings.seed,
        sample_batch: int = Settings.sample_batch,
        precision: str = Settings.precision,
        device: str = Settings.device,
        pool_flags: Mapping[str, Any] | None = None,
        value_range: tuple[float, float] | None = None,
    ):
        self.model, self.pool, self.pool_flags = model, pool, pool_flags  # unchanged: scikit-learn's clone expects it
        self.mix_level, self.mix_steps = mix_level, mix_steps
        self.head_steps, self.head_init, self.head_scale = head_steps, head_init, head_scale
        self.seed, self.sample_batch, self.precision, self.device = seed, sample_batch, precision, device
        self.value_range = value_range

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments by name; `deep` has no effect."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> "FewShotClassifier":
        """Change constructor arguments for the next `fit`, and return self. Raises ValueError for an unknown name."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"got the parameter {name!r}, expected one of {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        """Return the tags of a classifier. Only scikit-learn 1.6 or newer calls this."""
        from sklearn.utils import ClassifierTags, Tags, TargetTags

        return Tags("classifier", TargetTags(required=True), classifier_tags=ClassifierTags())

    def __repr__(self) -> str:
        return f"FewShotClassifier({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    def settings(self) -> Settings:
        """Return the parameters as settings of `diffusionmix.py`. Raises ValueError if one is out of range."""
        params = self.get_params()
        model, pool, flags = (params.pop(name) for name in ("model", "pool", "pool_flags"))
        del params["value_range"]  # `diffusionmix.py` has no such flag
        if odd := sorted(set(flags or {}) - set(BARE)):
            raise ValueError(f"got pool_flags with {', '.join(odd)}, expected some of {', '.join(BARE)}")
        places = {"resume": os.fspath(model), "pool": os.fspath(pool or ""), "mix": bool(pool)}
        return Settings(**places, **params, **(flags or {}))

    def fit(self, images: Iterable, labels: Iterable[Hashable]) -> "FewShotClassifier":
        """Fit the head on labelled images: 2 or more classes, with any number of images each. Return self.

        Each class counts the same, however many images it has; see `HeadFitter`. `images`, `labels`: see the class.
        Raises ValueError for images or labels of another kind, for unequal numbers of them, and for a model or pool
        that does not load.
        """
        fitter = HeadFitter(self.settings())
        classes, numbers = encoded(plain_labels(labels))
        pixels = _read(images, fitter.size, self.value_range)
        if len(pixels) != len(numbers):
            raise ValueError(f"got {len(pixels)} images and {len(numbers)} labels, expected one label per image")
        self.heads_, self.left_out_ = fitter.learn(pixels, numbers, len(classes), Pieces())
        self.sharpness_ = sharpness(*self.left_out_)
        self.fitter_, self.classes_ = fitter, classes
        return self

    def predict_proba(self, images: Iterable) -> np.ndarray:
        """Return class probabilities (N, way), float64, of images; columns as in `classes_`. See `probabilities`."""
        self._check_fitted()
        return probabilities(self.heads_, self.sharpness_, torch.from_numpy(self.transform(images)))

    def transform(self, images: Iterable) -> np.ndarray:
        """Return the features (N, D), float32 of unit length, that the head gets of images."""
        self._check_fitted()
        return self.fitter_.features(to_float(_read(images, self.fitter_.size, self.value_range))).numpy()

    def save(self, path: str | os.PathLike) -> None:
        """Write the fitted head to one file. The file holds the path of the meta-model, not its weights.

        Raises ValueError if the classifier is not fitted, or if a label is neither text nor a number.
        """
        self._check_fitted()
        classes = self.classes_.tolist()
        if odd := [label for label in classes if not isinstance(label, str | int | float)]:
            raise ValueError(f"got the label {odd[0]!r}, expected texts or numbers; use pickle for others")
        params = self.get_params() | {"model": self.fitter_.s.resume}  # set_params may have named another one since
        params = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in params.items()}
        params = {k: v.item() if isinstance(v, np.generic) else v for k, v in params.items()}
        head = {"weight": self.heads_.weight, "bias": self.heads_.bias, "scale": float(self.heads_.scale)}
        checkpoint.save(Path(path), {"params": params, "classes": classes, "sharpness": self.sharpness_, **head})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FewShotClassifier":
        """Return the classifier that `save` wrote, ready to predict. The pool is not read.

        Raises ValueError for a file that `save` did not write, and for a model that does not load.
        """
        state = checkpoint.load(Path(path))
        checkpoint.entries(state, Path(path), _SAVED, "file of FewShotClassifier.save")
        classifier = cls(**state["params"])
        classifier.fitter_ = HeadFitter(replace(classifier.settings(), mix=False))
        classifier.heads_ = Heads(state["weight"], state["bias"], state["scale"])
        classifier.sharpness_, classifier.classes_ = state["sharpness"], as_array(state["classes"])
        return classifier

    def _check_fitted(self) -> None:
        if not hasattr(self, "heads_"):
            raise ValueError("this FewShotClassifier is not fitted yet; call fit(images, labels) first")

    def predict(self, images: Iterable) -> np.ndarray:
        """Return the likeliest label (N,) of each image."""
        best = self.predict_proba(images).argmax(1)
        return self.classes_[best]

    def score(self, images: Iterable, labels: Iterable[Hashable]) -> float:
        """Return the accuracy, 0 to 1, of the predicted labels.

        Raises ValueError as `fit` does, and for labels that no prediction equals, such as texts if `fit` got numbers.
        """
        found, wanted = self.predict(images), plain_labels(labels)
        check_kinds(wanted, self.classes_.tolist())
        if len(found) != len(wanted):
            raise ValueError(f"got {len(found)} images and {len(wanted)} labels, expected one label per image")
        return float(np.mean([a == b for a, b in zip(found.tolist(), wanted, strict=True)]))


def probabilities(heads: Heads, factor: float, features: Tensor) -> np.ndarray:
    """Return softmax(factor * logits) (N, way), float64, of features (N, D) under the head of one episode.

    The factor is needed because the head takes few, small steps, which leave its own probabilities close together.
    An image's row depends on no other image.
    """
    return (factor * predict(heads, features[None])[0].double()).softmax(-1).numpy()


def sharpness(logits: Tensor, labels: Tensor) -> float:
    """Return the factor of the logits, from 1 to 1000, that makes the mean highest probability equal the accuracy.

    The accuracy is taken as (right + 1) / (K + 2), so that a few images, all right, do not mean certainty. The factor
    is 1 if K is 0.

    logits: (K, way) of images that the head was not fitted on; labels: (K,) int64.
    """
    if not len(labels):
        return 1.0
    share = float((logits.argmax(1) == labels).sum() + 1) / (len(labels) + 2)
    low, high = 0.0, math.log(1000)
    for _ in range(40):  # the mean rises with the factor
        middle = (low + high) / 2
        surer = float((math.exp(middle) * logits.double()).softmax(1).amax(1).mean()) > share
        low, high = (low, middle) if surer else (middle, high)
    return math.exp(low)


_SAVED = {
    "params": lambda value: isinstance(value, Mapping) and "model" in value,
    "classes": lambda value: isinstance(value, list) and len(value) > 1,
    "sharpness": lambda value: isinstance(value, float) and 0 < value < math.inf,
    "weight": torch.is_tensor,
    "bias": torch.is_tensor,
    "scale": lambda value: isinstance(value, float | int),
}


def load_model(path: Path, device: torch.device) -> tuple[MetaModel, int, dict[str, Any]]:
    """Return a run's meta-model in eval mode, its image size in pixels, and its training settings.

    The settings include num_classes and image_size. Raises ValueError if the file is missing, damaged, or not a
    checkpoint of main.py.
    """
    if not path.exists():
        found = sorted(map(str, path.parent.parent.parent.glob(f"*/*/{path.name}")))[:3]
        there = f" (there is {', '.join(found)})" if found else ""
        raise ValueError(
            f"{path}: no such checkpoint; make it by main.py with the same --dataset and --shot, or name one with "
            f"--resume{there}"
        )
    state = checkpoint.load(path, device)
    checkpoint.entries(state, path, MODEL_ENTRIES, WHAT)
    settings = state["settings"]
    shape = dict(features=settings.get("features", "pooled"), image_size=state["image_size"])
    with torch.device("meta"):  # no memory is spent before the weights are known to fit
        network = MetaModel(state["num_classes"], backbone=settings["backbone"], **shape)
    checkpoint.check_state(network, state["model"], path)
    checkpoint.check_size(state["model"], path)
    with torch.random.fork_rng(devices=[]):  # drawing initial weights must not change the caller's random state
        model = MetaModel(state["num_classes"], settings["scale_cls"], settings["backbone"], **shape)
    model.to(device)
    checkpoint.load_state(model, state["model"], path)
    load_statistics(model, state["model_statistics"], path)
    known = {"num_classes": state["num_classes"], "image_size": state["image_size"]}
    return model.eval(), state["image_size"], {**settings, **known}


def _read(images: Iterable, size: int, value_range: Sequence[float] | None) -> Tensor:
    """Return images, in any form that `FewShotClassifier` accepts, as (N, 3, size, size) uint8."""
    if value_range is not None and (not isinstance(value_range, list | tuple) or tuple(value_range) not in RANGES):
        raise ValueError(f"got value_range {value_range!r}, expected {RANGES[0]}, {RANGES[1]} or None")
    single = isinstance(images, str | os.PathLike | Mapping | Set) or not isinstance(images, Iterable)
    if single or (isinstance(images, np.ndarray | Tensor) and images.ndim not in (1, 4)):
        got = getattr(images, "shape", type(images).__name__)
        raise ValueError(
            f"got images {got if isinstance(got, str) else tuple(got)}, expected a list of them, or an array "
            "(N, H, W, 3) uint8 or (N, 3, H, W) float in [-1, 1]; put a single one into a list"
        )
    images = list(images)
    if not images:
        raise ValueError("got no images, expected one or more")
    zero_to_one = value_range is not None and tuple(value_range) == (0, 1)

    def read(image: object) -> np.ndarray | str:
        try:
            return pixels_of(_centred(image) if zero_to_one and _is_float(image) else image, size)
        except ImageError as error:
            return str(error)

    for image in images:
        if isinstance(image, Image.Image):  # two threads cannot load one image that is listed twice
            with suppress(Exception):  # `read` says what is wrong
                image.load()
    with ThreadPoolExecutor() as threads:
        done = list(threads.map(read, images))
    for number, (image, result) in enumerate(zip(images, done, strict=True)):
        if isinstance(result, str):
            name = shown(image) if isinstance(image, str | os.PathLike) else f"image number {number} (from 0)"
            raise ValueError(f"{name}: {result}")
    lowest = min((float(image.min()) for image in images if _is_float(image)), default=-1.0)
    if value_range is None and lowest > -TOLERANCE:
        raise ValueError(
            f"got float images without a negative value (from {lowest:g}), expected [-1, 1]; give value_range=(0, 1) "
            "to FewShotClassifier if they are in [0, 1], value_range=(-1, 1) if they are right as they are"
        )
    return torch.from_numpy(np.stack(done))


def _is_float(image: object) -> bool:
    if isinstance(image, np.ndarray):
        return np.issubdtype(image.dtype, np.floating)
    return isinstance(image, Tensor) and image.is_floating_point()


def _centred(image: np.ndarray | Tensor) -> Tensor:
    """Map floats in [0, 1] to [-1, 1]. Raises ImageError for values outside [0, 1]."""
    found = torch.as_tensor(image).detach().to(torch.float32)
    low, high = (float(found.min()), float(found.max())) if found.numel() else (0.0, 1.0)
    if not -TOLERANCE < low <= high < 1 + TOLERANCE:  # refuses NaN, too
        raise ImageError(f"has values from {low:g} to {high:g}, expected [0, 1], as value_range says")
    return 2 * found - 1
