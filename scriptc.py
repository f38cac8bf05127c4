"""Teach a network to draw faces of people who do not exist, by denoising diffusion.

    python scriptc.py                         train on all images below fake_face/, or resume that run
    python scriptc.py --demo                  the same in a few minutes, on faces that the program draws
    python scriptc.py --sample 64             no training: draw 64 new faces with the trained network
    torchrun --nproc_per_node=2 scriptc.py    any of these with two processes, such as one on each of 2 GPUs

Order of the file: settings, method (schedule, network, sampling), training, data, pictures, checkpoint,
plumbing, main. Read settings and method, the whole algorithm, first; then `training_step` and `train`.

The method is Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), with its symbols:
x_0 is an image in [-1, 1], x_t the same image with the noise of timestep t, alphas_cumprod[t] the paper's
alpha-bar_t. The loss is the L1 error instead of the squared one. Sampling adds Song et al. 2021
(arXiv:2010.02502) and Lu et al. 2022 (arXiv:2211.01095).
"""

import time

START = time.monotonic()  # before the slow imports, since --minutes includes them

import argparse
import contextlib
import copy
import datetime
import errno
import hashlib
import io
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torch.utils._pytree import tree_map_only
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

if sys.platform == "win32":
    import ctypes
    import msvcrt
else:
    import fcntl

HERE = pathlib.Path(__file__).resolve().parent
RANK = int(os.environ.get("RANK", 0))  # number of this process, set by torchrun
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


class UserError(Exception):
    """An error that only the user can correct. Its text is one sentence that says how."""


# ---------------------------------------------------------------------------------------------- settings ----

DEMO_IMAGES = 2000
DEMO_DEFAULTS = {"image_size": 32, "minutes": 5}


def between(kind, least, most, step=None):
    """An argparse type: an int or a float (`kind`) from `least` to `most`; with `step`, a multiple of it."""

    def number(text):
        value = kind(text)  # argparse says what ValueError means
        if not least <= value <= most or step and value % step:
            multiple = f"a multiple of {step} " if step else ""
            raise argparse.ArgumentTypeError(f"{text} is not {multiple}from {least:g} to {most:,.10g}")
        return value

    return number


def build_parser(**options):
    """Every setting, its default and its unit."""
    parser = argparse.ArgumentParser(**options, usage="%(prog)s [flags]",
        description="Train a diffusion network on faces, and draw new ones.",
        epilog="Network and training settings that are not given come from the checkpoint if there is one.")
    count = between(int, 1, 10**9)
    minutes = between(float, 1e-3, 1e6)
    add = parser.add_argument_group("files").add_argument
    add("--dataroot", metavar="DIR",
        help="train on all images below it (default: fake_face beside the script)")
    add("--results", metavar="DIR", help="for pictures and metrics (default: results beside the script)")
    add("--checkpoint", metavar="FILE",
        help="file to create or resume (default: model_checkpoint.pth beside the script)")
    add("--save-minutes", metavar="M", type=minutes, default=10, help="between two checkpoints (default: 10)")
    add("--demo", action="store_true", help=f"needs no images: draws {DEMO_IMAGES} itself, into results/demo")
    add = parser.add_argument_group("network").add_argument
    add("--image-size", metavar="PX", type=between(int, 16, 256, 16), default=64,
        help="side of the images in pixels, a multiple of 16 (default: 64, with --demo 32)")
    add("--channels", metavar="C", type=between(int, 8, 4096, 8), nargs="+",
        help="width at each resolution, from the full one down (default: by device and size)")
    add("--timesteps", metavar="T", type=between(int, 10, 10_000), default=1000,
        help="diffusion steps (default: 1000)")
    add = parser.add_argument_group("training").add_argument
    add("--batch-size", metavar="N", type=count,
        help="images per step, over all processes (default: 64; on a CPU 2048 / image size)")
    add("--epochs", metavar="N", type=count, help="passes over the images (default: 100 if no other limit)")
    add("--minutes", metavar="M", type=minutes,
        help="minutes for the run, all starts together (default: no limit, with --demo 5)")
    add("--max-steps", metavar="N", type=count, help="optimizer steps in all (default: no limit)")
    add("--lr", metavar="X", type=between(float, 1e-9, 1), default=8e-3,
        help="highest learning rate (default: 0.008)")
    add("--seed", metavar="S", type=between(int, 0, 10**9), default=0, help="random seed (default: 0)")
    add = parser.add_argument_group("drawing").add_argument
    add("--sample", metavar="N", type=count, help="no training: draw N images into results/samples")
    add("--sample-steps", metavar="K", type=count, default=20, help="network calls per image (default: 20)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("cuda", "mps", "cpu"), help="default: the first of these that is present")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: by hardware")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="use torch.compile: minutes for the first step, no gain on a CPU (default: no)")
    return parser


# ------------------------------------------------------------------------------------------------ method ----

def linear_beta_schedule(timesteps):
    """Betas (T,), float64, that rise linearly (Ho et al. 2020, section 4). The paper's range, 1e-4 to 0.02,
    is for T = 1000. It is scaled by 1000 / T, so that for every T from 10 up hardly anything of the image is
    left at the end: the product of 1 - beta is below 1e-4."""
    scale = 1000 / timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64).clamp(max=0.999)


def forward_diffusion(x_0, t, alphas_cumprod, noise=None):
    """Noise images in closed form: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, equation 4).
    x_0 (B, 3, S, S), t (B,) in [0, T), a = alphas_cumprod (T,) = cumprod(1 - betas). Returns (x_t, noise)."""
    if noise is None:
        noise = torch.randn_like(x_0)
    a_t = alphas_cumprod[t][:, None, None, None]
    return (a_t.sqrt() * x_0 + (1 - a_t).sqrt() * noise).to(x_0.dtype), noise


DENSITY_MEAN = 1.0  # of lambda at 32 px
DENSITY_DEVIATION = 2.5


def timestep_probabilities(timesteps, image_size):
    """Probability (T,), float64, with which the training draws each timestep.

    With linear betas, half of all timesteps are almost pure noise, where the network can learn little. So
    timesteps are drawn such that the log signal-to-noise ratio lambda = log(a_t / (1 - a_t)) has a normal
    density: the probability of t is proportional to normal(lambda_t; mean, deviation) |d lambda / dt| (Hang
    et al. 2024, arXiv:2407.03297). In an image of twice the side, noise of the same level hides half as much,
    so the mean is less by log 4 for each doubling (Hoogeboom et al. 2023, arXiv:2301.11093).
    """
    a = torch.cumprod(1 - linear_beta_schedule(timesteps), 0)
    log_snr = torch.log(a / (1 - a))
    mean = DENSITY_MEAN - math.log(4) * math.log2(image_size / 32)
    slope = torch.gradient(log_snr)[0].abs()
    density = torch.exp(-0.5 * ((log_snr - mean) / DENSITY_DEVIATION) ** 2) * slope
    return density / density.sum()


class SinusoidalPositionEmbeddings(nn.Module):
    """Timesteps (B,) to (B, dim), dim even and at least 4: sines, then cosines, of wavelengths 2 pi to 20,000
    pi (Vaswani et al. 2017, 3.5)."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, timesteps):
        half = self.dim // 2
        frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=timesteps.device))
        angles = timesteps[:, None].float() * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)


def default_channels(device, image_size):
    """Default width of the network at each resolution. On a CPU it is small enough to draw faces within
    minutes, and images of 64, 128 and 256 px shrink to 4 x 4 px, most of which a 3 x 3 convolution covers."""
    if device.type == "cuda":
        return [64, 128, 256, 512]
    if image_size <= 32:
        return [16, 64, 64, 192]
    more_levels = image_size // 128 if image_size % 32 == 0 else 0
    return [16] * more_levels + [16, 32, 64, 128, 192]


def default_batch_size(device, image_size):
    """Default number of images in a step. On a CPU 64 at 32 px, half as many for each doubling of the side:
    in the same time, more steps with fewer images give better faces."""
    return 2048 // image_size if device.type == "cpu" else 64


class Norm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018, arXiv:1803.08494), in the number format of x: only the mean and
    variance are float32. Autocast would turn all of x to float32, and SiLU with it."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Block(nn.Module):
    """A residual block: x plus two convolutions of x, between which the time embedding scales and shifts each
    channel. x (B, c_in, H, W) and the time embedding (B, c_time) to (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, c_time):
        super().__init__()
        self.norm = Norm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_projection = nn.Linear(c_time, 2 * c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # so the block begins as its shortcut: this eases training
        nn.init.zeros_(self.conv2.bias)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time_embedding):
        scale, shift = self.time_projection(time_embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm(x)))
        h = self.conv2(F.silu(h * (1 + scale) + shift))
        return self.shortcut(x) + h


class SimpleUnet(nn.Module):
    """Predicts the noise in x_t. A contracting path halves the image and deepens the features at each of
    `channels`; then a bottleneck; then an expanding path doubles the image again. At each resolution the
    expanding path also gets the features of the contracting path (skip connections, Ronneberger et al. 2015).
    Every block gets t, embedded.

    The layers compute v, and the predicted noise is sqrt(1 - a_t) x_t + sqrt(a_t) v with a_t =
    alphas_cumprod[t]. Near pure noise x_t itself is the best prediction, and so no layer has to copy it
    (Salimans & Ho 2022, arXiv:2202.00512). `image_size` (px) must be divisible by 2 ** (len(channels) - 1).
    """

    def __init__(self, channels=(16, 32, 64, 128, 192), image_size=64, timesteps=1000):
        super().__init__()
        self.image_size = image_size
        self.timesteps = timesteps
        c_time = 256
        self.time_mlp = nn.Sequential(SinusoidalPositionEmbeddings(64), nn.Linear(64, c_time), nn.SiLU(),
                                      nn.Linear(c_time, c_time), nn.SiLU())
        self.first = nn.Conv2d(3, channels[0], 3, padding=1)
        pairs = list(zip(channels, channels[1:]))
        self.down = nn.ModuleList(Block(c, c, c_time) for c in channels)
        self.downsample = nn.ModuleList(nn.Conv2d(c, deeper, 3, stride=2, padding=1) for c, deeper in pairs)
        self.bottleneck = nn.ModuleList(Block(channels[-1], channels[-1], c_time) for _ in range(4))
        self.up = nn.ModuleList(Block(2 * c, c, c_time) for c in channels)
        self.upsample = nn.ModuleList(nn.Conv2d(deeper, c, 1) for c, deeper in pairs)
        self.last = nn.Sequential(Norm(8, channels[0]), nn.SiLU(),
                                  nn.Conv2d(channels[0], 3, 3, padding=1))
        nn.init.zeros_(self.last[-1].weight)
        alphas_cumprod = torch.cumprod(1 - linear_beta_schedule(timesteps), 0).float()
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    def forward(self, x_t, t):
        """Noisy images x_t (B, 3, S, S), t (B,) integer timesteps, to the predicted noise, as x_t."""
        time_embedding = self.time_mlp(t)
        skips = []
        x = self.first(x_t)
        for level, block in enumerate(self.down):
            x = block(x, time_embedding)
            skips.append(x)
            if level < len(self.downsample):
                x = self.downsample[level](x)
        for block in self.bottleneck:
            x = block(x, time_embedding)
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat((x, skips[level]), dim=1), time_embedding)
            if level > 0:
                x = double(self.upsample[level - 1](x))
        a_t = self.alphas_cumprod[t][:, None, None, None]
        return (1 - a_t).sqrt() * x_t + a_t.sqrt() * self.last(x)


