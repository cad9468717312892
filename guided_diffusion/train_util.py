"""Training one diffusion model: AdamW, an EMA with warm-up, saves that a killed run goes on from."""

import os
import statistics
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guided_diffusion.costs import image_flops, that_fit
from guided_diffusion.dist_util import PRECISIONS, autocast, compile_in_place, or_too_much, smaller, worth_compiling
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.image_datasets import TrainingImages
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.respace import respaced, space_timesteps
from utils import checkpoint, processes, stopping
from utils.atomic import previous
from utils.images import to_uint8
from utils.plots import contact_sheet
from utils.progress import progress
from utils.seeding import generator

STATE_FILE = "state.pt"  # what a run goes on from; gone when it is done
MODEL_FILE = "model.pt"  # the EMA weights with their settings: the checkpoint that others use


@dataclass(frozen=True)
class TrainSettings:
    """How long and how to train. Rates are per step; `batch_size` and `microbatch` are in images.

    Attributes:
        steps: optimiser steps in all.
        anneal: lower the rate linearly to 0 over `steps`.
        microbatch: images that pass the network at once; 0 or less means the whole batch.
        ema_rate: decay of the weights' moving average, reached by a warm-up: min(rate, (1 + step) / (10 + step)).
        grad_clip: greatest gradient norm, 0 for none.
        flip: mirror half of the images.
        half_weights: save the EMA weights in float16, half the size.
    """

    steps: int = 20_000
    lr: float = 1e-4
    weight_decay: float = 0.0
    anneal: bool = False
    batch_size: int = 24
    microbatch: int = -1
    ema_rate: float = 0.9999
    grad_clip: float = 0.0
    flip: bool = True
    schedule_sampler: str = "uniform"
    log_interval: int = 10
    save_interval: int = 2_000
    precision: str = "auto"
    half_weights: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_interval", "save_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, expected 1 or more")
        if not self.lr > 0:
            raise ValueError(f"got lr {self.lr}, expected a rate above 0, such as 1e-4")
        if not 0 <= self.ema_rate < 1:
            raise ValueError(f"got ema_rate {self.ema_rate}, expected a decay from 0 to below 1, such as 0.9999")
        if self.precision not in PRECISIONS:
            raise ValueError(f"got precision {self.precision!r}, expected one of {', '.join(PRECISIONS)}")


