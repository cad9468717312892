"""Train one diffusion model: AdamW, an EMA with warm-up, and saves from which a killed run resumes."""

import math
import os
import statistics
import time
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from guided_diffusion.costs import image_flops, that_fit
from guided_diffusion.dist_util import autocast, compile_in_place, or_too_much, smaller, worth_compiling
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.image_datasets import TrainingImages
from guided_diffusion.made_with import ENTRY, MODEL_FILE, STATE_FILE, Kept, kept
from guided_diffusion.resample import SAMPLERS
from guided_diffusion.respace import respaced, space_timesteps
from guided_diffusion.train_flags import TrainSettings
from utils import checkpoint, processes, stopping
from utils.atomic import previous
from utils.images import to_uint8
from utils.plots import contact_sheet
from utils.progress import progress
from utils.run_log import RunLog
from utils.seeding import generator

SHEET, SHEET_STEPS = 40, 25  # images in samples.png, and the DDIM steps of each
USELESS = 10  # average weights are rejected if their loss exceeds this many times the loss of predicting 0


class TrainLoop:
    """Trains `model` up to `settings.steps`. `run()` resumes from what is saved in `folder`."""

    def __init__(
        self, *, model: nn.Module, diffusion: GaussianDiffusion, data: TrainingImages, settings: TrainSettings,
        flags: Mapping[str, Any], folder: str | os.PathLike, device: torch.device,
        made_with: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        """flags: the flags of `create_model_and_diffusion` that made `model`; the checkpoint records them.

        made_with: all settings that change the weights, with `steps`. A folder begun with other settings is refused.
        """
        self.model, self.diffusion, self.data = model.to(device).train(), diffusion, data
        self.settings, self.flags, self.folder, self.device = settings, dict(flags), Path(folder), device
        if settings.batch_size % processes.count():
            raise ValueError(
                f"got --batch_size {settings.batch_size} for {processes.count()} processes, expected a multiple; "
                "give another, or another number of processes"
            )
        self.made_with = dict(made_with or {**self.flags, "steps": settings.steps})
        self.kept: Kept | None = None  # set by `restore`
        self.ema = deepcopy(self.model).eval().requires_grad_(False)
        if worth_compiling(device, self.flags.get("num_channels", 0)):
            self.model.to(memory_format=torch.channels_last)
            compile_in_place(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.network = self.model  # with several processes, each takes its share of a batch
        if processes.count() > 1:
            self.network = nn.parallel.DistributedDataParallel(self.model)
        self.sampler = SAMPLERS[settings.schedule_sampler](diffusion.num_timesteps)
        self.step = 0
        self.micro = settings.microbatch if settings.microbatch > 0 else settings.batch_size

    def run(self) -> Path:
        """Train to the end and return the path of the finished checkpoint."""
        self.restore()
        if self.kept.done:
            return self.folder / MODEL_FILE
        self.fit_memory()
        log, losses = RunLog(self.folder, by="step"), []
        log.forget_after(self.step)
        processes.meet()  # all must have read the folder before the first process saves to it
        with progress(total=self.settings.steps, initial=self.step, desc=str(self.folder), unit="step") as bar:
            while self.step < self.settings.steps:
                if processes.broadcast(stopping.asked()):
                    self.save()
                    stopping.check()
                losses.append(self.train_step())
                bar.update()
                saving = self.step % self.settings.save_interval == 0 and self.step < self.settings.steps
                if saving or self.step % self.settings.log_interval == 0:
                    bar.set_postfix(loss=f"{self._note(log, losses):.4f}")
                if saving:
                    self.save()
        if losses:
            self._note(log, losses)
        return self.finish()

    def fit_memory(self) -> None:
        """Lower the microbatch if free memory is short."""
        if processes.count() == 1:  # several processes need equally many microbatches
            most = min(self.micro, self.settings.batch_size)
            self.micro = that_fit(self.flags, most, self.device, training=True)

    def measure(self, seconds: float) -> tuple[int, int, float, float]:
        """Return the steps left, the operations per step (2 per multiply-add), and the seconds per step and per sheet.

        Runs a trial of about `seconds` seconds, which changes the weights.
        """
        self.restore()
        self.fit_memory()
        left = self.settings.steps - self.step
        flops = self.settings.batch_size * image_flops(self.flags, training=True)
        step, images = self._seconds_of_step(seconds)
        count = min(SHEET, max(2, images))
        started = time.perf_counter()
        self.draw(count, 1)
        pass_of_sheet = (time.perf_counter() - started) * SHEET / count
        return left, flops, step, pass_of_sheet * min(SHEET_STEPS, self.diffusion.num_timesteps)

    def _seconds_of_step(self, trial: float) -> tuple[float, int]:
        """Return the seconds per step, and the number of images at once that they were measured with.

        On a CPU a step of a large network takes minutes. Then extrapolate from the first part of a batch that takes a
        tenth of `trial` seconds.
        """
        share, images = [processes.own_share(part) for part in self.batch()], 1
        while self.device.type != "cuda" and images < len(share[0]):
            started = time.perf_counter()
            float(self.gradients(*(part[:images] for part in share)))
            taken = time.perf_counter() - started
            if processes.broadcast(taken > trial / 10):
                return taken * len(share[0]) / images, images
            images *= 2
        if self.device.type == "cuda":
            self.train_step()  # compiles
        steps = []
        while not steps or processes.broadcast(sum(steps) < trial):
            started = time.perf_counter()
            float(self.train_step())  # waits for the device
            steps.append(time.perf_counter() - started)
        return statistics.median(steps), len(share[0])

    def train_step(self) -> torch.Tensor:
        """Take one step of the optimiser and of the EMA. Return the mean loss, a scalar on the device."""
        s = self.settings
        rate = s.lr * (1 - self.step / s.steps if s.lr_anneal_steps else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.flags.get("dropout"):  # dropout draws from the global generator
            torch.manual_seed(generator(s.seed, "dropout", self.step).initial_seed())
        share = [processes.own_share(part) for part in self.batch()]
        while (total := or_too_much(partial(self.gradients, *share))) is None:
            if processes.count() > 1:  # the others expect equally many microbatches
                raise MemoryError("out of memory in one of several processes; give a lower --microbatch")
            self.micro = smaller(min(self.micro, len(share[0])))
        if s.grad_clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip)
        self.optimizer.step()
        self.step += 1
        decay = min(s.ema_rate, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        return total

    def batch(self) -> tuple[torch.Tensor, ...]:
        """Return the images, labels, timesteps, loss weights and noise of this step, on the device."""
        s = self.settings
        images, labels = self.data.batch(s.batch_size, self.step, s.seed, flip=s.random_flip, device=self.device)
        rng = generator(s.seed, "noise", self.step)
        t, weights = self.sampler.sample(len(images), self.device, rng)
        noise = torch.randn(images.shape, generator=rng).to(self.device, non_blocking=True)
        return images, labels, t, weights, noise

    def gradients(
        self, images: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, weights: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Accumulate gradients of a batch, `micro` images at a time. Return the mean loss, a scalar on the device."""
        losses = []
        self.optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(images), self.micro):
            part = slice(start, start + self.micro)
            loss = self.losses(self.network, images[part], labels[part], t[part], noise[part])
            ((loss * weights[part]).sum() / len(images)).backward()
            losses.append(loss.detach())
        every = torch.cat(losses)
        self.sampler.update_with_local_losses(t, every)
        return (every * weights).sum() / len(images)

    def losses(
        self, network: nn.Module, images: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Return the unweighted loss of each image, (N,)."""
        kwargs = {"y": labels} if self.flags.get("class_cond") else {}
        with autocast(self.settings.precision, self.device):
            return self.diffusion.training_losses(network, images, t, kwargs, noise)["loss"]

    @torch.no_grad()
    def check_average(self) -> None:
        """Raise ValueError if the loss of the average weights on the next batch shows that they are useless."""
        *batch, weights, noise = self.batch()
        found = []
        for network in (self.ema, self._zeros):
            parts = zip(*(part.split(self.micro) for part in (*batch, noise)), strict=True)
            every = torch.cat([self.losses(network, *part) for part in parts])
            found.append(float((every * weights).mean()))
        loss, of_zeros = found
        if not loss <= USELESS * max(1.0, of_zeros):  # NaN, too
            self._diverged(f"useless average weights (loss {loss:.4g}; a network that answers 0 has {of_zeros:.4g})")
        self._check_weights(self.model.state_dict())

    def _zeros(self, x: torch.Tensor, t: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(x), 6 if self.flags.get("learn_sigma") else 3, *x.shape[2:])

    def save(self) -> None:
        """Save the state and a sheet of EMA samples."""
        if processes.is_first():
            self.save_state()
            self.sample_sheet()

    def save_state(self) -> None:
        """Save the state to resume from, and keep the previous one. Raises ValueError for useless weights."""
        self.check_average()
        checkpoint.save(
            self.folder / STATE_FILE,
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "sampler": self.sampler.state_dict(),
                "flags": self.flags,
                ENTRY: self.made_with,
            },
            keep_old=True,
        )

    def finish(self) -> Path:
        """Write the finished checkpoint and delete the state. Raises ValueError for useless weights."""
        if processes.is_first():
            self.check_average()
            weights = self.ema.state_dict()
            if self.settings.half_weights:
                weights = {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
            self._check_weights(weights)
            self.sample_sheet()
            if self.settings.keep_state:
                self.save_state()
            payload = {
                "model": {name: w.cpu() for name, w in weights.items()},
                "flags": self.flags,
                "num_classes": len(self.data.class_names),
                "step": self.step,
                ENTRY: self.made_with,
            }
            checkpoint.save(self.folder / MODEL_FILE, payload)
            drop_state(self.folder, newest=not self.settings.keep_state)
        processes.meet()
        return self.folder / MODEL_FILE

    def sample_sheet(self, count: int = SHEET, steps: int = SHEET_STEPS) -> None:
        """Write `count` DDIM samples of the EMA to samples.png, from the same noise at every save."""
        contact_sheet(self.draw(count, steps), 10, self.folder / "samples.png")

    @torch.no_grad()
    def draw(self, count: int, steps: int) -> torch.Tensor:
        """Return DDIM samples of the EMA, (count, 3, size, size) uint8 on the CPU."""
        size = self.flags["image_size"]
        total = self.diffusion.num_timesteps
        spaced = respaced(self.diffusion, space_timesteps(total, str(min(steps, total))))
        noise = torch.randn(count, 3, size, size, generator=generator(self.settings.seed, "sheet")).to(self.device)
        kwargs = {}
        if self.flags.get("class_cond"):
            kwargs["y"] = torch.arange(count, device=self.device) % self.flags["num_classes"]
        with autocast(self.settings.precision, self.device):
            images = spaced.ddim_sample_loop(self.ema, noise.shape, noise=noise, model_kwargs=kwargs)
        return to_uint8(images.cpu())

    def restore(self) -> None:
        """Load what the folder holds, once. Raises ValueError if it was made with other settings, naming them."""
        if self.kept is not None:
            return
        self.kept = kept(self.folder, self.made_with, self.device)
        if processes.is_first():
            for note in self.kept.notes:
                print(note)
        if self.kept.done:
            return
        if self.kept.state is not None:
            state, path = self.kept.state, self.folder / STATE_FILE
            checkpoint.load_state(self.model, state["model"], path)
            checkpoint.load_state(self.ema, state["ema"], path)
            self.optimizer.load_state_dict(state["optimizer"])
            self.sampler.load_state_dict(state["sampler"])
        elif self.kept.model is not None:
            for network in (self.model, self.ema):
                checkpoint.load_state(network, self.kept.model["model"], self.folder / MODEL_FILE)
        self.step = self.kept.step

    def _note(self, log: RunLog, losses: list[torch.Tensor]) -> float:
        """Write the mean of the losses since the last line to metrics.jsonl, and return it."""
        mean = float(torch.stack(losses).mean())
        losses.clear()
        self._check(mean)
        log.record({"step": self.step, "loss": mean})
        return mean

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            self._diverged(f"loss {loss}")

    def _check_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        if not all(bool(torch.isfinite(each).all()) for each in weights.values()):
            self._diverged("weights that are not finite")

    def _diverged(self, what: str) -> NoReturn:
        raise ValueError(
            f"{self.folder}: got {what} at step {self.step} with lr {self.settings.lr}; the last save is kept: "
            "lower --lr or give --grad_clip 1, with another --save_dir or --pool"
        )


def drop_state(folder: str | os.PathLike, *, newest: bool = True) -> None:
    """Delete the previous state, and with `newest` the newest one too."""
    path = Path(folder) / STATE_FILE
    previous(path).unlink(missing_ok=True)
    if newest:
        path.unlink(missing_ok=True)