def double(x):
    """Features (B, C, H, W) at twice the resolution, each repeated 2 x 2 times, in the number format of x."""
    with torch.autocast(x.device.type, enabled=False):  # which would turn them to float32
        return F.interpolate(x, scale_factor=2)


SAMPLERS = {  # (eta, order): how much of the noise each step draws anew, how many estimates of x_0 it uses
    "ddpm": (1, 1),  # ancestral sampling, Ho et al. 2020, algorithm 2
    "ddim": (0, 1),  # deterministic, Song et al. 2021 (arXiv:2010.02502)
    "dpm++": (0, 2),  # DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095)
    "sde-dpm++": (1, 2),  # its stochastic form
}


def sampling_schedule(timesteps, steps):
    """Three lists for sample(): the timesteps that it visits, at most `steps`, from the last one to 0,
    quadratically closer towards 0 (Song et al. 2021, appendix D.2); alpha; and sigma. The last two have one
    value more, for the clean image at the end: its sigma is 1e-9, since sample() takes the logarithm."""
    t = np.arange(timesteps) if steps >= timesteps else (timesteps - 1) * np.linspace(1, 0, steps) ** 2
    t = np.unique(t.round().astype(int))[::-1].tolist()
    alphas_cumprod = torch.cumprod(1 - linear_beta_schedule(timesteps), 0)[t]
    return t, [*alphas_cumprod.sqrt().tolist(), 1.0], [*(1 - alphas_cumprod).sqrt().tolist(), 1e-9]


@torch.no_grad()
def sample(model, count=64, steps=20, sampler="dpm++", seed=0, first=0, noise=None, precision="fp32",
           on_step=None):
    """Draw `count` images, (count, 3, S, S) float32 in [-1, 1] on the CPU, from a trained SimpleUnet.

    Every sampler of SAMPLERS takes the same step from x_t to the less noisy x_s, with alpha =
    sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod) and h = log(alpha_s / sigma_s) - log(alpha_t /
    sigma_t) > 0:

        x_s = (sigma_s / sigma_t) e^(-eta h) x_t + alpha_s (1 - e^(-(1 + eta) h)) D
              + sigma_s sqrt(1 - e^(-2 eta h)) fresh noise

    D is the estimate of the clean image, x_0 = (x_t - sigma_t predicted noise) / alpha_t, clipped to [-1, 1].
    With order 2 it is extrapolated from this and the last estimate, except in the first and the last step:
    D = x_0 + (x_0 - x_0_before) / 2r with r = h_before / h (Lu et al. 2022, algorithm 2). eta = 1 with order
    1 over all timesteps is the ancestral sampling of Ho et al. 2020.

    `steps` is the most network evaluations. Image i of a `seed`, counted from `first`, does not depend
    on `count`. Sampling starts from `noise` (count, 3, S, S) if it is given. `on_step(x_t, x_0)`, if given,
    is called before each step; return True to stop early.
    """
    device = next(model.parameters()).device
    eta, order = SAMPLERS[sampler]
    count = count if noise is None else len(noise)
    streams = [generator("sample", seed, first + number, device=device) for number in range(count)]
    start = randn(streams, model.image_size)  # also if `noise` is given: later steps draw other numbers
    x = start if noise is None else noise.to(device)
    visited, alpha, sigma = sampling_schedule(model.timesteps, steps)
    x_0_before = h_before = None
    for step, t in enumerate(visited):
        with autocast(device, precision):
            predicted = model(x, torch.full((count,), t, device=device)).float()
        x_0 = ((x - sigma[step] * predicted) / alpha[step]).clamp(-1, 1)
        if on_step and on_step(x, x_0):
            break
        h = math.log(alpha[step + 1] / sigma[step + 1]) - math.log(alpha[step] / sigma[step])
        estimate = x_0
        if order == 2 and 0 < step < len(visited) - 1:
            r = h_before / h
            estimate = x_0 + (x_0 - x_0_before) / (2 * r)
        kept = sigma[step + 1] / sigma[step] * math.exp(-eta * h)
        x = kept * x + alpha[step + 1] * (1 - math.exp(-(1 + eta) * h)) * estimate
        if eta:
            x = x + sigma[step + 1] * math.sqrt(1 - math.exp(-2 * eta * h)) * randn(streams, model.image_size)
        x_0_before = x_0
        h_before = h
    return x.cpu()


def randn(streams, size):
    """Standard normal noise (len(streams), 3, size, size), each image from its own torch.Generator."""
    noise = torch.stack([torch.randn(3, size, size, generator=stream, device=stream.device)
                         for stream in streams])
    return noise.contiguous(memory_format=memory_format(noise.device))