class TrainLoop:
    """Trains `model` in `folder` until `settings.steps`; `run()` goes on from what an earlier one saved there."""

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        data: TrainingImages,
        settings: TrainSettings,
        flags: Mapping[str, Any],
        folder: str | os.PathLike,
        device: torch.device,
    ):
        """flags: those of `create_model_and_diffusion` that made `model`; they travel in the checkpoint."""
        self.model, self.diffusion, self.data = model.to(device).train(), diffusion, data
        self.settings, self.flags, self.folder, self.device = settings, dict(flags), Path(folder), device
        if settings.batch_size % processes.count():
            raise ValueError(
                f"got batch_size {settings.batch_size} for {processes.count()} processes, expected a multiple; "
                "give another --batch_size, or another number of processes"
            )
        self.ema = deepcopy(self.model).eval().requires_grad_(False)
        if worth_compiling(device, self.flags.get("num_channels", 0)):
            self.model.to(memory_format=torch.channels_last)
            compile_in_place(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.network = self.model  # what takes the steps: of several processes, each with its share of the batch
        if processes.count() > 1:
            self.network = nn.parallel.DistributedDataParallel(self.model)
        self.sampler = create_named_schedule_sampler(settings.schedule_sampler, diffusion)
        self.step = 0
        self.micro = settings.microbatch if settings.microbatch > 0 else settings.batch_size

    def run(self) -> Path:
        """Train to the end and return the path of the finished checkpoint."""
        self._restore()
        self.fit_memory()
        mean, losses = 0.0, []
        processes.meet()  # before the first one saves what the others have just read
        with progress(total=self.settings.steps, initial=self.step, desc=str(self.folder), unit="step") as bar:
            while self.step < self.settings.steps:
                if processes.first_says(stopping.asked()):
                    self.save()
                    stopping.check()
                losses.append(self.train_step())
                bar.update()
                saving = self.step % self.settings.save_interval == 0 and self.step < self.settings.steps
                if saving or self.step % self.settings.log_interval == 0:
                    mean = float(torch.stack(losses).mean())
                    losses.clear()
                    self._check(mean)
                    bar.set_postfix(loss=f"{mean:.4f}")
                if saving:
                    self.save()
        if losses:
            self._check(float(torch.stack(losses).mean()))
        return self.finish()

    def fit_memory(self) -> None:
        """Let fewer images pass the network at once where the memory at hand does not suffice for all."""
        if processes.count() == 1:  # several wait for gradients of as many parts
            most = min(self.micro, self.settings.batch_size)
            self.micro = that_fit(self.flags, most, self.device, training=True)

    def measure(self, seconds: float) -> tuple[int, int, float]:
        """Steps that are left, operations of one, 2 a multiply-add, and its seconds by a trial of about `seconds`.

        The weights are changed.
        """
        self._restore()
        self.fit_memory()
        left = self.settings.steps - self.step
        flops = self.settings.batch_size * image_flops(self.flags, training=True)
        if self.device.type == "cuda":
            self.train_step()  # compiles
        taken = []
        while not taken or processes.first_says(sum(taken) < seconds):
            started = time.perf_counter()
            float(self.train_step())  # waits for the device
            taken.append(time.perf_counter() - started)
        return left, flops, statistics.median(taken)

    def train_step(self) -> torch.Tensor:
        """One optimiser step and one of the EMA; returns the mean loss, a scalar on the device."""
        s = self.settings
        rate = s.lr * (1 - self.step / s.steps if s.anneal else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images, labels = self.data.batch(s.batch_size, self.step, s.seed, flip=s.flip, device=self.device)
        rng = generator(s.seed, "noise", self.step)
        if self.flags.get("dropout"):  # it draws from the global generator
            torch.manual_seed(generator(s.seed, "dropout", self.step).initial_seed())
        t, weights = self.sampler.sample(len(images), self.device, rng)
        noise = torch.randn(images.shape, generator=rng).to(self.device)
        images, labels, t, weights, noise = map(processes.own_share, (images, labels, t, weights, noise))
        work = partial(self.gradients, images, labels, t, weights, noise)
        while (total := or_too_much(work)) is None:
            if processes.count() > 1:  # the others wait for gradients of as many parts
                raise MemoryError("out of memory in one of several processes; give a lower --microbatch")
            self.micro = smaller(min(self.micro, len(images)))
        if s.grad_clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
        self.optimizer.step()
        self.step += 1
        decay = min(s.ema_rate, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return total

    def gradients(
        self, images: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, weights: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Gather those of a batch, `micro` images at a time; returns the mean loss, a scalar on the device."""
        losses = []
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(images), self.micro):
            part = slice(start, start + self.micro)
            kwargs = {"y": labels[part]} if self.flags.get("class_cond") else {}
            with autocast(self.settings.precision, self.device):
                terms = self.diffusion.training_losses(self.network, images[part], t[part], kwargs, noise[part])
            ((terms["loss"] * weights[part]).sum() / len(images)).backward()
            losses.append(terms["loss"].detach())
        every = torch.cat(losses)
        self.sampler.update_with_local_losses(t, every)
        return (every * weights).sum() / len(images)

    def save(self) -> None:
        """Save what the run goes on from, with the save before it beside it, and a sheet of EMA samples."""
        if not processes.is_first():
            return
        checkpoint.save(
            self.folder / STATE_FILE,
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "sampler": self.sampler.state_dict(),
                "flags": self.flags,
            },
            keep_old=True,
        )
        self.sample_sheet()

    def finish(self) -> Path:
        """Write the finished checkpoint and take the intermediate one away."""
        if not processes.is_first():
            processes.meet()
            return self.folder / MODEL_FILE
        weights = self.ema.state_dict()
        if self.settings.half_weights:
            weights = {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
        payload = {
            "model": {name: w.cpu() for name, w in weights.items()},
            "flags": self.flags,
            "num_classes": len(self.data.class_names),
            "step": self.step,
        }
        self.sample_sheet()
        checkpoint.save(self.folder / MODEL_FILE, payload)
        for path in (self.folder / STATE_FILE, previous(self.folder / STATE_FILE)):
            path.unlink(missing_ok=True)
        processes.meet()
        return self.folder / MODEL_FILE

    @torch.no_grad()
    def sample_sheet(self, count: int = 40, steps: int = 25) -> None:
        """Draw `count` DDIM samples of the EMA into samples.png; the same noise at every save."""
        size = self.flags["image_size"]
        total = self.diffusion.num_timesteps
        spaced = respaced(self.diffusion, space_timesteps(total, str(min(steps, total))))
        noise = torch.randn(count, 3, size, size, generator=generator(self.settings.seed, "sheet")).to(self.device)
        kwargs = {}
        if self.flags.get("class_cond"):
            kwargs["y"] = torch.arange(count, device=self.device) % self.flags["num_classes"]
        with autocast(self.settings.precision, self.device):
            images = spaced.ddim_sample_loop(self.ema, noise.shape, noise=noise, model_kwargs=kwargs)
        contact_sheet(to_uint8(images.cpu()), 10, self.folder / "samples.png")

    def _restore(self) -> None:
        path = self.folder / STATE_FILE
        state = checkpoint.load_newest(path, self.device)
        if state is None:
            return
        if state.get("flags") != self.flags:
            changed = sorted(k for k in self.flags if self.flags[k] != state.get("flags", {}).get(k))
            raise ValueError(f"{path}: was made with other {', '.join(changed)}; give the same flags or another folder")
        checkpoint.load_state(self.model, state["model"], path)
        checkpoint.load_state(self.ema, state["ema"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.step = state["step"]

    def _check(self, loss: float) -> None:
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise ValueError(
                f"{self.folder}: got loss {loss} at step {self.step} with lr {self.settings.lr}; "
                "lower --lr or set --grad_clip 1 and start again: the last save is kept"
            )
