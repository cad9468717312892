"""Shared by the speed measurements: flags, models, timing, counted work, the machine's own rate, one JSON line."""

import argparse
import contextlib
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from guided_diffusion.dist_util import PRECISIONS
from guided_diffusion.pool import Pool, PoolModel
from guided_diffusion.script_util import create_model, model_and_diffusion_defaults
from utils import checkpoint
from utils.cli import OneLineParser
from utils.environment import commit, hardware
from utils.seeding import seed_everything

SEED = 0
MATRIX = {"cpu": 4096, "cuda": 8192}  # side of the square matrices that measure the machine's own rate
GLYPHS = Path(__file__).resolve().parent.parent / "ckpt" / "glyphs"  # the pool whose first model is the small U-Net
PAPER = dict(image_size=64, num_channels=128, num_res_blocks=3, learn_sigma=True, noise_schedule="cosine")
_ATTENTION = {  # attention on a CPU, which torch leaves out of its count
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v)
    ),
}


def parse(description: str) -> argparse.Namespace:
    """Parse the flags of all four measurements. Raises ValueError for an invalid one."""
    parser = OneLineParser(description=description, allow_abbrev=False)
    parser.add_argument("--size", required=True, choices=("paper", "small"), help="of the networks and images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS, help="of the diffusion models")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs, of which the median counts (default 3)")
    parser.add_argument("--batch", type=int, help="in place of the size's own")
    args = parser.parse_args()
    for name in ("repeats", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"got --{name} {getattr(args, name)}, expected 1 or more")
    return args


def settings(
    args: argparse.Namespace, device: torch.device, sizes: Mapping[str, dict], on_gpu: Mapping[str, dict]
) -> dict[str, Any]:
    """Return the settings of --size in `sizes`, updated on a GPU from `on_gpu`, with the batch of --batch if given."""
    chosen = {**sizes[args.size], **(on_gpu.get(args.size, {}) if device.type == "cuda" else {})}
    return {**chosen, "batch": args.batch} if args.batch else chosen


def unet_flags(size: str) -> dict[str, Any]:
    """Return every flag of `create_model_and_diffusion` for a size: the paper's, or the shipped pool's."""
    return Pool(GLYPHS).load(0).flags if size == "small" else {**model_and_diffusion_defaults(), **PAPER}


def unet_settings(size: str) -> dict[str, Any]:
    """Return the JSON line's entries on the U-Net of a size."""
    flags = unet_flags(size)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in create_model(**flags).parameters())
    names = ("image_size", "num_channels", "num_res_blocks", "channel_mult", "learn_sigma", "diffusion_steps")
    return {**{name: flags[name] for name in names}, "parameters": parameters}


@contextlib.contextmanager
def _pool(size: str) -> Iterator[Pool]:
    """Yield a pool in files, as main.py reads it: the shipped one, or a random model of the paper's size."""
    if size == "small":
        yield Pool(GLYPHS)
        return
    flags = unet_flags(size)
    seed_everything(SEED)
    network = create_model(**flags)
    for weight in network.parameters():
        if not weight.any():  # layers that start at zero: a GPU uses less power on zeros, and so runs faster
            torch.nn.init.normal_(weight, std=0.02)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        checkpoint.save(path, {"model": network.state_dict(), "flags": flags})
        yield Pool(path)


def pool_model(size: str, device: torch.device, precision: str = "float32") -> PoolModel:
    """Return the first model of the pool of a size."""
    with _pool(size) as pool:
        return pool.load(0, device, precision)


def settle_precision(args: argparse.Namespace, device: torch.device) -> None:
    """Replace --precision auto by the format that it selects on this machine, as main.py does."""
    with _pool(args.size) as pool:
        args.precision = pool.precision(args.precision, device)


def plain_model(size: str, device: torch.device) -> PoolModel:
    """Return the same model without any speed-up: built, filled, in eval mode, in float32."""
    model = pool_model(size, torch.device("cpu"))
    network = create_model(**model.flags)
    network.load_state_dict(model.network.state_dict())
    return replace(model, network=network.to(device).eval().requires_grad_(False))


