"""Gaussian diffusion: the noising process q, its learned reversal p, samplers and training losses.

x_0 is the clean image, x_t the image after t + 1 noising steps (t counts from 0), T the number of steps,
alpha-bar_t the share of the signal's variance left in x_t. Papers: DDPM (arXiv 2006.11239), IDDPM
(2102.09672), DDIM (2010.02502), ADM (2105.05233), min-SNR (2303.09556).
"""

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.nn import mean_flat

Tensor = torch.Tensor
Denoiser = Callable[..., Tensor]
Kwargs = dict[str, Any] | None
MIN_SNR_GAMMA = 5.0


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The noise schedule as float64 betas (T,) in (0, 1).

    "linear": 1e-4 to 0.02 for T = 1000 (DDPM), scaled by 1000 / T for others.
    "cosine": alpha-bar(s) = cos^2((s + 0.008) / 1.008 * pi / 2), betas at most 0.999 (IDDPM, eq. 17).
    Raises ValueError for another name.
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        s = np.arange(num_diffusion_timesteps + 1, dtype=np.float64) / num_diffusion_timesteps
        alpha_bar = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise ValueError(f"unknown noise_schedule {schedule_name!r}; expected linear or cosine")


class ModelMeanType(enum.Enum):
    """What the network predicts: x_{t-1}, x_0 or the noise."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The variance of p: the network's log-variance, the two bounds of DDPM, or a blend of them (IDDPM, eq. 15)."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """Mean squared error (plus the bound where the variance is learned) or the bound alone; RESCALED ones
    weigh the bound so that one sampled t estimates all T terms (times T / 1000 next to the MSE)."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    @property
    def is_bound(self) -> bool:
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion:
    """Everything that follows from a noise schedule and from what the network predicts.

    betas: (T,) in (0, 1). loss_weighting: "uniform", or "min_snr" (2303.09556, gamma 5), which weighs the MSE.
    rescale_timesteps: networks see t * 1000 / T as floats.
    Tables are float64 numpy arrays; each is copied once to a device as float32.

    Shared arguments: `model(x, t, **model_kwargs)` returns (N, C, H, W), or (N, 2C, H, W) with a learned
    variance; `x` is (N, C, H, W) float; `t` is (N,) int64 in [0, T); `cond_fn(x, t, **model_kwargs)` returns
    grad_x log p(y | x), (N, C, H, W), and enables gradients itself. Both get the timesteps of `model_timesteps(t)`.
    `denoised_fn` maps a predicted x_0 to another, before clipping. `generator` makes all noise; it may live
    on another device than x. Raises ValueError for settings or outputs that do not fit.
    """

    def __init__(
        self,
        *,
        betas: np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        loss_weighting: str = "uniform",
    ):
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"betas of shape {betas.shape} given; expected one dimension and values in (0, 1) "
                "(the linear schedule needs more than 20 steps)"
            )
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.loss_weighting = loss_weighting
        self.num_timesteps = self.original_num_steps = len(betas)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

        self.betas = betas
        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        noise_share = 1.0 - self.alphas_cumprod
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(noise_share)
        self.one_minus_alphas_cumprod = noise_share
        with np.errstate(divide="ignore"):
            self.log_one_minus_alphas_cumprod = np.log(noise_share)
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1.0)

        # q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / noise_share
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / noise_share
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / noise_share
        # The posterior of step 0 has no variance; its logarithm borrows that of step 1.
        second = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(second, self.posterior_variance[1:]))
        self.log_betas = np.log(betas)
        self.fixed_large_variance = np.append(second, betas[1:])
        self.fixed_large_log_variance = np.log(self.fixed_large_variance)
        self.mse_weight = self._mse_weights()

    # ---- tables and timesteps

    def _mse_weights(self) -> np.ndarray:
        if self.loss_weighting == "uniform":
            return np.ones(self.num_timesteps)
        if self.loss_weighting != "min_snr":
            raise ValueError(f"unknown loss_weighting {self.loss_weighting!r}; expected uniform or min_snr")
        snr = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
        if self.loss_type.is_bound or self.model_mean_type is ModelMeanType.PREVIOUS_X:
            raise ValueError("loss_weighting min_snr needs an MSE loss on the noise or on x_0; use uniform")
        clipped = np.minimum(snr, MIN_SNR_GAMMA)
        # An error in the noise is an error in x_0 times sqrt(snr).
        return clipped if self.model_mean_type is ModelMeanType.START_X else clipped / np.maximum(snr, 1e-20)

    def _cached(self, name: str, device: torch.device) -> Tensor:
        """The table `name` on `device`: integers as int64, the rest as float32."""
        key = (name, device)
        if key not in self._on_device:
            table = getattr(self, name)
            dtype = torch.int64 if table.dtype.kind == "i" else torch.float32
            with torch.inference_mode(False):  # a table first used in inference must serve training too
                self._on_device[key] = torch.from_numpy(table).to(device=device, dtype=dtype)
        return self._on_device[key]

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries t of the table `name` (an attribute), float32, shaped (N, 1, 1, 1) to broadcast with `like`."""
        return self._cached(name, t.device)[t].view(-1, *[1] * (like.ndim - 1))

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps (N,) that networks are called with at steps t (N,)."""
        return self._rescale(t)

    def _rescale(self, t: Tensor) -> Tensor:
        return t.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t

    # ---- the noising process

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0) (DDPM, eq. 4), each (N, C, H, W)."""
        mean = self.at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self.at("one_minus_alphas_cumprod", t, x_start).expand_as(x_start)
        return mean, variance, self.at("log_one_minus_alphas_cumprod", t, x_start).expand_as(x_start)

    def q_sample(
        self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw x_t from q(x_t | x_0); `noise` is standard normal of the shape of x_start, drawn if None."""
        noise = _noise_like(x_start, generator) if noise is None else noise
        signal = self.at("sqrt_alphas_cumprod", t, x_start) * x_start
        return signal + self.at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM, eq. 6), each (N, C, H, W)."""
        mean = self.at("posterior_mean_coef1", t, x_t) * x_start + self.at("posterior_mean_coef2", t, x_t) * x_t
        variance = self.at("posterior_variance", t, x_t).expand_as(x_t)
        return mean, variance, self.at("posterior_log_variance_clipped", t, x_t).expand_as(x_t)

    # ---- the learned reversal

    def p_mean_variance(
        self,
        model: Denoiser,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t): `mean`, `variance`, `log_variance` and the implied `pred_xstart`, each (N, C, H, W).

        clip_denoised: clamp the predicted x_0 to [-1, 1].
        """
        output = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        return self._interpret(output, x, t, clip_denoised, denoised_fn)

    def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output as prediction and, where it is learned, variance."""
        learned = self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
        expected = (x.shape[0], x.shape[1] * (2 if learned else 1), *x.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"the network returned {tuple(output.shape)} for images {tuple(x.shape)}; expected {expected}: "
                "does learn_sigma fit the checkpoint?"
            )
        return output.chunk(2, dim=1) if learned else (output, None)

    def _interpret(
        self,
        output: Tensor,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        prediction, var_values = self._split(output, x)
        if self.model_var_type is ModelVarType.LEARNED:
            log_variance, variance = var_values, var_values.exp()
        elif self.model_var_type is ModelVarType.LEARNED_RANGE:
            low, high = self.at("posterior_log_variance_clipped", t, x), self.at("log_betas", t, x)
            blend = (var_values + 1) / 2  # the network's [-1, 1] spans the two bounds
            log_variance = blend * high + (1 - blend) * low
            variance = log_variance.exp()
        elif self.model_var_type is ModelVarType.FIXED_LARGE:
            variance, log_variance = (
                self.at(name, t, x).expand_as(x) for name in ("fixed_large_variance", "fixed_large_log_variance")
            )
        else:
            variance, log_variance = (
                self.at(name, t, x).expand_as(x) for name in ("posterior_variance", "posterior_log_variance_clipped")
            )

        if self.model_mean_type is ModelMeanType.EPSILON:
            pred_xstart = self.xstart_from_eps(x, t, prediction)
        elif self.model_mean_type is ModelMeanType.START_X:
            pred_xstart = prediction
        else:
            coef2 = self.at("posterior_mean_coef2", t, x)
            pred_xstart = (prediction - coef2 * x) / self.at("posterior_mean_coef1", t, x)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        predicts_mean = self.model_mean_type is ModelMeanType.PREVIOUS_X
        mean = prediction if predicts_mean else self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_0 for which x_t holds the noise `eps`; all (N, C, H, W)."""
        scaled = self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return scaled - self.at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def eps_from_xstart(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """The noise in x_t if the clean image is `x_start`; all (N, C, H, W)."""
        scaled = self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return (scaled - x_start) / self.at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def condition_mean(
        self, cond_fn: Denoiser, p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> Tensor:
        """The mean of p shifted by variance * gradient (ADM, alg. 1): (N, C, H, W)."""
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(
        self, cond_fn: Denoiser, p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """`p_mean_var` with the noise lowered by sqrt(1 - alpha-bar_t) * gradient (ADM, alg. 2).

        `pred_xstart` is not clipped again; `mean` follows it.
        """
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        eps = self.eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - self.at("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        pred_xstart = self.xstart_from_eps(x, t, eps)
        mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    # ---- samplers

    def p_sample(
        self,
        model: Denoiser,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Denoiser | None = None,
        model_kwargs: Kwargs = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """One ancestral step (DDPM, alg. 2): `sample` x_{t-1} and `pred_xstart`, each (N, C, H, W)."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        noise = _noise_like(x, generator) * _not_first(t, x)
        return {"sample": mean + (0.5 * out["log_variance"]).exp() * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Denoiser,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Denoiser | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """One DDIM step (eq. 12): `sample` x_{t-1} and `pred_xstart`, each (N, C, H, W).

        eta: 0 is deterministic and draws nothing, 1 has the variance of ancestral sampling.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        eps = self.eps_from_xstart(x, t, out["pred_xstart"])
        before = self.at("alphas_cumprod_prev", t, x)
        if eta == 0:
            return {"sample": _recombine(out["pred_xstart"], eps, before), "pred_xstart": out["pred_xstart"]}
        sigma = eta * self.at("posterior_variance", t, x).sqrt()  # eq. 16
        sample = before.sqrt() * out["pred_xstart"] + (1 - before - sigma**2).clamp(min=0).sqrt() * eps
        sample = sample + sigma * _not_first(t, x) * _noise_like(x, generator)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self,
        model: Denoiser,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """One deterministic DDIM step towards noise: `sample` x_{t+1} and `pred_xstart`, each (N, C, H, W)."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self.eps_from_xstart(x, t, out["pred_xstart"])
        sample = _recombine(out["pred_xstart"], eps, self.at("alphas_cumprod_next", t, x))
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(self, model: Denoiser, shape: Sequence[int], *args, **kwargs) -> Tensor:
        """The image (N, C, H, W) at the end of `p_sample_loop_progressive`, which takes the same arguments."""
        return _last(self.p_sample_loop_progressive(model, shape, *args, **kwargs))

    def p_sample_loop_progressive(
        self,
        model: Denoiser,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Denoiser | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        generator: torch.Generator | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield what `p_sample` returns for t = T - 1 down to 0, without gradients.

        shape: (N, C, H, W); noise: x_T of that shape, drawn if None; device: that of the noise or the model
        if None; progress: show a bar.
        """
        options = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn)
        options |= dict(model_kwargs=model_kwargs, generator=generator)
        yield from self._loop(self.p_sample, model, shape, noise, device, progress, options)

    def ddim_sample_loop(self, model: Denoiser, shape: Sequence[int], *args, **kwargs) -> Tensor:
        """The image (N, C, H, W) at the end of `ddim_sample_loop_progressive`, which takes the same arguments."""
        return _last(self.ddim_sample_loop_progressive(model, shape, *args, **kwargs))

    def ddim_sample_loop_progressive(
        self,
        model: Denoiser,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Denoiser | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield what `ddim_sample` returns for t = T - 1 down to 0; arguments as in `p_sample_loop_progressive`."""
        options = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn)
        options |= dict(model_kwargs=model_kwargs, eta=eta, generator=generator)
        yield from self._loop(self.ddim_sample, model, shape, noise, device, progress, options)

    def _loop(self, step, model, shape, noise, device, progress, options) -> Iterator[dict[str, Tensor]]:
        if noise is not None and tuple(noise.shape) != tuple(shape):
            raise ValueError(f"noise has shape {tuple(noise.shape)}; expected the shape asked for, {tuple(shape)}")
        if device is None:
            parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
            known = noise if noise is not None else parameter
            device = known.device if known is not None else "cpu"
        if noise is None:
            noise = _noise_like(torch.empty(*shape, device=device), options["generator"])
        x = noise.to(device)
        for index in tqdm(range(self.num_timesteps - 1, -1, -1), disable=not progress):
            t = torch.full((shape[0],), index, device=device, dtype=torch.int64)
            with torch.no_grad():
                out = step(model, x, t, **options)
            yield out
            x = out["sample"]

    # ---- training

    def training_losses(
        self,
        model: Denoiser,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Kwargs = None,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one noised batch, each (N,).

        x_start: (N, C, H, W) in [-1, 1]; noise: drawn if None.
        Returns `loss`; with an MSE loss also `mse` (unweighted), and with a learned variance `vb`, the bound in
        bits a dimension whose gradient reaches the variance only (IDDPM, eq. 16); loss = weight * mse + vb.
        """
        noise = _noise_like(x_start, generator) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
        if self.loss_type.is_bound:
            scale = self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1.0
            return {"loss": scale * self._bound(output, x_start, x_t, t)}

        prediction, var_values = self._split(output, x_t)
        if self.model_mean_type is ModelMeanType.EPSILON:
            target = noise
        elif self.model_mean_type is ModelMeanType.START_X:
            target = x_start
        else:
            target = self.q_posterior_mean_variance(x_start, x_t, t)[0]
        mse = mean_flat((target - prediction) ** 2)
        terms = {"mse": mse, "loss": self._cached("mse_weight", t.device)[t] * mse}
        if var_values is not None:
            frozen_mean = torch.cat([prediction.detach(), var_values], dim=1)
            scale = self.num_timesteps / 1000.0 if self.loss_type is LossType.RESCALED_MSE else 1.0
            terms["vb"] = scale * self._bound(frozen_mean, x_start, x_t, t)
            terms["loss"] = terms["loss"] + terms["vb"]
        return terms

    def _bound(self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Term t of the variational bound in bits a dimension (DDPM, eq. 5): (N,)."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self._interpret(output, x_t, t, clip_denoised=False)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        log_scales = 0.5 * out["log_variance"]
        decoder = -discretized_gaussian_log_likelihood(x_start, means=out["mean"], log_scales=log_scales)
        return torch.where(t == 0, mean_flat(decoder), mean_flat(kl)) / math.log(2.0)


def _recombine(x_start: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """An image of signal variance `alpha_bar` from its clean image and its noise."""
    return alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * eps


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def _not_first(t: Tensor, like: Tensor) -> Tensor:
    """0 where t is 0, which has no noise to add, else 1: (N, 1, 1, 1)."""
    return (t != 0).to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _last(steps: Iterator[dict[str, Tensor]]) -> Tensor:
    for out in steps:
        sample = out["sample"]
    return sample
