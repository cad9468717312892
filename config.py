"""Typed settings. A setting is declared once, here: flag, default, check and `config.json` come from its field.

`SCENARIOS` holds what a `--dataset` changes; flags given on the command line win over it.
"""

import argparse
import errno
import os
import sys
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets.episodes import too_few
from models import backbones
from utils.cli import OneLineParser

SOURCES = ("guided", "unguided", "by_model", "real", "none")
SPLITS = ("meta_val", "meta_test")
MOST = 1_000_000  # of a number without a limit of its own
# removed settings: a run folder that names them resumes only if they have these values
GONE = {"sampler": "ddim", "first_labels": "random", "guide_on": "x_t", "ask": "equal", "warm_up": 3, "restart": False,
        "replay": 0, "within_weight": 1.0}  # fmt: skip
BARE = ("image_size", "num_heads", "num_heads_upsample", "num_head_channels", "use_new_attention_order",
        "noise_schedule", "diffusion_steps", "timestep_respacing", "predict_xstart", "rescale_timesteps")  # fmt: skip
_GROUPS = {  # group -> its title in --help, and what a setting of it affects unless it says otherwise
    "needed first": ("most used", "both"),
    "machine": ("the machine and its memory", "nothing"),
    "synthesis": ("synthesis: the pool and its images", "training"),
    "bare checkpoints": ("bare checkpoints: settings that public ones do not record", "both"),
    "episodes": ("episodes", "both"),
    "learning": ("learning", "training"),
    "testing": ("testing", "testing"),
}


def setting(
    default: Any, help: str, *, flags: tuple[str, ...] = (), choices=None, low=None, high=None, group="needed first",
    affects="",
):  # fmt: skip
    """Return a dataclass field that becomes a flag.

    flags: other names of it. low, high: the range that a number must lie in, inclusive; without `high` a number may be
    up to `MOST`, so that none is infinite, or keeps a run busy for ever. affects: the result of "training", "testing",
    "both" or "nothing"; by default what its group says.
    """
    extra = dict(help=help, flags=flags, choices=choices, low=low, high=high, group=group)
    return field(default=default, metadata=extra | dict(affects=affects or _GROUPS[group][1]))