def timed(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` calls, after an untimed one."""
    function()
    seconds = []
    for _ in range(repeats):
        _finish(device)
        started = time.perf_counter()
        function()
        _finish(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def count_flops(function: Callable[[], object]) -> int:
    """Return the operations of matrix products, convolutions and attention in a call, 2 per multiply-add."""
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    counter.mod_tracker = _WholeOnly()
    with counter:
        function()
    return counter.get_total_flops()


def matmul_gflops(dtype: torch.dtype, device: torch.device) -> float:
    """Return the machine's own rate in GFLOP per second: a large square matrix product, by the median of five."""
    side = MATRIX[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2e-9 * side**3 / statistics.median(timed(lambda: a @ b, device, 5))


class Timed(NamedTuple):
    """A piece of work to time. make: returns a function that processes `units` images or episodes per call.

    `make` is called only just before the timing, so that one piece's memory is not counted for another.
    """

    units: int
    make: Callable[[], Callable[[], object]]


def report(
    name: str, args: argparse.Namespace, device: torch.device, chosen: Mapping[str, Any], *, dtype: torch.dtype,
    unit: str, work: Timed, plain: Timed,
) -> None:  # fmt: skip
    """Measure and print the JSON line.

    chosen: the settings; dtype: what --precision selected; unit: "images" or "episodes"; work: the program's own way;
    plain: the baseline without its speed-ups.
    """
    with contextlib.redirect_stdout(sys.stderr):
        _say(f"{name}, {args.size}, {device}: counting the work of a run")
        run = work.make()
        flops = count_flops(run)
        _say(f"{flops / 1e9:.4g} GFLOP; a warm-up, {args.repeats} timed runs")
        seconds = timed(run, device, args.repeats)
        peak = _peak_memory(device)
        del run
        rate, achieved = work.units / statistics.median(seconds), flops / statistics.median(seconds) / 1e9
        _say(f"{rate:.4g} {unit} a second; the plain way")
        plain_seconds = timed(plain.make(), device, args.repeats)
        plain_rate = plain.units / statistics.median(plain_seconds)
        _say(f"{plain_rate:.4g} {unit} a second; the machine's own rate")
        own = {key: matmul_gflops(each, device) for key, each in _DTYPES.items()}
    line = {
        "work": name,
        "size": args.size,
        "device": _device_name(device),
        "precision": {each: key for key, each in _DTYPES.items()}[dtype],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        f"{unit}_per_second": rate,
        "achieved_gflops": achieved,
        **{f"matmul_{key}_gflops": value for key, value in own.items()},
        **{f"ratio_{key}": achieved / value for key, value in own.items()},
        "plain": plain_rate,
        "speedup": rate / plain_rate,
        "peak_memory_mb": peak,
        "seconds": seconds,
        "plain_seconds": plain_seconds,
        "settings": {**chosen, f"{unit}_timed": work.units, f"plain_{unit}_timed": plain.units, **_float32_on(device)},
    }
    print(json.dumps(_rounded(line)), flush=True)


class _WholeOnly(contextlib.nullcontext):
    """Replaces the counter's hooks on each module, which fail with `torch.autograd.grad` in guidance."""

    parents = {"Global"}


_DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def _device_name(device: torch.device) -> str:
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if device.type == "cpu" else ""
    return hardware(str(device)) + threads


def _float32_on(device: torch.device) -> dict[str, str]:
    """Return how a GPU computes float32 products and convolutions: "ieee", "tf32", or "none", torch's default."""
    if device.type != "cuda":
        return {}
    return {
        "float32_products": torch.backends.cuda.matmul.fp32_precision,
        "float32_convolutions": torch.backends.cudnn.conv.fp32_precision,
    }


def _peak_memory(device: torch.device) -> float:
    """Return the peak memory in MiB: of torch on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _rounded(value: Any) -> Any:
    """Round floats, also in lists and dicts, to four significant digits."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
