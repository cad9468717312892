"""Gaussian diffusion: the noising process q, its learned reversal p, guidance and training losses.

x_0 is the clean image, x_t the image after t + 1 noising steps (t counts from 0), T the number of steps, and
alpha-bar_t the share of the signal's variance left in x_t. Papers: DDPM (arXiv 2006.11239), IDDPM (2102.09672),
DDIM (2010.02502), ADM (2105.05233), min-SNR (2303.09556).
"""

import enum
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.nn import mean_flat
from guided_diffusion.sampling import ddim

Tensor = torch.Tensor
Network = Callable[..., Tensor]
Kwargs = dict[str, Any] | None
Device = torch.device | str | None
MIN_SNR_GAMMA = 5.0


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Return the noise schedule: float64 betas (T,) in (0, 1).

    "linear": 1e-4 to 0.02 for T = 1000 (DDPM), scaled by 1000 / T for other T.
    "cosine": alpha-bar(s) = cos^2((s + 0.008) / 1.008 * pi / 2), betas at most 0.999 (IDDPM, eq. 17).
    Raises ValueError for any other name.
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        s = np.arange(num_diffusion_timesteps + 1, dtype=np.float64) / num_diffusion_timesteps
        alpha_bar = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise ValueError(f"got noise_schedule {schedule_name!r}, expected linear or cosine")