@dataclass(frozen=True)
class Settings:
    """All settings of `main.py` and `diffusionmix.py`."""

    # those that users need first
    dataset: str = setting("glyphs", "scenario", flags=("-d",))
    source: str = setting("guided", "images to train on: guided; unguided, with the best available labels; by_model, "
                          "unguided and labelled by the model that drew them; real, as a reference; none",
                          choices=SOURCES, affects="training")  # fmt: skip
    recipe: str = setting("paper", "paper: the paper's recipe, corrected; clusters: labels by clusters. At 1 shot, an "
                          "earlier version of clusters was 7.1 points better than paper on glyphs and 1.1 worse on "
                          "emojis. The default depends on --dataset: clusters, but paper for co_*",
                          choices=("paper", "clusters"), affects="training")  # fmt: skip
    data_root: str = setting("", "folder with meta_train, meta_val and meta_test, or one folder per domain, "
                             "comma-separated; '': data/DATASET")  # fmt: skip
    pool: str = setting("", "pool folder or single checkpoint file, or a gs://, az:// or https:// URL of either; "
                        "'': ckpt/pools/DATASET, or ckpt/DATASET for glyphs and fontchars")  # fmt: skip
    save_dir: str = setting("", "run folder; '': ckpt/runs/DATASET/N-shot", affects="nothing")
    resume: str = setting("", "checkpoint file or URL: diffusionmix.py tests it; main.py starts from it, in the "
                        "clusters recipe only for the last network",
                        affects="nothing")  # fmt: skip
    nKnovel: int = setting(5, "way: classes per episode", flags=("--way",), low=2)
    nExemplars: int = setting(1, "shot: support images per class", flags=("--shot",), low=1)
    samples_per_class: int = setting(600, "images per pseudo class in each round, on average in the clusters recipe",
                                     low=1, affects="training")  # fmt: skip
    max_epoch: int = setting(90, "epochs", low=1, affects="training")
    split: str = setting("", "classes to test on; '': as given by --phase", choices=("", *SPLITS), affects="testing")
    mix: bool = setting(True, "also test heads fitted on diffusion mixes", affects="testing")
    compare: str = setting("", "run folder or results file of another test on the same episodes: print this run's last "
                           "test minus that one, paired, then stop", affects="testing")  # fmt: skip
    support: str = setting("", "folder of your own images to learn from, one subfolder per class", affects="testing")
    query: str = setting("", "folder of your own images to label, searched recursively, or one image",
                         affects="testing")  # fmt: skip
    out: str = setting("", "CSV file for the labels; '': predictions.csv in the run folder", affects="testing")
    seed: int = setting(1, "seed of all randomness", low=0, high=2**63 - 1)
    device: str = setting("auto", "auto, cpu, cuda or cuda:N", affects="nothing")
    quiet: bool = setting(False, "print only the last line, no progress", affects="nothing")
    dry_run: bool = setting(False, "print the work ahead with a time estimate, then stop", affects="nothing")

    # the machine
    gpu_devices: str = setting("", "GPU number: 0 means --device cuda:0", flags=("-g",),
                               group="machine")  # fmt: skip
    precision: str = setting("auto", "number format of the diffusion models; auto: the faster one",
                             choices=("auto", "float32", "bf16"), group="machine", affects="both")  # fmt: skip
    workers: int = setting(4, "threads that read images", flags=("-j",), low=0, high=1024, group="machine")
    sample_batch: int = setting(250, "images per batch of the diffusion models; halved if memory is short", low=1,
                                group="machine")  # fmt: skip
    test_batch: int = setting(100, "episodes whose heads are fitted at once", low=1, group="machine")
    tensorboard: bool = setting(False, "also write scalars and image sheets for TensorBoard to the run folder",
                                group="machine")  # fmt: skip

    # the pool and its images
    height: int = setting(0, "pixels per side; 0: the size of the pool's images", low=0, high=4096, group="synthesis")
    width: int = setting(0, "pixels; must equal the height", low=0, group="synthesis")
    num_classes: int = setting(0, "pseudo classes C; 0: the number recorded in the pool", low=0, group="synthesis")
    sample_steps: int = setting(25, "DDIM steps per image", low=2, high=1000, group="synthesis")
    renoise: float = setting(0.0, "fraction of the noise that each denoising step replaces", low=0, high=1,
                             group="synthesis")  # fmt: skip
    guidance_scale: float = setting(1.0, "s in s * grad log p(c | x)", low=0, group="synthesis")
    views: int = setting(4, "augmented views that guidance averages over, in the clusters recipe", low=1, high=64,
                         group="synthesis")  # fmt: skip
    refresh_every: int = setting(10, "epochs per round; 2 or more in the clusters recipe", low=1, group="synthesis")

    # pools whose checkpoints do not record their settings
    image_size: int = setting(64, "pixels per side", low=8, high=4096, group="bare checkpoints")
    num_heads: int = setting(4, "attention heads", low=1, group="bare checkpoints")
    num_heads_upsample: int = setting(-1, "attention heads in the decoder; -1: as in the encoder", low=-1,
                                      group="bare checkpoints")  # fmt: skip
    num_head_channels: int = setting(-1, "channels per attention head; -1: set by the number of heads", low=-1,
                                     group="bare checkpoints")  # fmt: skip
    use_new_attention_order: bool = setting(False, "split queries, keys and values before the heads",
                                            group="bare checkpoints")  # fmt: skip
    noise_schedule: str = setting("cosine", "noise schedule", choices=("linear", "cosine"),
                                  group="bare checkpoints")  # fmt: skip
    diffusion_steps: int = setting(1000, "timesteps in training", low=1, group="bare checkpoints")
    timestep_respacing: str = setting("", "subset of timesteps it was trained on, such as 250 or ddim25; '': all",
                                      group="bare checkpoints")  # fmt: skip
    predict_xstart: bool = setting(False, "the network predicts the image, not the noise", group="bare checkpoints")
    rescale_timesteps: bool = setting(False, "scale t to 1000 for the network, whatever the number of steps",
                                      group="bare checkpoints")  # fmt: skip

    # episodes
    train_nTestNovel: int = setting(30, "query images per training episode, over all classes", low=1,
                                    flags=("--train-queries",), group="episodes", affects="training")  # fmt: skip
    nTestNovel: int = setting(75, "query images per test episode, over all classes", flags=("--queries",), low=1,
                              group="episodes")  # fmt: skip
    train_epoch_size: int = setting(1200, "training episodes per epoch; divided by --train-batch it gives the steps "
                                    "per epoch, in both recipes", flags=("--train-episodes",), low=1,
                                    group="episodes", affects="training")  # fmt: skip
    train_batch: int = setting(32, "episodes per training step; also sets the steps per epoch, see --train-epoch-size",
                               low=1, group="episodes", affects="training")  # fmt: skip
    image_batch: int = setting(96, "images per training step in the clusters recipe, which has no episodes", low=2,
                               group="episodes", affects="training")  # fmt: skip
    epoch_size: int = setting(600, "episodes per validation", flags=("--val-episodes",), low=2, group="episodes",
                              affects="training")  # fmt: skip

    # learning
    backbone: str = setting("conv4", f"backbone of the meta-model: {backbones.about()}", group="learning")
    features: str = setting("pooled", "image features: the feature map averaged over locations (pooled) or whole (map)",
                            choices=("pooled", "map"), group="learning")  # fmt: skip
    drop_rate: float = setting(0.0, "DropBlock rate, if the backbone has it", low=0, high=0.99, group="learning")
    scale_cls: float = setting(7.0, "scale of the cosine scores", low=0, group="learning")
    optim: str = setting("sgd", "optimiser", choices=("sgd", "adamw"), group="learning")
    lr: float = setting(0.1, "learning rate of the meta-model; falls in steps (paper) or as a cosine for each network "
                        "(clusters)", low=0, high=10, group="learning")  # fmt: skip
    learner_rate: float = setting(0.1, "learning rate of the paper's class-learner, relative to --lr", low=0, high=100,
                                  group="learning")  # fmt: skip
    weight_decay: float = setting(5e-4, "weight decay", low=0, high=1, group="learning")
    start_epoch: int = setting(0, "first epoch, if --resume names weights only", low=0, group="learning")
    kl_weight: float = setting(1.0, "weight of KL(g || h)", low=0, group="learning")
    dense_weight: float = setting(0.5, "weight of the dense prototype loss", low=0, group="learning")
    validate_every: int = setting(1, "epochs between validations", low=1, group="learning")
    flip: bool = setting(True, "mirror training images; use False if left and right differ", group="learning")

    # meta-testing
    phase: str = setting("test", "val or test: same as --split meta_val or meta_test", choices=("val", "test"),
                         group="testing")  # fmt: skip
    episodes: int = setting(600, "test episodes", low=2, group="testing")
    mix_level: int = setting(200, "noise level of the mixes: t in the 1000-step cosine schedule, whatever the pool's "
                             "schedule", low=1, high=1000, group="testing")  # fmt: skip
    mix_steps: int = setting(1, "denoising steps per mix; at most --mix-level, and at most a pool model's timesteps up "
                             "to that level", low=1, high=1000, group="testing")  # fmt: skip
    head_steps: int = setting(50, "SGD steps in each of the three stages of fitting the head", low=1, group="testing")
    head_init: str = setting("zeros", "head initialisation", choices=("zeros", "random", "prototypes"), group="testing")
    head_scale: float = setting(1.0, "scale of the head's unit-length features; higher: more confident probabilities",
                                low=0, group="testing")  # fmt: skip

    def __post_init__(self) -> None:
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise ValueError(f"got {flag_of(f)} {value!r}, expected one of {', '.join(f.metadata['choices'])}")
            if isinstance(value, str | bool):
                continue
            if not (low is None or value >= low) or not (high is None or value <= high):  # refuses NaN, too
                raise ValueError(f"got {flag_of(f)} {value}, expected {_range(low, high)}")
            if value > MOST and f.name != "seed":
                raise ValueError(f"got {flag_of(f)} {value:g}, expected at most {MOST:,}")
        backbones.check(self.backbone)
        if self.dataset not in SCENARIOS:
            raise ValueError(f"got --dataset {self.dataset!r}, expected one of {', '.join(SCENARIOS)}")
        for name in ("train_nTestNovel", "nTestNovel"):
            if getattr(self, name) % self.nKnovel:
                raise ValueError(
                    f"got --{name} {getattr(self, name)}, expected a multiple of the {self.nKnovel} classes of an "
                    f"episode, such as {self.nKnovel * max(1, getattr(self, name) // self.nKnovel)}"
                )
        if self.height != self.width and self.width:
            raise ValueError(f"got {self.height} x {self.width} pixels, expected a square; give the same number twice")
        if self.source == "guided" and self.guidance_scale == 0:
            raise ValueError("got --guidance-scale 0, which guides nothing; give more, or --source unguided")
        if self.finds_classes:
            for flag, epochs in (("--refresh-every", self.refresh_every), ("--max-epoch", self.max_epoch)):
                if epochs < 2:
                    raise ValueError(
                        f"got {flag} {epochs}, expected 2 or more: --recipe clusters halves the first round"
                    )
            if self.source == "guided" and self.max_epoch <= self.refresh_every:
                raise ValueError(
                    f"got --max-epoch {self.max_epoch}, expected more than --refresh-every, {self.refresh_every}: "
                    "the first round is not guided; give more epochs, or --source unguided"
                )
        elif self.source == "by_model" and self.recipe == "paper":
            raise ValueError("got --source by_model with --recipe paper, expected --source unguided, which is the same")
        self._check_names()
        roots = self.data_root.split(",") if self.data_root else []
        names = [{Path(root).resolve().name, os.path.basename(os.path.abspath(root))} for root in roots]
        if "" in roots or any(a & b for i, a in enumerate(names) for b in names[:i]):
            raise ValueError(
                f"got --data-root {self.data_root!r}, expected folders with different names, separated by commas"
            )
        if self.start_epoch >= self.max_epoch:
            raise ValueError(f"got --start-epoch {self.start_epoch}, expected less than --max-epoch, {self.max_epoch}")
        if self.start_epoch and not self.resume and not (self.run_folder / "last.pt").exists():
            raise ValueError(
                f"got --start-epoch {self.start_epoch} without --resume, the weights to start from; give both, or "
                "neither: the same command resumes a stopped run by itself"
            )
        nearest = next((p for p in (self.run_folder, *self.run_folder.parents) if p.exists()), None)
        if self.save_dir and nearest and not nearest.is_dir():
            raise ValueError(f"got --save-dir {self.save_dir}, but {nearest} is a file; give another folder")
        if self.mix_steps > self.mix_level:
            raise ValueError(f"got --mix-steps {self.mix_steps}, expected at most --mix-level, {self.mix_level}")
        if bool(self.support) != bool(self.query) or (self.out and not self.query):
            given = " and ".join(f"--{name}" for name in ("support", "query", "out") if getattr(self, name))
            raise ValueError(
                f"got {given}, expected both --support (images to learn from) and --query (images to label)"
            )
        if self.tensorboard and find_spec("tensorboard") is None:
            raise ValueError("got --tensorboard without the package tensorboard; pip install tensorboard")
        if self.out and not self.out.endswith(".csv"):
            raise ValueError(f"got --out {self.out}, expected a name that ends in .csv")

    def _check_names(self) -> None:
        """Refuse names that no file can have, and links that lead back to themselves."""
        for name in ("data_root", "pool", "save_dir", "resume", "compare", "support", "query", "out"):
            for place in filter(None, getattr(self, name).split(",") if name == "data_root" else [getattr(self, name)]):
                try:
                    if "://" not in place:
                        os.stat(place)
                except (OSError, ValueError) as error:
                    number = getattr(error, "errno", errno.EINVAL)
                    if number in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EIO):
                        why = os.strerror(number)
                        raise ValueError(f"got --{name.replace('_', '-')} {place:.80}, {why}; give another") from None

    def check_memory(self, classes: int, size: int, free: int | None) -> None:
        """Refuse training that would not fit into the `free` bytes of memory: ValueError. size: pixels a side."""
        together = self.real_per_class // self.samples_per_class if self.draws else 1  # rounds, copied to be joined
        images = classes * self.samples_per_class * 3 * size**2 * (together + (together > 1))
        paper = self.train_batch * (self.way * self.shot + self.train_nTestNovel)
        step = (paper if self.recipe == "paper" else self.image_batch) * 3 * 4 * size**2
        needed = max(images, step, 8 * 4 * classes**2) * (self.source != "none")  # the last for the learners
        _refuse_above(free, needed, f"{classes} classes, --samples-per-class {self.samples_per_class}, --train-batch "
                      f"{self.train_batch} and images of {size} pixels")  # fmt: skip

    def check_episodes(self, models: int, features: int, free: int | None) -> None:
        """Refuse episodes whose features would not fit into the `free` bytes: ValueError. models: that mix."""
        images = self.way * self.shot * (1 + models) + 2 * self.nTestNovel  # the head copies the queries
        needed = self.episodes * images * (features + self.way) * 4
        _refuse_above(
            free, needed, f"--episodes {self.episodes} of {self.way * self.shot} images and {self.nTestNovel} queries"
        )

    def check_suffices(self, size: int, classes: int, real: Mapping[str, Mapping[str, int]]) -> None:
        """Refuse to train if no step could be made, by one ValueError that names all that is in the way.

        size: pixels of the images; classes: how many to train on; real: split -> class -> how many images it has.
        """
        place, needed = ",".join(map(str, self.data_paths)), self.shot + self.train_nTestNovel // self.way
        capped = self.recipe == "paper" and self.source != "none" and self.samples_per_class < needed
        counted = {
            f"{place}/{split}": each
            for split, each in real.items()
            if split == "meta_val" or (self.recipe == "paper" and not capped)
        }
        lacks = [self._lacking(counted)]
        if self.support:
            lacks.append("got --support and --query, which are flags of diffusionmix.py; run it after training")
        if size < 16:
            lacks.append(f"got images of {size} pixels, the meta-model needs 16; give --height 32 --width 32")
        fewest = 2 if self.recipe == "clusters" else self.way  # which has no episodes
        if classes < fewest and self.draws:
            cure = "a larger pool, a higher --num-classes, or a lower --way"
            if self.labels_by_model:  # a label per model, whatever --num-classes is
                cure = "a larger pool, a lower --way, or --source guided"
            if self.recipe == "clusters":
                cure = "--recipe paper --source guided, or a larger pool"
            lacks.append(
                f"got {classes} classes to train on (--source {self.source}), --recipe {self.recipe} needs {fewest}; "
                f"give {cure}"
            )
        if capped:
            lacks.append(f"got --samples-per-class {self.samples_per_class}, an episode needs {needed}; give more")
        if any(lacks):
            raise ValueError("; also, ".join(filter(None, lacks)))

    def check_images(self, name: str, counts: Mapping[str, int]) -> None:
        """Refuse the real images `name` if no episode can be drawn: ValueError. counts: images of each class."""
        if lacks := self._lacking({name: counts}):
            raise ValueError(lacks)

    def _lacking(self, real: Mapping[str, Mapping[str, int]]) -> str:
        """Return what the real images lack, and flags that would make them enough; "" if nothing is lacking.

        real: what the images are, by the name of their split -> class -> how many images it has.
        """
        lacks, way = [], self.way
        queries = {name: getattr(self, name) // self.way for name in ("train_nTestNovel", "nTestNovel")}
        for name, counts in real.items():
            asked = "train_nTestNovel" if name.endswith("meta_train") else "nTestNovel"
            if short := too_few(counts, self.way, self.shot, getattr(self, asked) // self.way):
                lacks.append(f"{name}: {short}")
            way, queries[asked] = min(way, len(counts)), min(queries[asked], min(counts.values()) - self.shot)
        if not lacks:
            return ""
        if not any(name.endswith("meta_train") for name in real):
            del queries["train_nTestNovel"]
        flags = {"nKnovel": way, **{name: way * query for name, query in queries.items()}}
        names = {"nKnovel": "way", "train_nTestNovel": "train-queries", "nTestNovel": "queries"}
        changed = [f"--{names[name]} {value}" for name, value in flags.items() if value != getattr(self, name)]
        instead = f", or give {' '.join(changed)}" if way > 1 and min(queries.values()) > 0 else ""
        return f"{'; '.join(lacks)}; add some{instead}"

    # what follows from the fields above

    @property
    def draws(self) -> bool:
        """Whether images are drawn from the pool."""
        return self.source in ("guided", "unguided", "by_model")

    @property
    def finds_classes(self) -> bool:
        """Whether the classes within a model are found by clusters."""
        return self.recipe == "clusters" and self.source in ("guided", "unguided")

    @property
    def labels_by_model(self) -> bool:
        """Whether an image is labelled by the model that drew it, from first to last."""
        return self.source == "by_model" or (self.source == "unguided" and self.recipe == "paper")

    @property
    def way(self) -> int:
        """Classes per episode."""
        return self.nKnovel

    @property
    def shot(self) -> int:
        """Support images per class."""
        return self.nExemplars

    @property
    def epoch_steps(self) -> int:
        """Optimiser steps per epoch."""
        return -(-self.train_epoch_size // self.train_batch)

    @property
    def run_folder(self) -> Path:
        """Where the run is."""
        return Path(self.save_dir or f"ckpt/runs/{self.dataset}/{self.nExemplars}-shot")

    @property
    def pool_place(self) -> str:
        """Path or address of the pool: that of an embedded set is in ckpt itself, so that it can ship."""
        return self.pool or f"ckpt/{'' if SCENARIOS[self.dataset].embedded else 'pools/'}{self.dataset}"

    @property
    def data_paths(self) -> list[Path]:
        """Where the image folders are, one of each domain."""
        named = self.data_root.split(",") if self.data_root else [f"data/{d}" for d in SCENARIOS[self.dataset].images]
        return [Path(name) for name in named]

    @property
    def real_per_class(self) -> int:
        """Real images per class for the reference: as many as the method trains on per pseudo class."""
        rounds = -(-self.max_epoch // self.refresh_every) if self.recipe == "clusters" else 1
        return rounds * self.samples_per_class

    @property
    def test_split(self) -> str:
        """The classes that `diffusionmix.py` tests on."""
        return self.split or f"meta_{self.phase}"

    @property
    def device_name(self) -> str:
        """The device, with -g taken in."""
        return f"cuda:{self.gpu_devices}" if self.gpu_devices and self.device == "auto" else self.device

    def preset(self) -> dict[str, Any]:
        """Return the settings as they are if only --dataset and --recipe are given."""
        return Settings(**_defaults(self.dataset, self.recipe), dataset=self.dataset, recipe=self.recipe).as_dict()

    def bare_checkpoint_flags(self) -> dict[str, Any]:
        """Return, for the pool, what a checkpoint without settings does not say."""
        return {name: getattr(self, name) for name in BARE}

    def given_for_bare_checkpoints(self) -> dict[str, Any]:
        """Return the flags for bare checkpoints that differ from both the preset and the default."""
        preset, given = self.preset(), self.bare_checkpoint_flags()
        return {name: value for name, value in given.items() if value not in (preset[name], getattr(Settings, name))}

    def notes(self) -> dict[str, Any]:
        """Return what to record when a run starts: its settings, those of its preset, and where its pool is."""
        return {"settings": self.as_dict(), "preset": self.preset(), "pool": self.pool_place}

    def as_dict(self) -> dict[str, Any]:
        """Return every field, for config.json."""
        return asdict(self)


@dataclass(frozen=True)
class Scenario:
    """What `--dataset` stands for: the domains whose images test it, how its pool is split, other defaults.

    embedded: the images ship with the program, or are drawn by it (`datasets.sources.EMBEDDED`).
    """

    images: tuple[str, ...]
    per_model: int = 0  # classes a pool model was trained on; 0: as its checkpoint says
    defaults: dict[str, Any] = field(default_factory=dict)
    recipe: str = "paper"
    embedded: bool = False


# What --recipe clusters changes in the paper's recipe; docs/decisions.md has the figures.
_CLUSTERS = dict(
    features="map", optim="adamw", lr=2e-3, weight_decay=0.05, renoise=0.6, guidance_scale=8.0, refresh_every=20,
)  # fmt: skip
RECIPES = {"paper": {}, "clusters": _CLUSTERS}  # the fields' defaults are the paper's, but for mix_steps

_SMALL = dict(  # for characters of 32 pixels, on a CPU
    image_size=32, flip=False, samples_per_class=40, sample_batch=200, train_epoch_size=120, train_batch=4,
    max_epoch=40, epoch_size=200,
)  # fmt: skip
SCENARIOS = {
    "glyphs": Scenario(("glyphs",), 0, _SMALL, "clusters", embedded=True),
    "fontchars": Scenario(("fontchars",), 0, _SMALL, "clusters", embedded=True),
    "co_miniimagenet": Scenario(("miniimagenet",), 5, dict(num_classes=64)),
    "un_miniimagenet": Scenario(("miniimagenet",), 4, dict(num_classes=52), "clusters"),
    "co_cifarfs": Scenario(("cifarfs",), 5, dict(num_classes=64)),
    "un_cifarfs": Scenario(("cifarfs",), 4, dict(num_classes=52), "clusters"),
    "cifar_mini": Scenario(("cifarfs", "miniimagenet"), 4, dict(num_classes=104), "clusters"),
    "custom": Scenario(("custom",), recipe="clusters"),
}


def parse(argv: list[str] | None = None, *, description: str, command: str = "") -> Settings:
    """Return the settings of a command line: flags given, then the scenario's, the recipe's, the fields' defaults.

    command: "training" or "testing", whose flags --help shows; "" shows all.
    """
    argv = sys.argv[1:] if argv is None else argv
    wants_help = bool({"-h", "--help"} & {*argv})
    parser = _parser(description, command, {})
    given = vars(parser.parse_known_args(argv)[0] if wants_help else parser.parse_args(argv))
    given.pop("help", None)
    dataset = given.get("dataset", "glyphs")
    if dataset not in SCENARIOS:
        raise ValueError(f"got --dataset {dataset!r}, expected one of {', '.join(SCENARIOS)}")
    recipe = given.setdefault("recipe", SCENARIOS[dataset].recipe)
    defaults = {**_defaults(dataset, recipe), "dataset": dataset, "recipe": recipe}
    if wants_help:
        _parser(description, command, defaults).print_help()
        sys.exit(0)
    settings = {**{f.name: f.default for f in fields(Settings)}, **defaults, **given}
    for name in ("train_nTestNovel", "nTestNovel"):
        if name not in given:  # of another way as many per class
            settings[name] = settings[name] // Settings.nKnovel * settings["nKnovel"]
    return Settings(**settings)


_EXAMPLES = {
    "training": """examples:
  python main.py
  python main.py --dataset fontchars --source unguided --save-dir ckpt/runs/fontchars/unguided
  python main.py --dataset custom --data-root data/mine --pool ckpt/pools/mine --way 5 --shot 1""",
    "testing": """examples:
  python diffusionmix.py
  python diffusionmix.py --shot 5 --resume ckpt/runs/glyphs/1-shot/best_model.pt
  python diffusionmix.py --dataset fontchars --support data/few --query data/unlabelled""",
}


def _parser(description: str, command: str, defaults: dict[str, Any]) -> OneLineParser:
    """Return a parser of all flags, by group. `defaults` are shown in place of the fields' own."""
    parser = OneLineParser(
        description=description, usage="%(prog)s [--FLAG VALUE ...]", add_help=False,
        argument_default=argparse.SUPPRESS, formatter_class=_Help,
        epilog=f"{_EXAMPLES.get(command, '')}\n\nThe defaults are for --dataset {defaults.get('dataset')} --recipe "
        f"{defaults.get('recipe')}.\nTo see those of another scenario or recipe, add it to --help.",
    )  # fmt: skip
    parser.add_argument("-h", "--help", action="store_true", help="show this help and stop")
    groups = {}
    for f in fields(Settings):
        title = _GROUPS[f.metadata["group"]][0]
        group = groups.setdefault(title, parser.add_argument_group(title))
        text = f.metadata["help"] + (f": {', '.join(SCENARIOS)}" if f.name == "dataset" else "")
        default = f"default {defaults.get(f.name, f.default)!r}"
        bracket = "; ".join(filter(None, [_range(f.metadata["low"], f.metadata["high"]), default]))
        shown = not command or f.metadata["affects"] in (command, "both", "nothing")
        group.add_argument(
            *f.metadata["flags"], flag_of(f), dest=f.name, choices=f.metadata["choices"],
            type=_yes_or_no if isinstance(f.default, bool) else type(f.default),
            **(dict(nargs="?", const=True) if isinstance(f.default, bool) else {}),
            metavar=None if f.metadata["choices"] else {str: "TEXT", bool: "True|False"}.get(type(f.default), "N"),
            help=f"{text} ({bracket})".replace("%", "%%") if shown else argparse.SUPPRESS,
        )  # fmt: skip
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of the examples and leaves out empty groups."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        *names, last = action.option_strings
        return ", ".join([*names, f"{last} {self._format_args(action, action.metavar or '')}".rstrip()])


def _defaults(dataset: str, recipe: str) -> dict[str, Any]:
    return {**RECIPES.get(recipe, {}), **SCENARIOS[dataset].defaults}


def check_same(path: Path, made_with: dict[str, Any], here: dict[str, Any], may_change: set[str]) -> None:
    """Refuse to resume in a run folder with other settings than its file `path` was made with: ValueError.

    "contents" are digests of the pool and the images, by name; those that are not known on both sides may be anything.
    """
    here = {**GONE, **here}
    then, now = made_with.get("contents"), here.get("contents", {})
    then = then if isinstance(then, dict) else {}
    changed = [name for name, digest in then.items() if now.get(name, digest) != digest]
    if changed:
        raise ValueError(
            f"{path}: {' and '.join(changed)} changed since this run began (--pool {here.get('pool')!r}, --data-root "
            f"{here.get('data_root')!r}); restore the original files, or give another --save-dir"
        )
    other = [
        f"{name} {value!r} (got {here.get(name)!r})"
        for name, value in made_with.items()
        if here.get(name) != value and name not in may_change | {"contents"}
    ]
    if other:
        raise ValueError(f"{path}: was made with {', '.join(other)}; give the same settings, or another --save-dir")


def flag_of(f: Field) -> str:
    """Return the flag of a field; the parser also takes it with underscores."""
    return f"--{f.name.replace('_', '-')}"


def that_affect(*what: str) -> set[str]:
    """Return the names of the settings that affect `what`: "training", "testing", "both", "nothing"."""
    return {f.name for f in fields(Settings) if f.metadata["affects"] in what}


def _refuse_above(free: int | None, needed: int, what: str) -> None:
    if free is not None and needed > free:
        raise ValueError(
            f"got {what}: needs {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free; give lower numbers"
        )


def _range(low, high) -> str:
    if low is None:
        return ""
    return f"{low} or more" if high is None else f"{low} to {high}"


def _yes_or_no(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected True or False")
    return words[text.lower()]