def generator(*key, device="cpu"):
    """A random generator that depends on `key` alone, so that any moment of a run can be repeated."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --precision


def autocast(device, precision):
    """The context in which the network computes in `precision`, a name of DTYPES, on `device`."""
    # without float32, of which torch.autocast of PyTorch 2.6 warns on an Apple GPU
    return contextlib.nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])


def memory_format(device):
    """The layout of images and weights for `device`: channels last, except where that is slow: on Apple GPUs
    (pytorch issues 193349 and 193623), on NVIDIA GPUs without tensor cores (issue 44943), and on CPUs with
    bf16, where group norm takes up to 20 times as long in that layout (bench_step.py norm)."""
    precision = choose_precision("auto", device)
    slow = device.type == "mps" or (device.type, precision) in (("cuda", "fp32"), ("cpu", "bf16"))
    return torch.contiguous_format if slow else torch.channels_last


# ---------------------------------------------------------------------------------------------- training ----

WARM_UP = 0.01  # share of the run in which the learning rate rises; after it, it falls linearly to zero
MOMENTUM = 0.9  # of Muon
EMA_POWER = 12  # after n steps, the first i of them have (i / n) ** 12 of the weight in the average
CORE_PIXELS = 16 * 64**2  # of images computed together, for each CPU core: about as many as fit in its cache
COMPARED_MOST = 512  # held-out images, and as many training images, on which the losses are measured
DRAWING_SHARE = 0.05  # of the time, at most, for the pictures along the way
BAD_STEPS = 20  # consecutive steps without a finite gradient before giving up
LOOK_SECONDS = 2  # between looks at the loss
LINE_SECONDS = 5  # least time between the lines of two epochs; metrics.csv is written with each line

# a, b, c of each iteration S <- a S + b S^3 + c S^5. Three iterations bring every singular value from 0.01 to
# 1 into 0.73 to 1.27, the narrowest range (found as in Amsel et al. 2025, arXiv:2505.16932, section 3).
NEWTON_SCHULZ = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


def orthogonalize(x, dtype):
    """Matrices x = U S V' (N, rows, columns) to about U V', by Newton-Schulz iterations in `dtype`.

    Each one multiplies x by a polynomial in x x'. The polynomials are multiplied first and x last, since x x'
    has only the shorter side of x, which in a 3 x 3 convolution of equal widths is a ninth of the longer one.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, dtype).mT
    x = (x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    gram = x @ x.mT
    polynomial = product = None
    for a, b, c in NEWTON_SCHULZ:
        if product is not None:
            gram = polynomial @ gram @ polynomial
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
    return product @ x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for convolution kernels (outputs, inputs,
    K, K).

    The momentum of a kernel's gradient, a matrix (outputs, K x K x inputs), is orthogonalized before it is
    subtracted, so that an update is as large in rare directions as in common ones. With the factor 0.2
    sqrt(longer side) (Liu et al. 2025, arXiv:2502.16982) its entries are as large as Adam's, and one learning
    rate serves both. Kernels of equal shape are one parameter group and are updated together. The matrix
    products are in `dtype`.

    Where `found_inf`, a tensor (), is 1, nothing changes, as in torch's fused optimizers.
    """

    def __init__(self, kernels, lr, dtype=torch.float32):
        groups = {}
        for kernel in kernels:
            groups.setdefault(kernel.shape, []).append(kernel)
        super().__init__([{"params": group} for group in groups.values()], {"lr": lr})
        self.dtype = dtype
        self.found_inf = torch.zeros((), device=kernels[0].device)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            kernels = group["params"]
            gradient = torch.stack([kernel.grad.permute(0, 2, 3, 1).flatten(1) for kernel in kernels])
            state = self.state[kernels[0]]
            momentum = state.setdefault("momentum", torch.zeros_like(gradient))
            gradient = torch.where(self.found_inf > 0, momentum, gradient)
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonalize(gradient.lerp_(momentum, MOMENTUM), self.dtype).float()
            update *= (1 - self.found_inf) * (0.2 * math.sqrt(max(update.shape[1:])) * group["lr"])
            sides = kernels[0].shape[2:]
            updates = [matrix.unflatten(1, (*sides, -1)).permute(0, 3, 1, 2) for matrix in update]
            torch._foreach_sub_(kernels, updates)


def build_optimizers(model, lr, dtype):
    """Muon for convolution kernels, with matrix products in `dtype`; Adam for all other weights and for the
    first and the last convolution."""
    plain = {*model.first.parameters(), *model.last.parameters()}
    kernels = [weight for weight in model.parameters() if weight.ndim == 4 and weight not in plain]
    others = [weight for weight in model.parameters() if weight.ndim != 4 or weight in plain]
    adam = torch.optim.Adam(others, lr, betas=(0.9, 0.99), fused=True)
    return {"muon": Muon(kernels, lr, dtype), "adam": adam}


def images_at_once(most, image_size, device):
    """How many images to compute together: at most `most`, and on a CPU no more than fit in its caches."""
    fit = CORE_PIXELS * torch.get_num_threads() // image_size**2 if device.type == "cpu" else most
    return max(1, min(most, fit))


def learning_rate(highest, done):
    """The learning rate when the part `done` (0 to 1) of the run is done; not zero in the first step."""
    return highest * min(1, (done + 1e-3) / WARM_UP) * (1 - done)


NEW_RUN = {  # how far a run has come; all of it is in the checkpoint
    "epoch": 0,  # whole epochs
    "step": 0,  # optimizer steps
    "images_seen": 0,
    "images_in_epoch": 0,  # those of images_seen that belong to the current epoch
    "seconds": 0.0,  # of all starts together, start-up included
    "seconds_at_first_step": 0.0,  # when it had ended, since it may compile the network
    "seconds_of_drawing": 0.0,  # of the latest pictures, with metrics; 0 before the first ones
    "seconds_of_saving": 0.0,  # of the latest checkpoint
    "history": [],  # rows of metrics.csv
    "images_hash": "",  # identifies the set of training images of the current epoch
}


class Run:
    """One training run: settings, device, data, networks, and `progress`, which a checkpoint keeps. All else
    that changes (due times, counters, the size of micro-batches) begins at its first value in every start."""

    def __init__(self, args, device):
        """A run at its beginning, without images: settings, networks and optimizers. Needs no disk."""
        self.args = args
        self.device = device
        self.precision = choose_precision(args.precision, device)
        self.progress = argparse.Namespace(**copy.deepcopy(NEW_RUN))
        torch.manual_seed(args.seed)
        self.model = build_network(vars(args), device)
        # the network with the average of the weights, which draws the pictures
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if args.compile:
            self.model.compile(dynamic=True)  # once for all sizes of batches: those of an epoch differ by one
        self.weights = list(self.model.parameters())
        self.averages = list(self.ema.parameters())
        self.optimizers = build_optimizers(self.model, args.lr, DTYPES[self.precision])
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.cumulative = timestep_probabilities(args.timesteps, args.image_size).cumsum(0).float().to(device)
        self.losses = torch.zeros(2, device=device)  # sum and number of the losses since the last look
        self.bad_steps = torch.zeros((), device=device)  # latest consecutive steps without a finite gradient
        self.micro_batch = images_at_once(args.batch_size, args.image_size, device)
        self.save_due = time.monotonic()  # the first checkpoint is made at once: it shows that it can be
        self.next_drawing = self.next_line = self.next_look = 0.0
        self.speed = 0.0  # training images a second, in this epoch
        self.about = []
        self.real = None  # RealFaces, once pictures are drawn

    def restore(self, saved):
        """Continue from the checkpoint `saved`. UserError where its parts do not fit together."""
        try:
            self.progress = argparse.Namespace(**{name: saved[name] for name in NEW_RUN})
            self.speed = saved["images_seen"] / (saved["seconds"] + 1e-6)  # until there is a step
            self.model.load_state_dict(saved["model"])
            self.ema.load_state_dict(saved["ema"])
            self.scaler.load_state_dict(saved["scaler"] or self.scaler.state_dict())  # {} if it was not fp16
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(saved["optimizer"][name])
            for weight, moments in self.optimizers["adam"].state.items():
                for name in ("exp_avg", "exp_avg_sq"):  # in the layout that this device needs
                    moments[name] = torch.empty_like(weight).copy_(moments[name])
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"the parts of {saved['file']} do not fit together ({first_line(error)}): "
                            f"{self.args.start_over}") from None

    def open_images(self):
        """Find the images, continue where `progress` says. UserError if processes find different ones."""
        progress = self.progress
        files = from_rank_0(list_files(self.args) if RANK == 0 else None)  # others may see more by now
        with rank_0_first():
            names, self.faces, self.skipped = load_images(self.args, files, self.device)
        self.train_numbers, *self.compared = split(names)
        images_hash = hashlib.sha256(repr([names[number] for number in self.train_numbers])
                                     .encode()).hexdigest()
        state_here = (progress.epoch, progress.step, int(images_hash[:12], 16),
                      list(DTYPES).index(self.precision))
        if broadcast(*state_here) != state_here:
            raise UserError(f"process {RANK} has another checkpoint, other images or another precision than "
                            "process 0: --checkpoint and --dataroot must be on a disk that all machines "
                            "share, and GPUs of different kinds need --precision")
        if images_hash != progress.images_hash:  # the folder has changed: the epoch starts over
            progress.images_hash = images_hash
            progress.images_in_epoch = 0
        # without the row of an unfinished epoch, which comes again
        progress.history = [row for row in progress.history if row[0] <= progress.epoch]

    def seconds(self):
        """Seconds of all starts of this run together."""
        return self.progress.seconds + time.monotonic() - START

    def done(self):
        """The part of the run that is done, 0 to 1, by epochs, steps or the clock. Time counts from the end
        of the first step, and some is reserved for the last pictures and checkpoint: twice what the latest
        ones took, at most half of all. Before there are pictures, theirs is estimated, with the losses of the
        epoch: a network evaluation of an image takes a third of its training step."""
        progress = self.progress
        args = self.args
        epochs_done = progress.epoch + progress.images_in_epoch / len(self.train_numbers)
        done = max(epochs_done / (args.epochs or math.inf), progress.step / (args.max_steps or math.inf))
        if args.minutes and progress.step:
            training_seconds = self.seconds() - progress.seconds_at_first_step
            drawing = (progress.seconds_of_drawing
                       or (64 * args.sample_steps + sum(map(len, self.compared)))
                       * training_seconds / 3 / progress.images_seen)
            reserve = 2 * (drawing + progress.seconds_of_saving)
            budget = max(60 * args.minutes - progress.seconds_at_first_step, 0.1)
            done = max(done, training_seconds / (budget - min(reserve, budget / 2)))
        return min(done, 1.0)

    def seconds_left(self):
        return (self.seconds() - self.progress.seconds_at_first_step) * (1 / max(self.done(), 1e-6) - 1)

    def state(self, finished):
        """What a checkpoint holds, on the CPU."""
        state = {**vars(self.progress), "seconds": self.seconds(), "version": VERSION, "finished": finished,
                 "model": self.model.state_dict(), "ema": self.ema.state_dict(),
                 "optimizer": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                 "scaler": self.scaler.state_dict(),
                 "config": {name: vars(self.args)[name] for name in STORED}}
        return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), state)


def stratified_timesteps(run, position):
    """Timesteps (N,) that follow timestep_probabilities, one from each of N intervals of equal probability
    (stratified sampling); `position` (N,) in [0, 1) is where in its interval each one lies."""
    quantile = (torch.arange(len(position), device=run.device) + position) / len(position)
    return torch.searchsorted(run.cumulative, quantile).clamp(max=run.args.timesteps - 1)


def random_draws(run, count):
    """flip (count,) bool, t (count,) int64, noise (count, 3, S, S) of the current step, on the device. They
    depend on (seed, step) alone: they are the same after a restart and for any number of processes."""
    stream = generator("step", run.args.seed, run.progress.step, device=run.device)
    size = run.args.image_size
    flip = torch.rand(count, generator=stream, device=run.device) < 0.5
    t = stratified_timesteps(run, torch.rand(count, generator=stream, device=run.device))
    noise = torch.randn(count, size, size, 3, generator=stream, device=run.device).permute(0, 3, 1, 2)
    return flip, t, noise.contiguous(memory_format=memory_format(run.device))


def l1_error(run, model, numbers, t, noise, flip=None):
    """L1 error of the noise that `model` predicts, (): the mean over the values of an image, summed over the
    images `numbers` (B,). They are mirrored where `flip` (B,) is True, then `noise` (B, 3, S, S) is added at
    timesteps t (B,)."""
    x_t, _ = forward_diffusion(run.faces.batch(numbers, flip), t, run.model.alphas_cumprod, noise)
    with autocast(run.device, run.precision):
        predicted = model(x_t, t)
    return F.l1_loss(predicted.float(), noise, reduction="sum") / noise[0].numel()


def accumulate_gradients(run, numbers):
    """Noise the images `numbers` (B,), predict the noise, L1 loss, backward, in micro-batches. Returns the
    loss, ().

    Each process takes its share of the batch. The losses and the gradients of all micro-batches of all
    processes add up to those of the batch's mean.
    """
    begin = len(numbers) * RANK // PROCESSES
    end = len(numbers) * (RANK + 1) // PROCESSES
    batch = len(numbers) if end > begin else math.inf  # a process without images computes one of weight 0
    mine = slice(begin, max(end, begin + 1))
    share = [values[mine].split(run.micro_batch) for values in (numbers, *random_draws(run, len(numbers)))]
    loss = torch.zeros((), device=run.device)
    for chunk, flip, t, noise in zip(*share):
        part = l1_error(run, run.model, chunk, t, noise, flip) / batch
        run.scaler.scale(part).backward()
        loss += part.detach()
    return loss


def sum_over_processes(tensors):
    """Sum each of `tensors` over all processes, in place."""
    values = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(values)
    for tensor, total in zip(tensors, values.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))


@torch.no_grad()
def keep_weights_equal(run):
    """All processes apply equal updates to equal weights. Where the weights differ nevertheless, as they may
    on GPUs of different kinds, all processes take those of rank 0."""
    checksum = torch.stack([weight.double().sum() for weight in run.weights]).sum().item()
    differs = torch.tensor(float(checksum != broadcast(checksum)[0]))
    dist.all_reduce(differs)
    if differs > 0:
        say("warning: the weights of the processes differ: all take those of process 0")
        values = [*run.weights, *run.averages]
        if RANK > 0:
            torch._foreach_zero_(values)
        sum_over_processes(values)  # not dist.broadcast, which copies memory, whatever its layout


def training_step(run, numbers, done):
    """One optimizer step on images `numbers` (B,) of run.faces when the part `done` (0 to 1) of the run is
    done. If the loss or the gradient is not finite, no weight changes, without a wait for the device. If
    there is too little memory for a micro-batch, its size is halved and the same step repeated."""
    loss = None
    while loss is None:
        run.model.zero_grad()
        try:
            loss = accumulate_gradients(run, numbers)
        except RuntimeError as error:
            run.micro_batch = halve_or_raise(run.micro_batch, error)
    if PROCESSES > 1:
        sum_over_processes([loss, *(weight.grad for weight in run.weights)])
    for optimizer in run.optimizers.values():
        run.scaler.unscale_(optimizer)
    finite = (nn.utils.clip_grad_norm_(run.weights, 1.0) + loss).isfinite()
    for optimizer in run.optimizers.values():
        optimizer.found_inf = (~finite).float()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.args.lr, done)
        if run.device.type != "mps" or finite:  # there, torch's Adam does not look at found_inf
            optimizer.step()
    run.scaler.update()
    run.progress.step += 1
    run.progress.images_seen += len(numbers)
    run.progress.images_in_epoch += len(numbers)
    with torch.no_grad():  # the power-function average of Karras et al. 2024 (arXiv:2312.02696)
        torch._foreach_lerp_(run.averages, run.weights, 1 - (1 - 1 / run.progress.step) ** EMA_POWER)
    run.losses += torch.where(finite, torch.stack((loss, torch.ones_like(loss))), 0)
    run.bad_steps = torch.where(finite, 0, run.bad_steps + 1)


@torch.no_grad()
def compared_loss(run, numbers):
    """Mean L1 loss of the averaged network on the images `numbers`, under the training's density of
    timesteps. Noise and timesteps are the same every time, and the same for training and held-out images."""
    timesteps = stratified_timesteps(run, torch.full((len(numbers),), 0.5, device=run.device))
    loss = 0.0
    for places in torch.arange(len(numbers)).split(run.micro_batch):
        streams = [generator("compared", place, device=run.device) for place in places.tolist()]
        noise = randn(streams, run.args.image_size)
        loss += l1_error(run, run.ema, numbers[places], timesteps[places], noise).item() / len(numbers)
    return loss


def batches_left(run):
    """Numbers (B,) of the images of each batch that is left of this epoch. Their order depends on (seed,
    epoch), and batches are as equal as possible, so that a resumed epoch has the same ones."""
    order = torch.randperm(len(run.train_numbers),
                           generator=generator("order", run.args.seed, run.progress.epoch))
    rest = run.train_numbers[order][run.progress.images_in_epoch:].to(run.faces.rows.device)
    return rest.tensor_split(math.ceil(len(rest) / run.args.batch_size)) if len(rest) else ()


def look(run, bar):
    """Show the loss, renew the page. It waits for the device. UserError where training diverges."""
    if run.bad_steps >= BAD_STEPS:
        raise UserError(f"{BAD_STEPS} steps in a row had no finite gradient and changed nothing: resume the "
                        "checkpoint with a lower --lr or with --precision fp32")
    if bar.n > bar.initial:
        run.speed = (bar.n - bar.initial) / (bar.format_dict["elapsed"] + 1e-6)
    total, count = run.losses.tolist()
    run.losses.zero_()
    bar.set_postfix_str(f"loss {total / max(count, 1):.4f}, "
                        f"{run.seconds_left() / 60:.1f} minutes left in all", refresh=False)
    if time.monotonic() >= run.next_look:  # not after every epoch, which may be one step
        write_page(run.args.results, run, "training")
        run.next_look = time.monotonic() + LOOK_SECONDS


def end_epoch(run, at_end, stop):
    """Metrics, pictures and a line of an epoch, or of the part of one that ends the run; only in rank 0."""
    progress = run.progress
    history = progress.history
    begun = time.monotonic()
    if progress.images_in_epoch:
        losses = [compared_loss(run, numbers) for numbers in run.compared]
        if not math.isfinite(sum(losses)):
            raise UserError("the loss is not finite any more: resume the checkpoint with a lower --lr or "
                            "with --precision fp32")
        rate = run.optimizers["adam"].param_groups[0]["lr"]
        history.append([progress.epoch + 1, progress.step, progress.images_seen, *losses, None, rate,
                        run.speed, run.seconds()])
    if history and (at_end or begun >= run.next_drawing):
        write_page(run.args.results, run, "drawing")
        draw_pictures(run, stop)
        progress.seconds_of_drawing = time.monotonic() - begun
        run.next_drawing = time.monotonic() + progress.seconds_of_drawing / DRAWING_SHARE
    if history and (at_end or begun >= run.next_line):
        run.next_line = begun + LINE_SECONDS
        row = dict(zip(COLUMNS, history[-1]))
        far = "" if row["sample_distance"] is None else f", sample distance {row['sample_distance']:.2f}"
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if run.device.type == "cuda" else ""
        say(f"epoch {row['epoch']}: step {row['step']:,}, loss {row['train_loss']:.4f}, held out "
            f"{row['heldout_loss']:.4f}{far}, {row['images_per_second']:.0f} images/s, "
            f"{run.seconds_left() / 60:.1f} minutes left{memory}")
        with result(run.args.results / "metrics.csv") as file:  # always whole: no row is cut off or doubled
            file.writelines(f"{','.join('' if value is None else str(value) for value in row)}\r\n".encode()
                            for row in (COLUMNS, *history))


def train(run, stop):
    """Train until the run ends or `stop`, a threading.Event, is set. Returns whether it was stopped."""
    progress = run.progress
    at_end = stopped = False
    while not (at_end or stopped):
        bar = progress_bar(f"epoch {progress.epoch + 1}", len(run.train_numbers), progress.images_in_epoch)
        for numbers in batches_left(run):
            saving = time.monotonic() >= run.save_due
            done, stopped, saving = broadcast(run.done(), stop.is_set(), saving)
            if stopped or done >= 1:
                break
            training_step(run, numbers, done)
            progress.seconds_at_first_step = progress.seconds_at_first_step or run.seconds()
            if saving:
                save(run)
            bar.update(len(numbers))
            if RANK == 0 and time.monotonic() >= run.next_look:
                look(run, bar)
        at_end, stopped = broadcast(run.done() >= 1, stop.is_set())
        if RANK == 0:
            look(run, bar)
            bar.close()
            if not stopped:
                end_epoch(run, at_end, stop)
        if not stopped and progress.images_in_epoch >= len(run.train_numbers):
            progress.epoch += 1
            progress.images_in_epoch = 0
        stopped, = broadcast(stop.is_set())  # a last grid that Ctrl-C cut short is drawn at the next start
    save(run, last=True, finished=not stopped)
    return stopped


# -------------------------------------------------------------------------------------------------- data ----

Image.MAX_IMAGE_PIXELS = 32_000_000  # Pillow warns from there on, and refuses images of twice as many
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = tuple(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)
HELDOUT_ONE_IN = 20


def read_image(path, size):
    """First frame of an image file, upright, over white, centre-cropped: (size, size, 3) uint8."""
    with Image.open(path, formats=FORMATS) as image:
        image.draft(None, (2 * size, 2 * size))  # a JPEG is decoded smaller, at no less than twice the size
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits per channel, which Pillow would clip
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return np.asarray(image)


def decode(path, size):
    """What read_image() returns, or a text, the reason, for a file that it cannot read."""
    try:
        if os.path.isfile(path):
            return read_image(path, size)
    except UnidentifiedImageError:
        return "not an image that this program can read"
    except Exception as error:  # Pillow's decoders raise almost anything for damaged files
        return printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)
    return "not a file"


def list_files(args):
    """{key: name} of every file below args.dataroot, sorted by name, through links, without hidden ones and
    without those below the results or beside the checkpoint. The key is a hash of name, length and time of
    change. OSError where the disk fails."""
    root = args.dataroot
    files = {}
    visited = {os.path.realpath(args.results), os.path.realpath(args.checkpoint.parent)}
    visited.discard(os.path.realpath(root))
    for folder, folders, names in os.walk(root, onerror=raise_disk_error, followlinks=True):
        if os.path.realpath(folder) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(folder, name) for name in names if not name.startswith(".")):
            file = [os.path.relpath(path, root).replace(os.sep, "/")]
            try:
                status = os.stat(path)
                file += [status.st_size, status.st_mtime_ns]
            except OSError as error:  # a link to nowhere, or deleted since
                raise_disk_error(error)
            files[hashlib.sha256(repr(file).encode()).hexdigest().encode()] = file[0]
    return dict(sorted(files.items(), key=lambda file: file[1]))


def open_cache(path, record_type):
    """(memory-mapped records, {key: number of its record}) of the whole records, a numpy type, at `path`."""
    count = path.stat().st_size // record_type.itemsize if path.is_file() else 0
    records = np.memmap(path, record_type, "r", shape=(count,)) if count else np.zeros(0, record_type)
    return records, {key: number for number, key in enumerate(records["file"].tolist())}


def fill_cache(path, record_type, root, files):
    """Append the records of `files`, {key: name}, to the cache. Returns {key: reason} of those that cannot be
    read; every start tries them again. The next start resumes where this one is interrupted."""
    reasons = {}
    size = record_type["pixels"].shape[0]
    with (open(path, "r+b" if path.exists() else "xb") as out,
          progress_bar(f"reading images at {size} px", len(files)) as bar,
          warnings.catch_warnings(),  # restored when the threads have ended
          ThreadPoolExecutor(os.cpu_count()) as pool):
        warnings.simplefilter("ignore")  # Pillow's, about single files
        whole = out.seek(0, os.SEEK_END) // record_type.itemsize
        out.seek(whole * record_type.itemsize)  # over a record that was cut off
        for chunk in np.array_split([*files], math.ceil(len(files) / 256)):  # all at once would fill memory
            paths = [os.path.join(root, files[key]) for key in chunk.tolist()]
            for key, pixels in zip(chunk.tolist(), pool.map(decode, paths, [size] * len(paths))):
                if isinstance(pixels, str):
                    reasons[key] = pixels
                else:
                    out.write(key + pixels.tobytes())
                bar.update(1)
    return reasons


def load_images(args, files, device):
    """(names, Faces, {name: reason} of skipped images) of the images among `files`, {key: name}, below
    args.dataroot, decoded once and then kept in a cache of one file. It is in the data folder, or in the
    results where that cannot be written. UserError where there are fewer than two images."""
    root = args.dataroot
    shape = (args.image_size, args.image_size, 3)
    record_type = np.dtype([("file", "S64"), ("pixels", np.uint8, shape)])  # a record of the cache
    path = root / f".faces_{args.image_size}px.cache"
    try:
        reserved = lock(path)
    except OSError:  # the folder, or another user's lock in it, cannot be written
        path = args.results / path.name
        reserved = lock(path)
    if not reserved:
        say(f"another start is reading images into {path}: waiting")
    while not reserved:
        time.sleep(0.5)
        reserved = lock(path)
    with reserved:
        records, record_of = open_cache(path, record_type)
        if path.is_symlink() or len(records) > 2 * len(record_of.keys() & files.keys()):  # most files gone
            del records
            with contextlib.suppress(OSError):  # on Windows it stays while another run uses it
                path.unlink()
                record_of = {}
        new = {key: name for key, name in files.items() if key not in record_of}
        reasons = fill_cache(path, record_type, root, new) if new else {}
    records, record_of = open_cache(path, record_type)
    used = [key for key in files if key in record_of]
    skipped = {files[key]: reason for key, reason in reasons.items()
               if files[key].lower().endswith(SUFFIXES)}
    if len(used) < 2:
        raise UserError(f"{root} holds fewer than two usable images, and {len(skipped)} that cannot be used: "
                        "run download_images.py to fetch faces, or name a folder with --dataroot (--demo "
                        "needs none; images beside the checkpoint or in --results do not count)")
    faces = Faces(records["pixels"], [record_of[key] for key in used], device)
    return [files[key] for key in used], faces, skipped


def split(names):
    """Numbers of the training images, and of the training and the held-out images whose losses are compared,
    at most COMPARED_MOST each. The hash of an image's path below the data root decides whether it is held
    out, so that does not change as the folder grows. The images with the smallest hashes are compared, so
    most of them stay the same when a few images are added."""
    hashes = np.array([int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7], "little")
                       for name in names])
    order = hashes.argsort()
    heldout = (hashes % HELDOUT_ONE_IN == 0)
    if heldout.all() or not heldout.any():  # neither side is ever empty
        heldout[order[0]] = True
        heldout[order[-1]] = False
    sides = [order[~heldout[order]], order[heldout[order]]]
    compared = [side[:min(COMPARED_MOST, *map(len, sides))] for side in sides]
    return [torch.from_numpy(numbers) for numbers in (np.flatnonzero(~heldout), *compared)]


class Faces:
    """The images as batches on a device. `pixels` (M, S, S, 3) uint8 are those of the cache; image i is
    pixels[rows[i]]. They are copied to a GPU if they take less than a quarter of its free memory."""

    def __init__(self, pixels, rows, device):
        self.device = device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that the cache is read-only: nothing writes to it
            self.pixels = torch.from_numpy(pixels)
        self.rows = torch.tensor(rows)
        if (device.type == "cuda"
                and len(rows) * self.pixels[0].numel() < torch.cuda.mem_get_info(device)[0] / 4):
            self.pixels = torch.cat([self.pixels[chunk].to(device) for chunk in self.rows.split(1000)])
            self.rows = torch.arange(len(self.rows), device=device)

    def batch(self, numbers, flip=None):
        """Images x_0 (B, 3, S, S) in [-1, 1] of `numbers` (B,), mirrored where `flip` (B,) is True."""
        images = self.pixels[self.rows[numbers.to(self.rows.device)]]
        if self.device.type == "cuda" and images.device.type == "cpu":  # copied while the GPU still computes
            images = images.pin_memory()
        images = images.to(self.device, non_blocking=self.device.type == "cuda")
        if flip is not None:
            images = torch.where(flip[:, None, None, None], images.flip(2), images)
        x_0 = images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        return x_0.contiguous(memory_format=memory_format(self.device))


# ---------------------------------------------------------------------------------------------- pictures ----

COLUMNS = ("epoch", "step", "images_seen", "train_loss", "heldout_loss", "sample_distance", "lr",
           "images_per_second", "seconds")
DISTANCE = COLUMNS.index("sample_distance")
GRID = "epoch_{}_step_{}.png"
DISTANCE_SIDE = 16  # sample_distance divides each image into 16 x 16 cells
DISTANCE_MOST = 2000  # real images that it uses


def to_image(x):
    """A picture (3, H, W) in [-1, 1] as a Pillow image."""
    return Image.fromarray(((x.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy())


def save_grid(images, path, columns=8):
    """Images (N, 3, S, S) in [-1, 1] as one PNG, `columns` a row, padding 2."""
    with result(path) as file:
        save_image(images, file, "PNG", nrow=columns, normalize=True, value_range=(-1, 1))


def draw(model, count, noise=None, **settings):
    """Yield the images of sample(), computed at most 64 together, fewer where memory is too small."""
    at_once = images_at_once(64, model.image_size, next(model.parameters()).device)
    first = 0
    while first < count:
        at_once = min(at_once, count - first)
        start = None if noise is None else noise[first:first + at_once]
        try:
            images = sample(model, at_once, first=first, noise=start, **settings)
        except RuntimeError as error:
            at_once = halve_or_raise(at_once, error)
        else:
            yield from images
            first += at_once


def draw_pictures(run, stop):
    """Grid, denoising strip, loss curve and animation of this moment of the run, and the sample distance of
    its epoch; only the curve if `stop` is set before the images are finished."""
    history = run.progress.history
    folder = run.args.results
    settings = {"steps": run.args.sample_steps, "seed": run.args.seed, "precision": run.precision}
    images = torch.stack([*draw(run.ema, 64, on_step=lambda *_: stop.is_set(), **settings)])
    save_curve(history, folder / "loss.png")
    if stop.is_set():
        return
    save_grid(images, folder / GRID.format(*history[-1]))
    save_denoising(run.ema, folder / "denoising.png", **settings)
    if not run.real:
        run.real = RealFaces(run.faces, run.train_numbers)
    history[-1][DISTANCE] = run.real.sample_distance(images)
    paths = [folder / name for *_, name in grids(folder, history)]
    pictures = []
    for number in np.unique(np.linspace(0, len(paths) - 1, 60).round().astype(int)):
        with contextlib.suppress(OSError, IndexError):  # a grid is damaged, or there is none
            pictures.append(Image.open(paths[number]).convert("RGB"))
    if pictures:
        save_animation(pictures, folder / "progress.webp", last=2500)


def save_denoising(model, path, columns=10, **settings):
    """How the first four samples come out of noise: for each one a row of x_t and below it the estimates of
    x_0 at the same moments, between which the pictures change by equal amounts."""
    stages = []
    images = sample(model, 4, on_step=lambda x_t, x_0: stages.append((x_t.cpu(), x_0.cpu())), **settings)
    pictures = torch.stack([torch.stack(pair, dim=1) for pair in (*stages, (images, images))])
    change = F.pad(pictures.diff(dim=0).abs().flatten(1).mean(dim=1).cumsum(0), (1, 0))
    chosen = torch.searchsorted(change, torch.linspace(0, 1, columns) * change[-1]).clamp(max=len(stages))
    save_grid(pictures[chosen].permute(1, 2, 0, 3, 4, 5).flatten(0, 2), path, columns)


def grids(folder, history):
    """[epoch, step, file name] of every grid of this run that is in `folder`, oldest first."""
    drawn = [[*row[:2], GRID.format(*row)] for row in history if row[DISTANCE] is not None]
    return [grid for grid in drawn if os.path.exists(folder / grid[2])]


def save_animation(pictures, path, last=150, side=1100):
    """Pillow images as a WebP animation at most `side` px wide; 150 ms each, the last one `last` ms."""
    scale = max(1, round(540 / pictures[0].width))  # small pictures are enlarged to about 540 px
    frames = [ImageOps.scale(picture, scale, Image.Resampling.NEAREST) for picture in pictures]
    for frame in frames:
        frame.thumbnail((side, side))
    with result(path) as file:
        frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], loop=0, quality=75,
                       duration=[150] * (len(frames) - 1) + [last])


def draw_morph(model, path, seed, frames=8, **settings):
    """The first eight samples turning into one another in a loop: images drawn from noise between theirs, by
    spherical interpolation, `frames` from each sample to the next. Two noises of so many dimensions are
    orthogonal, so the angle between them is pi / 2."""
    device = next(model.parameters()).device
    starts = randn([generator("sample", seed, number, device=device) for number in range(8)],
                   model.image_size)
    angles = [math.pi / 2 * frame / frames for frame in range(frames)]
    noise = [math.cos(angle) * start + math.sin(angle) * end
             for start, end in zip(starts, starts.roll(-1, 0)) for angle in angles]
    images = draw(model, len(noise), torch.stack(noise), **settings)
    save_animation([to_image(image) for image in images], path)


class RealFaces:
    """What sample_distance compares with: `seen`, at most DISTANCE_MOST of the real images `numbers` of
    `faces` as reduce() gives them, and `usual` (2,), the mean distance of 64 of them from the others."""

    def __init__(self, faces, numbers):
        chosen = numbers[np.linspace(0, len(numbers) - 1, min(len(numbers), DISTANCE_MOST)).astype(int)]
        self.seen = torch.cat([self.reduce(faces.batch(chunk)) for chunk in chosen.split(256)], dim=1)
        count = max(1, min(64, len(chosen) // 2))
        orders = [torch.randperm(len(chosen), generator=generator("usual", repeat)) for repeat in range(8)]
        usual = [frechet_distance(self.seen[:, order[:count]], self.seen[:, order[count % len(order):]])
                 for order in orders]
        self.usual = torch.stack(usual).mean(0).clamp(min=1e-9)

    @staticmethod
    def reduce(images, side=DISTANCE_SIDE):
        """Images (N, 3, S, S) in [-1, 1] as side x side cells, (2, N, 3, side, side) float64: their mean
        colour, and their fine detail, the mean absolute difference to the image at half the resolution."""
        images = images.cpu()
        coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
        cells = [F.interpolate(part, (side, side), mode="area") for part in (images, (images - coarse).abs())]
        return torch.stack(cells).double()

    def sample_distance(self, images):
        """The Fréchet distance of images (N, 3, S, S) in [-1, 1], 64 at a time, to the real ones, divided by
        its usual value for 64 real images against the others: 1 means as far as real faces are. Heusel et al.
        2017 (arXiv:1706.08500) compute it from a network's features; this is the mean of two distances, which
        need no network: of colours and of fine detail in 16 x 16 cells. It sees pose, colours, outlines,
        grain, blur and how much faces vary, but not whether details are right, nor copies of real images."""
        sets = [chunk for chunk in images.split(64) if len(chunk) == 64 or len(images) < 64]
        distance = torch.stack([frechet_distance(self.reduce(chunk), self.seen) for chunk in sets]).mean(0)
        return (distance / self.usual).mean().item()


def frechet_distance(seen, real):
    """|m - m_r|^2 + tr(C + C_r - 2 (C C_r)^(1/2)), (2,), of `seen` (2, N, 3, side, side) and `real` with its
    mirror images, where m and C are mean and covariance (Dowson & Landau 1982). The eigenvalues of C C_r are
    taken from an N x N matrix, which has the same ones except zeros."""
    real = torch.cat((real, real.flip(4)), dim=1).flatten(2)
    seen = seen.flatten(2)
    covariance = torch.stack([cells.T.cov(correction=0) for cells in real])
    centred = (seen - seen.mean(1, keepdim=True)) / math.sqrt(seen.shape[1])
    root = torch.linalg.eigvalsh(centred @ covariance @ centred.mT).clamp(min=0).sqrt().sum(1)
    variance = seen.var(1, correction=0) + real.var(1, correction=0)
    return ((seen.mean(1) - real.mean(1)).square() + variance).sum(1) - 2 * root


def distances(images, faces):
    """Euclidean distances (N, M) between images (N, 3, S, S) in [-1, 1], as they are or mirrored, whichever
    is closer, and the M images of `faces`."""
    both = torch.cat((images, images.flip(3))).flatten(1)
    others = (faces.batch(chunk).flatten(1) for chunk in torch.arange(len(faces.rows)).split(100))
    return torch.cat([torch.cdist(both, chunk).unflatten(0, (2, -1)).amin(0) for chunk in others], dim=1)


def save_nearest(images, faces, path):
    """Each of `images` (N, 3, S, S) beside the closest of `faces`, with a number: their distance, divided by
    the median distance between a real image and its closest different one. Returns the numbers (N,), NaN
    where all are equal."""
    some = torch.from_numpy(np.linspace(0, len(faces.rows) - 1, min(len(faces.rows), 200)).astype(int))
    apart = distances(faces.batch(some), faces)
    apart[apart < 0.004 * math.sqrt(images[0].numel())] = math.inf  # itself and its copies: half a grey level
    usual = apart.amin(1).median()
    least, closest = distances(images, faces).min(dim=1)
    ratios = least / usual if usual.isfinite() else torch.full_like(least, math.nan)
    pairs = torch.stack((images, faces.batch(closest)), dim=1)
    lines = math.ceil(len(images) / 4)
    figure = Figure(figsize=(8, 1.2 * lines), layout="constrained")
    places = figure.subplots(lines, 4, squeeze=False,
                             subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
    for axes, pair, ratio in zip(places.flat, pairs, ratios):
        axes.imshow(to_image(make_grid(pair, padding=1, pad_value=1)))
        axes.set_title(f"{ratio:.2f}", y=-0.25, fontsize=9)
    with result(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return ratios


def save_curve(history, path):
    """The losses: one point for each epoch, against images seen."""
    table = dict(zip(COLUMNS, zip(*history)))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("train_loss", "training images"), ("heldout_loss", "held-out images")):
        axes.plot(table["images_seen"], table[name], label=label, marker="." if len(history) < 30 else None)
    losses = table["train_loss"] + table["heldout_loss"]
    median = sorted(losses)[len(losses) // 2]
    highest = max(1.3 * median, 1.05 * table["heldout_loss"][-1])  # cuts off the first fall
    axes.set(xlabel="images seen", ylabel="L1 error of the predicted noise", xlim=(0, None),
             ylim=(0.9 * min(losses), highest))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    with result(path) as file:
        figure.savefig(file, format="png", dpi=120)


def write_page(folder, run=None, status=None):
    """run.js, the data of index.html: a function call, since a page that is opened from disk can load scripts
    only. Without `run` only the list of pictures and its time, `listed`, are renewed."""
    path = folder / "run.js"
    if run:
        rows = run.progress.history
        every = math.ceil(len(rows) / 1000)
        thinned = [row for number, row in enumerate(rows, 1)
                   if row[DISTANCE] is not None or (len(rows) - number) % every == 0]
        data = {"state": status, "progress": run.done(), "seconds": run.seconds(), "columns": COLUMNS,
                "seconds_left": run.seconds_left(), "images_per_second": run.speed, "settings": run.about,
                "history": thinned, "grids": grids(folder, rows), "updated": time.time(),
                "grid": {"side": run.args.image_size, "padding": 2, "per_row": 8, "count": 64}}
    else:
        try:
            data = json.loads(path.read_text(encoding="utf-8").removeprefix("show(").removesuffix(");\n"))
        except (OSError, ValueError):  # there is no run to show, or the file is damaged
            return
    names = ("denoising.png", "nearest.png", "samples.png", "loss.png", "progress.webp", "morph.webp",
             "metrics.csv")
    data |= {"pictures": [name for name in names if os.path.exists(folder / name)], "listed": time.time()}
    with result(path) as file:
        file.write(f"show({json.dumps(data)});\n".encode())


# -------------------------------------------------------------------------------------------- checkpoint ----

VERSION = 4  # of the checkpoint's format and network
NETWORK = ("image_size", "channels", "timesteps")  # cannot change when a run is resumed
LIMITS = ("epochs", "minutes", "max_steps")  # of a run; giving one drops all saved ones
STORED = (*NETWORK, *LIMITS, "batch_size", "lr", "seed", "precision")  # in the checkpoint; paths are not
MOST_VALUES = 50_000_000  # bytes, at most, of a checkpoint without its weights: 500,000 rows of metrics
RETRY_SECONDS = 30  # until the next try, if a checkpoint during the training could not be saved
LAST_TRIES = (0, 5, 10)  # seconds before each try to save the last one


def previous_path(path):
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_checkpoint(path, state):
    """Write `state`, a nested dict of CPU tensors, whole or not at all, and keep the checkpoint before.
    OSError or RuntimeError where that fails, UserError where a weight is not finite: the file at `path` then
    stays."""
    weights = (*state["model"].values(), *state["ema"].values())
    if not all(weight.isfinite().all() for weight in weights):
        saved = f"resume {path}, which is good," if path.exists() else "run the command again"
        raise UserError(f"the weights are not finite any more: {saved} with a lower --lr")
    with replacing(path) as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        if path.exists():  # at every moment there is a whole one under one of the two names
            os.replace(path, previous_path(path))


def save(run, last=False, finished=False):
    """Save the checkpoint of `run`, in rank 0. A failure is a warning, and the next try follows soon; for the
    `last` checkpoint it is a UserError after three tries."""
    path = run.args.checkpoint
    if PROCESSES > 1:
        keep_weights_equal(run)
    if RANK > 0:
        return
    for seconds in LAST_TRIES if last else (0,):
        time.sleep(seconds)
        begun = time.monotonic()
        try:
            save_checkpoint(path, run.state(finished))
            run.progress.seconds_of_saving = time.monotonic() - begun
            run.save_due = begun + 60 * run.args.save_minutes
            return
        except (OSError, RuntimeError) as error:
            before = "the one before stays" if existing(path) else "there is none yet"
            problem = f"{path} could not be saved ({first_line(error)}), {before}"
            say(f"warning: {problem}. Is the disk full?")
            run.save_due = begun + min(60 * run.args.save_minutes, RETRY_SECONDS)
    if last:
        raise UserError(f"{problem}: make room on the disk, then the same command resumes the run")


def check_values(saved):
    """ValueError where the dict `saved` lacks something, or has a value that no command line gives."""
    expected = {**{name: dict for name in ("model", "ema", "optimizer", "scaler", "config")},
                "finished": bool, **{name: type(value) for name, value in NEW_RUN.items()}}
    for name, kind in expected.items():
        if not isinstance(saved.get(name), kind):
            raise ValueError(f"{name} is missing or not as it should be")
    if not all(isinstance(row, list) and len(row) == len(COLUMNS) for row in saved["history"]):
        raise ValueError("its history has other columns")
    config = saved["config"]
    given = [name for name in STORED if name != "channels" and config[name] is not None]
    command = [*(f"{flag_of(name)}={config[name]}" for name in given),
               "--channels", *(f"{width:d}" for width in config["channels"])]
    parsed = build_parser(exit_on_error=False).parse_args(command)
    if any(vars(parsed)[name] != config[name] for name in STORED):
        raise ValueError("a setting has another type than on the command line")
    with torch.device("meta"):  # needs no memory
        weights = SimpleUnet(parsed.channels, parsed.image_size, parsed.timesteps).state_dict()
    for name in ("model", "ema"):
        if ({key: value.shape for key, value in saved[name].items()}
                != {key: weights[key].shape for key in weights}):
            raise ValueError("its weights do not fit its settings")


def read_checkpoint(path, rename=False):
    """The dict at `path`, or the one before where that is missing or damaged, with its path as "file"; None
    where there is none yet. With `rename` one that cannot be used gets another name and is kept.
    UserError where there are files, but none that can be used; OSError where the disk fails. Only tensors and
    plain values are loaded: nothing is executed."""
    problem = ""
    for candidate in filter(pathlib.Path.exists, (path, previous_path(path))):
        try:
            with zipfile.ZipFile(candidate) as file:
                if (any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist())
                        or file.testzip()):
                    raise ValueError("it is damaged")  # or a decompression bomb
                if sum(entry.file_size for entry in file.infolist()
                       if entry.filename.endswith(".pkl")) > MOST_VALUES:
                    raise ValueError("it holds more than this program writes")
            saved = torch.load(candidate, map_location="cpu", weights_only=True)
            if saved.get("version") != VERSION:
                raise ValueError("it is not from this version of the program")
            check_values(saved)
        except Exception as error:  # a damaged or foreign file can make the readers raise anything
            raise_disk_error(error)
            problem = problem or (f"{candidate} is not a checkpoint that this program can resume "
                                  f"({first_line(error)})")
            continue
        if problem:
            broken = path.with_name(f"{path.name}.broken-{time.time():.0f}")
            renamed = f"it is renamed to {broken.name}, and " if rename else ""
            say(f"{problem}: {renamed}{candidate.name} is used")
            if rename:
                with contextlib.suppress(OSError):  # in a folder that cannot be written it stays
                    os.replace(path, broken)
        return saved | {"file": candidate}
    if problem:
        raise UserError(f"{problem}: to start over, move away {existing(path)}")
    return None


def existing(path):
    """Names of the checkpoint files at `path` that are there, and that a start would resume."""
    return " and ".join(str(file) for file in (path, previous_path(path)) if file.exists())


def build_network(config, device="cpu"):
    """A new SimpleUnet of the settings `config`."""
    model = SimpleUnet(**{name: config[name] for name in NETWORK})
    return model.to(device, memory_format=memory_format(torch.device(device)))


def averaged_network(saved, path, device):
    """The averaged (EMA) SimpleUnet of the checkpoint `saved`, which read_checkpoint(path) returned, ready to
    evaluate; UserError if it is None."""
    if not saved:
        raise UserError(f"there is no checkpoint {path}: train first")
    model = build_network(saved["config"], device)
    model.load_state_dict(saved["ema"])
    return model.eval().requires_grad_(False)


def load_model(path, device="cpu"):
    """The averaged (EMA) SimpleUnet of the checkpoint at `path`, to evaluate; UserError if there is none."""
    return averaged_network(read_checkpoint(pathlib.Path(path)), path, device)


# ---------------------------------------------------------------------------------------------- plumbing ----

OUT_OF_MEMORY = ("out of memory", "alloc_failed", "not enough memory", "can't allocate memory",
                 "find an engine")


def out_of_memory(error):
    return any(text in str(error).lower() for text in OUT_OF_MEMORY)


def halve_or_raise(size, error):
    """Half of `size`, images at a time, after the exception `error`; raises it if it does not mean lack of
    memory, and UserError where one image is too many already or torch.compile fails."""
    if not out_of_memory(error):
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise UserError(f"torch.compile fails here ({first_line(error)}): leave out --compile") from None
        raise error
    if size == 1:
        raise UserError("there is not enough memory for one image: give a smaller --image-size or narrower "
                        f"--channels ({first_line(error)})") from None
    return math.ceil(size / 2)


OTHER_PYTORCH = "install another PyTorch as README.md says"


def choose_device(name):
    """The torch.device for --device; for a CUDA GPU, PyTorch's settings are made too. UserError if there is
    no such device, if the GPU cannot compute, or if there are fewer GPUs than processes."""
    present = {"cuda": torch.cuda.is_available(), "cpu": True,
               "mps": torch.backends.mps.is_available() and PROCESSES == 1}  # its tensors cannot be exchanged
    name = name or next(choice for choice in ("cuda", "mps", "cpu") if present[choice])
    if not present[name]:
        raise UserError(f"PyTorch finds no {name} device here for {PROCESSES} process"
                        f"{'es' * (PROCESSES > 1)}: leave out --device to use another")
    if name != "cuda":
        return torch.device(name)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError("there are more processes than CUDA GPUs: start torchrun with "
                        f"--nproc_per_node={torch.cuda.device_count()}")
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        torch.cuda.set_device(local_rank)
        F.conv2d(torch.ones(1, 3, 8, 8, device="cuda"), torch.ones(1, 3, 3, 3, device="cuda"))
    except RuntimeError as error:  # for example, PyTorch has no code for a GPU that is old or very new
        if out_of_memory(error) and "engine" not in str(error):  # which is missing in a cuDNN that is too old
            raise
        raise UserError(f"PyTorch {torch.__version__} cannot use the NVIDIA GPU ({first_line(error)}): "
                        f"{OTHER_PYTORCH}, or give --device cpu") from None
    if sys.platform == "win32":  # else its driver goes on in the computer's slow memory, without an error
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(free / total)
    return torch.device("cuda", local_rank)


def choose_precision(name, device):
    """The number format for --precision: of those that train well, the one in which the device is fastest.
    Tensor cores compute in bf16 from compute capability 8.0 on, in fp16 from 7.0 on; of those with 7.5 only
    RTX and T4 GPUs have them, and others, such as the GTX 16 ones, are known for NaN in fp16 (pytorch issue
    58123)."""
    if name == "fp16" and device.type == "mps":
        raise UserError("PyTorch cannot scale losses for fp16 on an Apple GPU: give --precision fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability == (7, 5) and not re.search(r"RTX|\bT4G?\b", torch.cuda.get_device_name(device)):
            return "fp32"
        return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and fast else "fp32"


def join_processes():
    """Form one group of the processes that torchrun has started."""
    store, *_ = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")  # else restarts find addresses of dead processes
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", rank=RANK,
                            world_size=PROCESSES, store=dist.PrefixStore(f"attempt {attempt}", store),
                            timeout=datetime.timedelta(days=1))  # while rank 0 reads and draws


def broadcast(*numbers):
    """`numbers` as rank 0 has them, so that all processes decide alike."""
    values = torch.tensor(numbers, dtype=torch.float64)
    if PROCESSES > 1:
        dist.broadcast(values, 0)
    return tuple(values.tolist())


def from_rank_0(value):
    """`value`, any object, as rank 0 has it."""
    values = [value]
    if PROCESSES > 1:
        dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
    return values[0]


@contextlib.contextmanager
def rank_0_first():
    """Of several processes, rank 0 runs the block alone, then all others run it."""
    if RANK > 0:
        broadcast(0)
    yield
    if RANK == 0:
        broadcast(0)


def printable(text):
    """`text` in one line of at most 1,000 characters, with escapes in place of control characters."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))[:1000]


def raise_disk_error(error):
    """Raise `error` if the disk fails or is away, which says nothing about the folder or the file on it."""
    if getattr(error, "errno", None) in (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT):
        raise error


def flag_of(name):
    return f"--{name.replace('_', '-')}"


def first_line(error):
    return printable((str(error) or type(error).__name__).partition("\n")[0])


def say(line):
    """Print a line, above the progress bar if there is one; only in the process of rank 0."""
    if RANK == 0:
        try:
            tqdm.write(printable(line))
        except OSError:  # the reader of the output, such as tee, has ended: the run goes on
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


LOG_SECONDS = 30  # between the lines of a log file


class Lines:
    """A file for tqdm where there is no terminal: it prints each state of the bar as a line of its own."""

    def write(self, text):
        if text.strip():
            say(text.strip())


def progress_bar(title, total, done=0, iterable=None):
    """A tqdm of `total` images: a bar on a terminal, else a line every LOG_SECONDS; only in rank 0."""
    lines = {"file": Lines(), "delay": LOG_SECONDS, "mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS,
             "bar_format": "{desc}: {n:,} of {total:,} images{postfix}"}
    return tqdm(iterable, desc=title, total=total, initial=done, unit="img", leave=False, disable=RANK > 0,
                **{} if sys.stderr.isatty() else lines)


def try_writing(folder):
    """Make and remove a file in `folder`; OSError if that fails. On Windows, tempfile of Python 3.10 to 3.12
    would try again forever instead (CPython issue 66305)."""
    path = pathlib.Path(folder, f".{os.getpid()}.tmp")
    path.touch()
    path.unlink(missing_ok=True)


def lock(path):
    """An open file whose lock reserves `path` until it is closed or the process ends; None if it is taken.
    OSError where its folder cannot be written."""
    file = path.with_name(f".{path.name}.lock").open("a")
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # taken; or, on Linux and macOS, a network drive without locks
        if sys.platform == "win32" or isinstance(error, BlockingIOError):
            return None
    return file


@contextlib.contextmanager
def replacing(path):
    """Yield a file to write; it appears under `path` whole, or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "w+b") as file:
            yield file
        for _ in range(10):  # on Windows a virus scanner or another program may have the old file open
            with contextlib.suppress(PermissionError):
                os.replace(unfinished, path)
                return
            time.sleep(0.1)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def result(path):
    """Like replacing(), for a picture or table in the results: a failure to write it is only a warning."""
    content = io.BytesIO()
    yield content
    try:
        with replacing(path) as file:
            file.write(content.getvalue())
    except OSError as error:
        say(f"warning: {path} could not be written ({error})")


# -------------------------------------------------------------------------------------------------- main ----

def read_settings(argv, saved=None):
    """The settings of the command line `argv`, completed by those of the checkpoint `saved`, then by the
    defaults. UserError where the command line contradicts the network of the checkpoint."""
    parser = build_parser()
    given = parser.parse_args(argv)
    if given.demo and (given.dataroot or given.checkpoint):
        parser.error("--demo draws its own faces, keeps all in results/demo: leave out --dataroot and "
                     "--checkpoint")
    stored = {name: saved["config"][name] for name in STORED} if saved else {}
    limits = dict.fromkeys(LIMITS) if any(vars(given)[name] for name in LIMITS) else {}
    defaults = (DEMO_DEFAULTS if given.demo else {"epochs": 100}) | stored | limits
    args = parser.parse_args(argv, argparse.Namespace(**defaults))
    args.results = pathlib.Path(args.results or HERE / "results", "demo" if args.demo else "")
    default_root = args.results / f"faces_{args.image_size}px" if args.demo else HERE / "fake_face"
    args.dataroot = pathlib.Path(args.dataroot or default_root)
    args.checkpoint = pathlib.Path(args.checkpoint
                                   or (args.results if args.demo else HERE) / "model_checkpoint.pth")
    args.start_over = f"start over with {'--results NEW_FOLDER' if args.demo else '--checkpoint NEW.pth'}"
    if os.path.realpath(args.results) == os.path.realpath(args.dataroot):
        raise UserError(f"--results {args.results} is the folder of the images: pictures would become "
                        "training images; name another folder")
    for name in NETWORK if saved else ():
        if vars(args)[name] != saved["config"][name]:
            raise UserError(f"{saved['file']} holds another network ({flag_of(name)} {saved['config'][name]} "
                            f"there, {vars(args)[name]} here): leave out {flag_of(name)} to resume it, "
                            f"{args.start_over}, or move away {existing(args.checkpoint)}")
    return args


def announce(run, saved):
    """Say what is about to happen; list skipped images, copy index.html, remove unfinished files."""
    args = run.args
    listing = args.results / "skipped_images.txt"
    ends = " or ".join(f"{vars(args)[name]:,.10g} {name.removeprefix('max_')}"
                       for name in LIMITS if vars(args)[name])
    gpu = f" ({torch.cuda.get_device_name()})" if run.device.type == "cuda" else ""
    unused_gpu = shutil.which("nvidia-smi") and not torch.cuda.is_available()
    advice = f"; this PyTorch cannot use the NVIDIA GPU: {OTHER_PYTORCH}" if unused_gpu else ""
    about = {
        "images": f"{len(run.faces.rows):,} below {args.dataroot}, "
                  f"{len(run.faces.rows) - len(run.train_numbers):,} of them held out",
        "skipped": run.skipped and f"{len(run.skipped):,} files, such as "
                                   f"{': '.join(min(run.skipped.items()))}; all are in {listing}",
        "network": f"channels {args.channels}, {sum(map(torch.numel, run.weights)) / 1e6:.1f} M parameters",
        "device": f"{run.device.type}{gpu}, {run.precision}, "
                  f"{PROCESSES} process{'es' * (PROCESSES > 1)}{advice}",
        "training": f"until {ends}, {args.batch_size} images a step, learning rate {args.lr:g}",
        "checkpoint": f"{args.checkpoint}, saved every {args.save_minutes:g} minutes and at the end",
        "pictures": str(args.results / "index.html"),
        "resumed": saved and f"{saved['file']}, epoch {saved['epoch'] + 1}, after step {saved['step']:,}",
    }
    run.about = [(label, text) for label, text in about.items() if text]
    for label, text in run.about:
        say(f"{label:12}{text}")
    if RANK == 0:
        lines = (f"{printable(name)}: {reason}\n" for name, reason in sorted(run.skipped.items()))
        listing.write_text("".join(lines), encoding="utf-8")
        with contextlib.suppress(OSError):  # it is there already, or was not fetched with the scripts
            shutil.copy(HERE / "results" / "index.html", args.results)
        for left_over in args.checkpoint.parent.glob(f".{args.checkpoint.name}.*.tmp"):
            left_over.unlink()  # of a run that was killed while it saved


def draw_samples(args, saved, device):
    """--sample: images in results/samples, the first 64 as a grid, the first 16 beside their closest real
    image, and the first eight turning into one another."""
    model = averaged_network(saved, args.checkpoint, device)
    folder = args.results / "samples"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("sample_*.png"):
        old.unlink()
    settings = {"steps": args.sample_steps, "seed": args.seed + 1,  # not the faces of the grids
                "precision": choose_precision(args.precision, device)}
    pictures = []
    images = progress_bar("drawing", args.sample, iterable=draw(model, args.sample, **settings))
    for number, image in enumerate(images, 1):
        to_image(image).save(folder / f"sample_{number:05d}.png")
        if number <= 1024:  # enough for the sample distance
            pictures.append(image)
    grid = args.results / "samples.png"
    save_grid(pictures[:64], grid)
    draw_morph(model, args.results / "morph.webp", **settings)
    say(f"{args.sample} images are in {folder}, the first {min(64, args.sample)} in {grid}")
    nearest = args.results / "nearest.png"
    nearest.unlink(missing_ok=True)
    try:
        names, faces, _ = load_images(args, list_files(args), torch.device("cpu"))
        ratio = save_nearest(torch.stack(pictures[:16]), faces, nearest).median()
        say(f"{nearest}: median distance to the closest real image {ratio:.2f}, where 1 is usual between a "
            "real image and its closest other one; far below 1, the network copies images"
            if ratio.isfinite() else f"{nearest}: the real images are all equal")
        if args.sample >= 64:  # fewer images are farther away, however good they are
            real = RealFaces(faces, split(names)[0])
            say(f"sample distance {real.sample_distance(torch.stack(pictures)):.2f}, where real faces have 1")
    except (UserError, OSError) as error:
        say(f"no nearest.png: {error}")
    write_page(args.results)


def run_command(argv):
    """Read settings and checkpoint, then train or draw. Returns the exit status."""
    args = read_settings(argv)
    with rank_0_first():
        args.results.mkdir(parents=True, exist_ok=True)
        try_writing(args.results)  # OSError now, not after hours
        if not args.sample:
            args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            reserved = RANK > 0 or lock(args.checkpoint)  # while this function runs
            if not reserved:
                raise UserError(f"another run is training {args.checkpoint} at this moment: let it finish, "
                                "or stop it")
        saved = read_checkpoint(args.checkpoint, rename=not args.sample)
    args = read_settings(argv, saved)
    device = choose_device(args.device)
    args.channels = args.channels or default_channels(device, args.image_size)
    args.batch_size = args.batch_size or default_batch_size(device, args.image_size)
    if args.image_size % 2 ** (len(args.channels) - 1):
        raise UserError(f"--image-size {args.image_size} cannot be halved {len(args.channels) - 1} times, as "
                        "--channels requires: give fewer channels or another size")
    if args.sample:
        if RANK == 0:
            draw_samples(args, saved, device)
        broadcast(0)  # the others wait
        return 0
    if args.demo:
        from fake_face.draw_faces import fill_folder
        with rank_0_first():
            fill_folder(args.dataroot, DEMO_IMAGES, args.image_size)
    run = Run(args, device)
    if saved:
        run.restore(saved)
    run.open_images()
    same_limits = saved and all(vars(args)[name] == saved["config"][name] for name in LIMITS)
    if saved and saved["finished"] and (same_limits or broadcast(run.done())[0] >= 1):
        say(f"{saved['file']} is finished: {saved['epoch']} epochs, {saved['step']} steps. A larger "
            f"--epochs, --minutes or --max-steps resumes it, --sample 64 draws faces; or {args.start_over}.")
        return 0
    announce(run, saved)
    stopped = train(run, stop_on_signal())
    if RANK == 0:
        write_page(args.results, run, "stopped" if stopped else "finished")
    say(f"Stopped after {run.progress.step} steps, checkpoint saved: the same command resumes the run."
        if stopped else f"Done in {run.seconds() / 60:.1f} minutes. Open {args.results / 'index.html'}; "
        "--sample 64 draws more faces.")
    return 130 if stopped else 0


def handle_signals(handler):
    """Call handler(number, frame) for Ctrl-C, Ctrl-Break, SIGTERM and a closed terminal. Windows ends the
    program at once when its window is closed."""
    for name in ("SIGINT", "SIGBREAK", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # not every system has all of them
        ignored = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN  # by nohup
        if number and not ignored:  # SIGINT too: shells start background jobs with it ignored
            signal.signal(number, handler)


def stop_on_signal():
    """A threading.Event that the first signal sets. A Ctrl-C more than a second later ends the program at
    once. An earlier one does not, since notebooks send each Ctrl-C twice."""
    stop = threading.Event()
    times = []  # of the signals

    def on_signal(number, _):
        times.append(time.monotonic())
        if number == signal.SIGINT and times[-1] > times[0] + 1:
            os._exit(130)
        stop.set()
        if number == signal.SIGINT and len(times) == 1 and RANK == 0:
            with contextlib.suppress(OSError):  # not print(): the signal may have interrupted one
                os.write(2, b"\nStopping: a checkpoint is saved first. Ctrl-C again stops without saving.\n")

    handle_signals(on_signal)
    return stop


def main(argv=None):
    """Run the script on the command line `argv`. Returns the exit status."""
    with contextlib.suppress(AttributeError):  # in IDLE and notebooks, streams have no settings
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    handle_signals(signal.default_int_handler)
    status = 1
    message = ""
    try:
        if PROCESSES > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun sends it while this process waits
            join_processes()
        status = run_command(argv)
    except UserError as error:
        message = str(error)  # not the exception, which would keep the lock open
    except KeyboardInterrupt:
        status = 130
        message = "stopped"
    except OSError as error:
        message = (f"{error}: the disk may be full or disconnected; otherwise name folders that can be "
                   "written with --results and --checkpoint. The same command then resumes the run")
    except RuntimeError as error:
        if out_of_memory(error):
            message = (f"there is not enough memory ({first_line(error)}): end other programs that use it, "
                       "or give --device cpu, a smaller --image-size or narrower --channels")
        elif PROCESSES == 1:
            raise
        else:
            message = (f"process {RANK} cannot go on, most likely since another one ended ({error}): the "
                       "same command resumes the checkpoint, automatically with torchrun --max-restarts=3")
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if message:
        print(f"scriptc.py: {printable(message)}", file=sys.stderr)
    if PROCESSES > 1:  # at once: leaving the group can wait for ever, for processes that have failed,
        os._exit(status)  # or, in PyTorch 2.6, for a thread that waits for this one
    return status


if __name__ == "__main__":
    if sys.platform == "win32":  # ES_CONTINUOUS | ES_SYSTEM_REQUIRED: no sleep while nobody uses the computer
        ctypes.windll.kernel32.SetThreadExecutionState(0x80000001)
    sys.exit(main())