class ModelMeanType(enum.Enum):
    """What the network predicts: x_0 or the noise."""

    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The variance of p: DDPM's upper bound, or the network's blend of both bounds (IDDPM, eq. 15)."""

    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """The mean squared error, plus the variational bound if the variance is learned; or the bound alone.

    RESCALED losses weight the bound so that one sampled t estimates all T terms (by T / 1000 beside the MSE).
    """

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    RESCALED_KL = enum.auto()


class GaussianDiffusion:
    """A diffusion process: its noise schedule, and how the network's predictions are used.

    betas: (T,) in (0, 1). loss_weighting: "uniform", or "min_snr" (2303.09556, gamma 5), which weights the MSE.
    rescale_timesteps: networks get t * 1000 / T as floats.
    Tables are float64 numpy arrays. Each is copied to a device once, as float32.

    Arguments that methods share: `model(x, t, **model_kwargs)` returns (N, C, H, W), or (N, 2C, H, W) with a learned
    variance. `x` is (N, C, H, W) float; `t` is (N,) int64 in [0, T). `cond_fn(x, t, **model_kwargs)` returns
    grad_x log p(y | x), (N, C, H, W), and enables gradients itself. Both are called with `model_timesteps(t)`.
    Raises ValueError for invalid settings, and for network outputs of the wrong shape.
    """

    def __init__(
        self, *, betas: np.ndarray, model_mean_type: ModelMeanType, model_var_type: ModelVarType, loss_type: LossType,
        rescale_timesteps: bool = False, loss_weighting: str = "uniform",
    ):  # fmt: skip
        betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                f"got betas of shape {betas.shape}, expected one dimension and values in (0, 1) "
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
        noise_share = 1.0 - self.alphas_cumprod
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(noise_share)
        with np.errstate(divide="ignore"):
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1.0)

        # q(x_{t-1} | x_t, x_0), DDPM eq. 6 and 7
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / noise_share
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / noise_share
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / noise_share
        # The posterior of step 0 has variance 0, which has no logarithm: use the variance of step 1.
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
            raise ValueError(f"got loss_weighting {self.loss_weighting!r}, expected uniform or min_snr")
        if self.loss_type is LossType.RESCALED_KL:
            raise ValueError("got loss_weighting min_snr with use_kl, which has no MSE to weigh; give uniform")
        snr = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
        clipped = np.minimum(snr, MIN_SNR_GAMMA)
        # An error in the noise is an error in x_0 times sqrt(snr).
        return clipped if self.model_mean_type is ModelMeanType.START_X else clipped / np.maximum(snr, 1e-20)

    def _cached(self, name: str, device: torch.device) -> Tensor:
        """Return the table `name` on `device`: integers as int64, the rest as float32."""
        key = (name, device)
        if key not in self._on_device:
            table = getattr(self, name)
            dtype = torch.int64 if table.dtype.kind == "i" else torch.float32
            with torch.inference_mode(False):  # a table first used in inference must serve training too
                self._on_device[key] = torch.from_numpy(table).to(device=device, dtype=dtype)
        return self._on_device[key]

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Return entries t of the table `name`, float32, shaped (N, 1, 1, 1) to broadcast with `like`."""
        return self._cached(name, t.device)[t].view(-1, *[1] * (like.ndim - 1))

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Return the timesteps (N,) with which networks are called at steps t (N,)."""
        return t.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else t

    # ---- the noising process

    def q_sample(
        self, x_start: Tensor, t: Tensor, noise: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw x_t from q(x_t | x_0). noise: standard normal in the shape of x_start; drawn if None."""
        noise = _noise_like(x_start, generator) if noise is None else noise
        signal = self.at("sqrt_alphas_cumprod", t, x_start) * x_start
        return signal + self.at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0) (DDPM, eq. 6), each (N, C, H, W)."""
        mean = self.at("posterior_mean_coef1", t, x_t) * x_start + self.at("posterior_mean_coef2", t, x_t) * x_t
        variance = self.at("posterior_variance", t, x_t).expand_as(x_t)
        return mean, variance, self.at("posterior_log_variance_clipped", t, x_t).expand_as(x_t)

    # ---- the learned reversal

    def p_mean_variance(
        self, model: Network, x: Tensor, t: Tensor, clip_denoised: bool = True, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """Return p(x_{t-1} | x_t): `mean`, `variance`, `log_variance` and `pred_xstart`, each (N, C, H, W).

        clip_denoised: clamp the predicted x_0 to [-1, 1].
        """
        output = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        return self._interpret(output, x, t, clip_denoised)

    def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the network's output into the prediction and the variance, None unless it is learned."""
        learned = self.model_var_type is ModelVarType.LEARNED_RANGE
        expected = (x.shape[0], x.shape[1] * (2 if learned else 1), *x.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"got {tuple(output.shape)} from the network for images {tuple(x.shape)}, expected {expected}; "
                "give the learn_sigma of the checkpoint"
            )
        return output.chunk(2, dim=1) if learned else (output, None)

    def _interpret(self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool) -> dict[str, Tensor]:
        prediction, var_values = self._split(output, x)
        if var_values is None:
            variance, log_variance = (
                self.at(name, t, x).expand_as(x) for name in ("fixed_large_variance", "fixed_large_log_variance")
            )
        else:
            low, high = self.at("posterior_log_variance_clipped", t, x), self.at("log_betas", t, x)
            blend = (var_values + 1) / 2  # the network's [-1, 1] spans the two bounds
            log_variance = blend * high + (1 - blend) * low
            variance = log_variance.exp()
        predicts_x_0 = self.model_mean_type is ModelMeanType.START_X
        pred_xstart = prediction if predicts_x_0 else self.xstart_from_eps(x, t, prediction)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return x_0, given x_t and its noise `eps`; all (N, C, H, W)."""
        scaled = self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return scaled - self.at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def eps_from_xstart(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """Return the noise in x_t, given the clean image `x_start`; all (N, C, H, W)."""
        scaled = self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return (scaled - x_start) / self.at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def step_back(self, x_start: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_{t-1}, given the clean image `x_start` and the noise `eps`; all (N, C, H, W)."""
        alpha_bar = self.at("alphas_cumprod_prev", t, x_start)
        return alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * eps

    def condition_mean(
        self, cond_fn: Network, p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> Tensor:
        """Return the mean of p shifted by variance * gradient (ADM, alg. 1): (N, C, H, W)."""
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient

    def condition_score(
        self, cond_fn: Network, p_mean_var: dict[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """Return `p_mean_var` with the score shifted by the gradient (ADM, alg. 2).

        Lowering the noise by sqrt(1 - alpha-bar) * gradient raises x_0 by (1 - alpha-bar) / sqrt(alpha-bar) * gradient.
        `pred_xstart` is not clipped again; `mean` is computed from it.
        """
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        alpha_bar = self.at("alphas_cumprod", t, x)
        pred_xstart = p_mean_var["pred_xstart"] + (1 - alpha_bar) / alpha_bar.sqrt() * gradient
        mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    # ---- samplers

    def p_sample(
        self, model: Network, x: Tensor, t: Tensor, clip_denoised: bool = True, cond_fn: Network | None = None,
        model_kwargs: Kwargs = None, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Draw x_{t-1} by one ancestral step (DDPM, alg. 2): (N, C, H, W)."""
        out = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)
        mean = self.condition_mean(cond_fn, out, x, t, model_kwargs) if cond_fn is not None else out["mean"]
        noise = _noise_like(x, generator) * (t != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))  # none in the last step
        return mean + (0.5 * out["log_variance"]).exp() * noise

    @torch.no_grad()
    def p_sample_loop(
        self, model: Network, shape: Sequence[int], noise: Tensor | None = None, *,
        device: Device = None, generator: torch.Generator | None = None, **options,
    ) -> Tensor:  # fmt: skip
        """Draw images (N, C, H, W) by ancestral sampling. options: as for `p_sample`.

        noise: x_T in that shape; drawn if None. device: the noise's or the model's device if None. generator: for all
        noise; may be on another device.
        """
        x = _first(model, shape, noise, device, generator)
        for index in range(self.num_timesteps - 1, -1, -1):
            t = torch.full((len(x),), index, device=x.device, dtype=torch.int64)
            x = self.p_sample(model, x, t, generator=generator, **options)
        return x

    def ddim_sample_loop(
        self, model: Network, shape: Sequence[int], noise: Tensor | None = None, clip_denoised: bool = True,
        cond_fn: Network | None = None, model_kwargs: Kwargs = None, device: Device = None,
    ) -> Tensor:  # fmt: skip
        """Draw images (N, C, H, W) by deterministic DDIM. noise, device: as for `p_sample_loop`."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            out = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)
            out = out if cond_fn is None else self.condition_score(cond_fn, out, x, t, model_kwargs)
            return out["pred_xstart"]

        return ddim(denoise, self, _first(model, shape, noise, device))

    # ---- training

    def training_losses(
        self, model: Network, x_start: Tensor, t: Tensor, model_kwargs: Kwargs = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the losses of one noised batch, each (N,).

        x_start: (N, C, H, W) in [-1, 1]; noise: drawn if None.
        Always holds `loss`. MSE losses add `mse`, unweighted, and with a learned variance `vb`, the bound in bits per
        dimension, whose gradient reaches only the variance (IDDPM, eq. 16); then loss = weight * mse + vb.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
        if self.loss_type is LossType.RESCALED_KL:
            return {"loss": self.num_timesteps * self._bound(output, x_start, x_t, t)}

        prediction, var_values = self._split(output, x_t)
        target = x_start if self.model_mean_type is ModelMeanType.START_X else noise
        mse = mean_flat((target - prediction) ** 2)
        terms = {"mse": mse, "loss": self._cached("mse_weight", t.device)[t] * mse}
        if var_values is not None:
            frozen_mean = torch.cat([prediction.detach(), var_values], dim=1)
            scale = self.num_timesteps / 1000.0 if self.loss_type is LossType.RESCALED_MSE else 1.0
            terms["vb"] = scale * self._bound(frozen_mean, x_start, x_t, t)
            terms["loss"] = terms["loss"] + terms["vb"]
        return terms

    def _bound(self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return term t of the variational bound in bits per dimension (DDPM, eq. 5): (N,)."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self._interpret(output, x_t, t, clip_denoised=False)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        log_scales = 0.5 * out["log_variance"]
        decoder = -discretized_gaussian_log_likelihood(x_start, means=out["mean"], log_scales=log_scales)
        return torch.where(t == 0, mean_flat(decoder), mean_flat(kl)) / math.log(2.0)


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def _first(model: Network, shape: Sequence[int], noise: Tensor | None, device: Device, generator=None) -> Tensor:
    """Return x_T for a sampling loop: `noise`, or new noise in that shape if None."""
    if noise is None:
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        known = parameter.device if parameter is not None else "cpu"
        return _noise_like(torch.empty(*shape, device=device or known), generator)
    if tuple(noise.shape) != tuple(shape):
        raise ValueError(f"got noise of shape {tuple(noise.shape)}, expected the shape asked for, {tuple(shape)}")
    return noise if device is None else noise.to(device)
