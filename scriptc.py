"""Teach a network to draw faces of people who do not exist, by denoising diffusion.

    python scriptc.py                         train on every image below fake_face/, or resume the run begun there
    python scriptc.py --demo                  the same within a few minutes, on faces that the program draws itself
    python scriptc.py --sample 64             no training: draw 64 new faces with the trained network
    torchrun --nproc_per_node=2 scriptc.py    any of these with two processes, for instance one for each of two cards

Order of the file: settings, method (schedule, network, sampling), training, data, pictures, checkpoint, plumbing, main.
Read settings and method first; they are the whole algorithm. `training_step` and `train` show how it is trained.

The method is Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), with its symbols: x_0 is
an image in [-1, 1], x_t the same image with the noise of timestep t, alphas_cumprod[t] the paper's alpha-bar_t.
Sampling adds Song et al. 2021 (arXiv:2010.02502) and Lu et al. 2022 (arXiv:2211.01095).
"""

import time

START = time.time()  # before the slow imports, since --minutes includes them

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import pathlib
import secrets
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torch.utils._pytree import tree_map_only
from torchvision.utils import make_grid
from tqdm import tqdm

HERE = pathlib.Path(__file__).resolve().parent
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun


class UserError(Exception):
    """An error that only the user can correct. Its text is one sentence that says how."""


# ------------------------------------------------------------------------------------------------------- settings ----

NETWORK = ("image_size", "channels", "timesteps")  # fixed for the life of a checkpoint
LIMITS = ("epochs", "minutes", "max_steps")  # where a run ends; giving one replaces all three of the checkpoint
STORED = (*NETWORK, *LIMITS, "batch_size", "lr", "seed", "precision")  # in the checkpoint; paths are not
DEMO_IMAGES, DEMO_SIZE, DEMO_MINUTES = 2000, 32, 5


def between(kind, least, most, step=None):
    """An argparse type: an int or a float (`kind`) from `least` to `most`, a multiple of `step` if that is given."""

    def number(text):
        value = kind(text)  # argparse says what ValueError means
        if not least <= value <= most or step and value % step:
            multiple = f", a multiple of {step}" if step else ""
            raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:,.10g}{multiple}")
        return value

    return number


def build_parser():
    """Every setting, its default and its unit."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description="Train a denoising diffusion network on faces, and draw new ones.",
        epilog="Training settings that are not given come from the checkpoint if there is one, else from the defaults.")
    count, minutes = between(int, 1, 10**9), between(float, 1e-3, 1e6)
    add = parser.add_argument_group("data").add_argument
    add("--dataroot", metavar="DIR", help="train on all images below it (default: fake_face beside the script)")
    add("--results", metavar="DIR", help="for pictures and metrics (default: results beside the script)")
    add("--checkpoint", metavar="FILE", help="made, later resumed (default: model_checkpoint.pth beside the script)")
    add("--demo", action="store_true", help=f"needs no images: draws {DEMO_IMAGES} itself; all is in results/demo")
    add = parser.add_argument_group("network").add_argument
    add("--image-size", metavar="PX", type=between(int, 16, 256, 16), default=64,
        help=f"side of the images in pixels, a multiple of 16 (default: 64, with --demo {DEMO_SIZE})")
    add("--channels", metavar="C", type=between(int, 8, 4096, 8), nargs="+",
        help="width at each resolution, from the full one down (default: by device and image size)")
    add("--timesteps", metavar="T", type=between(int, 10, 10_000), default=1000, help="diffusion steps (default: 1000)")
    add = parser.add_argument_group("training").add_argument
    add("--batch-size", metavar="N", type=count, default=64, help="images per step, all processes (default: 64)")
    add("--epochs", metavar="N", type=count, help="passes over the images (default: 100 if no other limit is given)")
    add("--minutes", metavar="M", type=minutes,
        help=f"time for the run, start-up included (default: no limit, with --demo {DEMO_MINUTES})")
    add("--max-steps", metavar="N", type=count, help="optimizer steps in all (default: no limit)")
    add("--lr", metavar="X", type=between(float, 1e-9, 1), default=8e-3, help="highest learning rate (default: 0.008)")
    add("--seed", metavar="S", type=between(int, 0, 10**9), default=0, help="of all random numbers (default: 0)")
    add("--save-minutes", metavar="M", type=minutes, default=10, help="between two checkpoints (default: 10)")
    add = parser.add_argument_group("drawing").add_argument
    add("--sample", metavar="N", type=count, help="no training: draw N images into results/samples")
    add("--sample-steps", metavar="K", type=count, default=20, help="network evaluations per image (default: 20)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("cuda", "mps", "cpu"), help="default: the first of these that is present")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default: auto, by hardware")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile (default: no)")
    return parser


def read_settings(argv, config=None):
    """The settings of the command line `argv`, completed by `config`, a checkpoint's settings, then by the defaults.
    Touches no disk and no device. UserError where the command line contradicts the network of the checkpoint."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.demo and (args.dataroot or args.checkpoint):
        parser.error("--demo draws its own faces, keeps all in results/demo: leave out --dataroot and --checkpoint")
    defaults = {"image_size": DEMO_SIZE, "minutes": DEMO_MINUTES} if args.demo else {"epochs": 100}
    defaults |= {name: config[name] for name in STORED} if config else {}
    if any(vars(args)[name] for name in LIMITS):
        defaults |= dict.fromkeys(LIMITS)
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.results = pathlib.Path(args.results or HERE / "results", "demo" if args.demo else "")
    args.dataroot = args.results / "faces" if args.demo else pathlib.Path(args.dataroot or HERE / "fake_face")
    args.checkpoint = pathlib.Path(args.checkpoint or (args.results if args.demo else HERE) / "model_checkpoint.pth")
    args.begin_anew = "--results NEW_FOLDER" if args.demo else "--checkpoint NEW.pth"
    for name in NETWORK if config else ():
        if vars(args)[name] != config[name]:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{args.checkpoint} holds another network ({flag} {config[name]} there, {vars(args)[name]} "
                            f"here): leave out {flag} to resume it, or begin a new run with {args.begin_anew}")
    if args.channels and args.image_size % 2 ** (len(args.channels) - 1):
        raise UserError(f"--image-size {args.image_size} cannot be halved {len(args.channels) - 1} times, as "
                        "--channels requires: give fewer channels or another size")
    return args


def default_channels(device, image_size):
    """Default width of the network at each resolution: small enough for a CPU to draw faces within minutes."""
    if device.type == "cuda":
        return [64, 128, 256, 512]
    return [16, 64, 64, 192] if image_size <= 32 else [16, 32, 64, 128, 192]


# --------------------------------------------------------------------------------------------------------- method ----


def linear_beta_schedule(timesteps):
    """Betas (T,), float64, that rise linearly (Ho et al. 2020, section 4). The paper's range, 1e-4 to 0.02, is for
    T = 1000. It is scaled by 1000 / T, so that for every T from 10 up hardly anything of the image is left at the end:
    the product of 1 - beta is below 1e-4."""
    scale = 1000 / timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64).clamp(max=0.999)


def forward_diffusion(x_0, t, alphas_cumprod, noise=None):
    """Noise images in closed form: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, equation 4).
    x_0 (B, 3, S, S), t (B,) in [0, T), a = alphas_cumprod (T,) = cumprod(1 - betas). Returns (x_t, noise), as x_0."""
    if noise is None:
        noise = torch.randn_like(x_0)
    a_t = alphas_cumprod[t][:, None, None, None]
    return (a_t.sqrt() * x_0 + (1 - a_t).sqrt() * noise).to(x_0.dtype), noise


DENSITY_MEAN, DENSITY_DEVIATION = 1.0, 2.5  # of lambda at 32 px


def timestep_density(timesteps, image_size):
    """Probability (T,), float64, with which the training draws each timestep.

    With linear betas, half of all timesteps are almost pure noise, where the network can learn little. So timesteps are
    drawn such that the log signal-to-noise ratio lambda = log(a_t / (1 - a_t)) has a normal density: the probability of
    t is proportional to normal(lambda_t; mean, deviation) |d lambda / dt| (Hang et al. 2024, arXiv:2407.03297). In an
    image of twice the side, noise of the same level hides half as much, so the mean is less by log 4 for each doubling
    (Hoogeboom et al. 2023, arXiv:2301.11093).
    """
    a = torch.cumprod(1 - linear_beta_schedule(timesteps), 0)
    log_snr = torch.log(a / (1 - a))
    mean = DENSITY_MEAN - math.log(4) * math.log2(image_size / 32)
    slope = torch.gradient(log_snr)[0].abs()
    density = torch.exp(-0.5 * ((log_snr - mean) / DENSITY_DEVIATION) ** 2) * slope
    return density / density.sum()


class SinusoidalPositionEmbeddings(nn.Module):
    """Timesteps (B,) to (B, dim): sines, then cosines, of wavelengths 2 pi to 20,000 pi (Vaswani et al. 2017, 3.5)."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, timesteps):
        half = self.dim // 2
        frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=timesteps.device))
        angles = timesteps[:, None].float() * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)


class Block(nn.Module):
    """A residual block: x plus two convolutions of x, between which the time embedding scales and shifts each channel.
    x (B, c_in, H, W) and the time embedding (B, c_time) to (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, c_time):
        super().__init__()
        self.norm = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_projection = nn.Linear(c_time, 2 * c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # at first the block is the identity, which makes deep networks easy to train
        nn.init.zeros_(self.conv2.bias)
        self.match = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time_embedding):
        scale, shift = self.time_projection(time_embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm(x)))
        h = self.conv2(F.silu(h * (1 + scale) + shift))
        return self.match(x) + h


class SimpleUnet(nn.Module):
    """Predicts the noise in x_t. A contracting path halves the image and deepens the features at each of `channels`;
    then a bottleneck; then an expanding path doubles the image again. At each resolution the expanding path also gets
    the features of the contracting path (skip connections, Ronneberger et al. 2015). Every block gets t, embedded.

    The layers compute F, and the predicted noise is sqrt(1 - a_t) x_t + sqrt(a_t) F with a_t = alphas_cumprod[t]. Near
    pure noise x_t itself is the best prediction, and so no layer has to copy it (F is the v of Salimans & Ho 2022,
    arXiv:2202.00512, with the opposite sign). `image_size` (px) must be divisible by 2 ** (len(channels) - 1).
    """

    def __init__(self, channels=(16, 32, 64, 128, 192), image_size=64, timesteps=1000):
        super().__init__()
        self.image_size, self.timesteps = image_size, timesteps
        c_time = 256
        self.time_mlp = nn.Sequential(SinusoidalPositionEmbeddings(64), nn.Linear(64, c_time), nn.SiLU(),
                                      nn.Linear(c_time, c_time), nn.SiLU())
        self.first = nn.Conv2d(3, channels[0], 3, padding=1)
        narrow, wide = channels[:-1], channels[1:]
        self.down = nn.ModuleList(Block(c, c, c_time) for c in channels)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(narrow, wide))
        self.bottleneck = nn.ModuleList(Block(channels[-1], channels[-1], c_time) for _ in range(4))
        self.up = nn.ModuleList(Block(2 * c, c, c_time) for c in channels)
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(narrow, wide))
        self.last = nn.Sequential(nn.GroupNorm(8, channels[0]), nn.SiLU(), nn.Conv2d(channels[0], 3, 3, padding=1))
        nn.init.zeros_(self.last[-1].weight)
        alphas_cumprod = torch.cumprod(1 - linear_beta_schedule(timesteps), 0).float()
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    def forward(self, x, t):
        """x (B, 3, S, S) in about [-1, 1], t (B,) integer timesteps, to the predicted noise (B, 3, S, S)."""
        x_t, time_embedding, skips = x, self.time_mlp(t), []
        x = self.first(x)
        for level, block in enumerate(self.down):
            x = block(x, time_embedding)
            skips.append(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
        for block in self.bottleneck:
            x = block(x, time_embedding)
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat((x, skips[level]), dim=1), time_embedding)
            if level > 0:
                x = F.interpolate(self.grow[level - 1](x), scale_factor=2)
        a_t = self.alphas_cumprod[t][:, None, None, None]
        return (1 - a_t).sqrt() * x_t + a_t.sqrt() * self.last(x)


SAMPLERS = {  # (eta, order): how much of the noise is drawn anew at each step, how many estimates of x_0 a step uses
    "ddpm": (1, 1),  # ancestral sampling, Ho et al. 2020, algorithm 2
    "ddim": (0, 1),  # deterministic, Song et al. 2021 (arXiv:2010.02502)
    "dpm++": (0, 2),  # DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095)
    "sde-dpm++": (1, 2),  # its stochastic form
}


def sampling_schedule(timesteps, steps):
    """The timesteps that sample() visits, at most `steps` from the last to 0, quadratically closer towards 0 (Song et
    al. 2021, appendix D.2), and a and b, as in sample(), of each and of the clean image at the end; three lists."""
    t = np.arange(timesteps) if steps >= timesteps else (timesteps - 1) * np.linspace(1, 0, steps) ** 2
    t = np.unique(t.round().astype(int))[::-1].tolist()
    alphas_cumprod = torch.cumprod(1 - linear_beta_schedule(timesteps), 0)[t]
    return t, [*alphas_cumprod.sqrt().tolist(), 1.0], [*(1 - alphas_cumprod).sqrt().tolist(), 0.0]


@torch.no_grad()
def sample(model, count=64, steps=20, sampler="dpm++", seed=0, first=0, precision="fp32", on_step=None):
    """Draw `count` images, (count, 3, S, S) float32 in [-1, 1] on the CPU, from a trained SimpleUnet.

    Every sampler of SAMPLERS takes the same step from x_t to the less noisy x_s, with a = sqrt(alphas_cumprod), the
    share of the image, b = sqrt(1 - alphas_cumprod), the share of the noise, and q = (b_s / a_s) / (b_t / a_t):

        x_s = (b_s / b_t) q^eta x_t  +  a_s (1 - q^(1 + eta)) x_0  +  b_s sqrt(1 - q^(2 eta)) fresh noise

    x_0 is the clean image that follows from the predicted noise, clipped to [-1, 1] and, for order 2, extrapolated from
    this and the last estimate. eta = 1 with order 1 over all timesteps is the ancestral sampling of Ho et al. 2020.

    `steps` is the number of network evaluations. Image i of a `seed`, counted from `first`, does not depend on `count`.
    `on_step(x_t, x_0)`, if given, is called before each step; return True to stop early.
    """
    device = next(model.parameters()).device
    eta, order = SAMPLERS[sampler]
    streams = [generator("sample", seed, first + number, device=device) for number in range(count)]
    visited, a, b = sampling_schedule(model.timesteps, steps)
    x, x_0_before, q_before = randn(streams, model.image_size), None, None
    for step, t in enumerate(visited):
        with autocast(device, precision):
            noise = model(x, torch.full((count,), t, device=device)).float()
        x_0 = ((x - b[step] * noise) / a[step]).clamp(-1, 1)
        if on_step and on_step(x, x_0):
            break
        q = (b[step + 1] / a[step + 1]) / (b[step] / a[step])
        estimate = x_0
        if order == 2 and step and q > 0:
            estimate = x_0 + (x_0 - x_0_before) * math.log(q) / math.log(q_before) / 2
        x = (b[step + 1] / b[step]) * q**eta * x + a[step + 1] * (1 - q ** (1 + eta)) * estimate
        if eta and q > 0:
            x = x + b[step + 1] * math.sqrt(1 - q ** (2 * eta)) * randn(streams, model.image_size)
        x_0_before, q_before = x_0, q
    return x.cpu()


def randn(streams, size):
    """Standard normal noise (len(streams), 3, size, size), each image from its own torch.Generator."""
    noise = torch.stack([torch.randn(3, size, size, generator=stream, device=stream.device) for stream in streams])
    return noise.contiguous(memory_format=memory_format(noise.device))


def generator(*key, device="cpu"):
    """A random generator that depends on `key` alone, so that any moment of a run can be repeated."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def autocast(device, precision):
    """The context in which the network computes in `precision` ("fp32", "bf16" or "fp16") on `device`."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, types.get(precision), enabled=precision in types)


def memory_format(device):
    """The layout of images and weights for `device`: channels last, except on Apple GPUs, where that is slow (pytorch
    issues 193349 and 193623)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


# ------------------------------------------------------------------------------------------------------- training ----

WARM_UP = 0.01  # share of the run in which the learning rate rises; after it, it falls linearly to zero
MOMENTUM = 0.9  # of Muon
EMA_POWER = 12  # share of the first i of n steps in the average: (i / n) ** 12, so mostly the last tenth counts
CORE_PIXELS = 16 * 64**2  # most pixels of a micro-batch for each CPU core: more do not fit in its cache (ABLATIONS.md)
HELDOUT_MOST = 512  # held-out images that the error is measured on
DRAWING_SHARE = 0.05  # of the time, at most, for the pictures along the way
BAD_STEPS = 20  # consecutive steps without a finite gradient before giving up
LOOK_SECONDS, LOG_SECONDS = 2, 30  # between looks at the loss, and between lines of a log file

# a, b, c of each iteration S <- a S + b S^3 + c S^5: the ones that bring singular values from 0.01 to 1 closest to 1 in
# three iterations, found as in Amsel et al. 2025 (arXiv:2505.16932, section 3). The results lie between 0.73 and 1.27.
NEWTON_SCHULZ = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


def orthogonalize(x):
    """A matrix x = U S V' (M, N) to about U V' (M, N), by Newton-Schulz iterations.

    Each one multiplies x by a polynomial in x x'. The polynomials are multiplied first and x last, since x x' has only
    the shorter side of x, which in a 3 x 3 convolution of equal widths is a ninth of the longer one.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.T).T
    x = x / (x.norm() + 1e-7)
    gram, product = x @ x.T, torch.eye(len(x), device=x.device)
    for a, b, c in NEWTON_SCHULZ:
        polynomial = b * gram + c * gram @ gram
        polynomial.diagonal().add_(a)
        gram, product = polynomial @ gram @ polynomial, polynomial @ product
    return product @ x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for convolution kernels (outputs, inputs, K, K).

    The momentum of a kernel's gradient, a matrix (outputs, inputs x K x K), is orthogonalized before it is subtracted,
    so that an update is as large in rare directions as in common ones. With the factor 0.2 sqrt(longer side) (Liu et
    al. 2025, arXiv:2502.16982) its entries are as large as Adam's, and one learning rate serves both.
    """

    def __init__(self, weights, lr):
        super().__init__(weights, {"lr": lr})
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["momentum"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self):
        for weight in self.param_groups[0]["params"]:
            momentum = self.state[weight]["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
            matrix = weight.grad.lerp(momentum, MOMENTUM).flatten(1)
            rate = 0.2 * math.sqrt(max(matrix.shape)) * self.param_groups[0]["lr"]
            weight.sub_(rate * orthogonalize(matrix).view_as(weight))


def build_optimizers(model, lr, device):
    """Muon for convolution kernels, Adam for all other weights and for the first and last layer, which meet pixels. The
    learning rate is a tensor on the device, so that a step can change it without waiting for the device."""
    plain = {*model.first.parameters(), *model.last.parameters()}
    kernels = [weight for weight in model.parameters() if weight.ndim == 4 and weight not in plain]
    others = [weight for weight in model.parameters() if weight.ndim != 4 or weight in plain]
    return {"muon": Muon(kernels, torch.tensor(lr, device=device)),
            "adam": torch.optim.Adam(others, torch.tensor(lr, device=device), betas=(0.9, 0.99), fused=True)}


def learning_rate(highest, part):
    """The learning rate when the part `part` (0 to 1) of the run is done."""
    return highest * min(1, (part + 1e-3) / WARM_UP) * (1 - part)


@dataclasses.dataclass
class Progress:
    """How far a run has come. All of it is in the checkpoint."""

    epoch: int = 0  # whole epochs
    step: int = 0  # optimizer steps
    images_seen: int = 0
    images_in_epoch: int = 0  # those of images_seen that belong to the current epoch
    losses: list = dataclasses.field(default_factory=lambda: [0.0, 0.0])  # sum and number of this epoch's batch errors
    seconds: float = 0.0  # of all starts together, start-up included
    first_step: float = 0.0  # `seconds` at the first step
    history: list = dataclasses.field(default_factory=list)  # rows of metrics.csv
    images: int = 0  # identifies the set of training images of the current epoch
    heldout: list = dataclasses.field(default_factory=list)  # identify the held-out images that are compared over time


class Run:
    """One training run: what does not change (settings, data, networks), and `at`, how far it has come."""

    def __init__(self, args, device, saved=None):
        """Begin a run with the settings `args`, or resume the checkpoint `saved`."""
        fields = [field.name for field in dataclasses.fields(Progress)]
        self.args, self.device, self.precision = args, device, choose_precision(args.precision, device)
        self.at = at = Progress(**{name: saved[name] for name in fields} if saved else {})
        with rank_0_first():
            names, pixels, self.skipped = load_images(args.dataroot, args.image_size, args.results)
        self.train_rows, self.heldout_rows, at.heldout, images = split(names, at.heldout)
        if broadcast(at.epoch, at.step, images) != (at.epoch, at.step, images):
            raise UserError(f"process {RANK} reads another checkpoint or other images than process 0: --checkpoint and "
                            "--dataroot must be on a disk that all machines share")
        if images != at.images:  # the folder has changed: begin the epoch anew with the images of today
            at.images, at.images_in_epoch, at.losses = images, 0, [0.0, 0.0]
        at.history = [row for row in at.history if row[0] <= at.epoch]  # an interrupted epoch gets its row later
        self.faces, self.saver = Faces(pixels, device), Saver(args.checkpoint, 60 * args.save_minutes)

        torch.manual_seed(args.seed)
        torch.backends.cudnn.benchmark = True  # chooses the fastest algorithm for each convolution
        torch.backends.cuda.matmul.allow_tf32 = True
        self.model = build_network(vars(args), saved and saved["model"], device)
        self.ema = build_network(vars(args), saved["ema"] if saved else self.model.state_dict(), device)
        self.ema.eval().requires_grad_(False)  # the average of the model's weights, which draws the pictures
        self.network = torch.compile(self.model) if args.compile else self.model  # the model as training calls it
        if PROCESSES > 1:
            self.network = nn.parallel.DistributedDataParallel(self.network)
        self.weights, self.averages = list(self.model.parameters()), list(self.ema.parameters())
        self.cumulative_density = timestep_density(args.timesteps, args.image_size).cumsum(0).float().to(device)
        self.optimizers = build_optimizers(self.model, args.lr, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        if saved:
            self.scaler.load_state_dict(saved["scaler"] or self.scaler.state_dict())  # {} if it was not fp16
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(saved["optimizer"][name])
                optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"].to(device)
        self.losses, self.bad_steps = torch.tensor(at.losses, device=device), torch.zeros((), device=device)

        self.micro_batch = math.ceil(args.batch_size / PROCESSES)  # most images that go through the network at a time
        if device.type == "cpu":
            fit = CORE_PIXELS * torch.get_num_threads() // args.image_size**2
            self.micro_batch = max(1, min(self.micro_batch, fit))
        self.epoch_begun, self.epoch_seen = time.time(), at.images_seen
        self.next_drawing = self.said = 0.0  # when pictures may be drawn again; when an epoch's line was printed

    def seconds(self):
        """Seconds of all starts of this run together."""
        return self.at.seconds + time.time() - START

    def images_per_second(self):
        """Training images a second in this epoch; in the whole run before this start's first step of the epoch."""
        seen = self.at.images_seen - self.epoch_seen
        return seen / (time.time() - self.epoch_begun) if seen else self.at.images_seen / self.seconds()

    def part_done(self):
        """The part of the run that is done, 0 to 1, by epochs, steps or the clock, which counts from the first step."""
        at, args = self.at, self.args
        epochs = at.epoch + at.images_in_epoch / len(self.train_rows)
        part = max(epochs / (args.epochs or math.inf), at.step / (args.max_steps or math.inf))
        if args.minutes and at.step:
            evaluations = len(self.heldout_rows) + 64 * args.sample_steps  # at the end, in rank 0 alone
            speed = max(self.images_per_second(), at.images_seen / self.seconds()) / PROCESSES  # training images
            rest = 0.4 * evaluations / speed + 1.2 * self.saver.cost + 3  # an evaluation takes 0.3 to 0.4 of an image
            budget = 60 * args.minutes - min(rest, 20 * args.minutes) - at.first_step
            part = max(part, (self.seconds() - at.first_step) / max(budget, 0.1))
        return min(part, 1.0)

    def seconds_left(self):
        return (self.seconds() - self.at.first_step) * (1 / max(self.part_done(), 1e-6) - 1)

    def state(self, finished=False):
        """What a checkpoint holds, as a copy on the CPU, which training does not change any more."""
        progress = dataclasses.asdict(self.at) | {"seconds": self.seconds(), "losses": self.losses.tolist()}
        optimizers = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        state = {**progress, "version": VERSION, "finished": finished, "scaler": self.scaler.state_dict(),
                 "model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimizer": optimizers,
                 "config": {name: vars(self.args)[name] for name in STORED}}
        return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)


def random_draws(run, count):
    """flip (count,) bool, t (count,) int64, noise (count, 3, S, S) of the current step, on the device. They depend on
    (seed, step) alone: they are the same after a restart and for any number of processes. The timesteps follow
    timestep_density, one from each of `count` intervals of equal probability (stratified sampling)."""
    stream, size = generator("step", run.args.seed, run.at.step, device=run.device), run.args.image_size
    flip = torch.rand(count, generator=stream, device=run.device) < 0.5
    position = torch.rand(count, generator=stream, device=run.device)
    quantile = (torch.arange(count, device=run.device) + position) / count
    t = torch.searchsorted(run.cumulative_density, quantile).clamp(max=run.args.timesteps - 1)
    noise = torch.randn(count, size, size, 3, generator=stream, device=run.device).permute(0, 3, 1, 2)
    return flip, t, noise.contiguous(memory_format=memory_format(run.device))


def accumulate_gradients(run, rows):
    """Noise the images `rows` (B,), predict the noise, L1 loss, backward, in micro-batches. Returns the mean error, ().

    Each process takes its share of the batch, and DistributedDataParallel averages the gradients of all processes after
    the last micro-batch. The losses of all micro-batches and processes add up to the mean error.
    """
    begin, end = len(rows) * RANK // PROCESSES, len(rows) * (RANK + 1) // PROCESSES  # this process's share
    batch = len(rows) if end > begin else math.inf  # a process without images computes one, which counts as zero
    share = [values[begin:max(end, begin + 1)] for values in (rows, *random_draws(run, len(rows)))]
    count, error = math.ceil(len(share[0]) / run.micro_batch), torch.zeros((), device=run.device)
    for number, (some, flip, t, noise) in enumerate(zip(*(values.tensor_split(count) for values in share)), 1):
        x_t, _ = forward_diffusion(run.faces.batch(some, flip), t, run.model.alphas_cumprod, noise)
        with contextlib.nullcontext() if number == count or PROCESSES == 1 else run.network.no_sync():
            with autocast(run.device, run.precision):
                predicted = run.network(x_t, t)
            loss = F.l1_loss(predicted.float(), noise, reduction="sum") / (batch * noise[0].numel())
            run.scaler.scale(loss * PROCESSES).backward()
        error += loss.detach()
    if PROCESSES > 1:
        dist.all_reduce(error)
    return error


def training_step(run, rows, part):
    """One optimizer step on images `rows` (B,), row numbers in run.faces, when `part` (0 to 1) of the run is done. If
    the gradient is not finite, it and the learning rate are set to zero on the device, without waiting for it. If there
    is too little memory for a micro-batch, its size is halved and the same step repeated."""
    error = None
    while error is None:
        run.model.zero_grad()
        try:
            error = accumulate_gradients(run, rows)
        except RuntimeError as failure:
            run.micro_batch = halved(run.micro_batch, failure)
            if PROCESSES > 1:  # all would have to repeat the step
                raise UserError(f"process {RANK} has too little memory for its share of the batch: give a smaller "
                                "--batch-size") from None
    for optimizer in run.optimizers.values():
        run.scaler.unscale_(optimizer)
    finite = nn.utils.clip_grad_norm_(run.weights, 1.0).isfinite() & error.isfinite()
    for weight in run.weights:
        weight.grad = torch.where(finite, weight.grad, 0)
    for optimizer in run.optimizers.values():
        optimizer.param_groups[0]["lr"].copy_(learning_rate(run.args.lr, part) * finite)
        optimizer.step()
    run.scaler.update()
    run.at.step += 1
    run.at.images_seen += len(rows)
    run.at.images_in_epoch += len(rows)
    with torch.no_grad():
        torch._foreach_lerp_(run.averages, run.weights, 1 - (1 - 1 / run.at.step) ** EMA_POWER)
    run.losses += torch.where(finite, torch.stack((error, torch.ones_like(error))), 0)
    run.bad_steps = torch.where(finite, 0, run.bad_steps + 1)


@torch.no_grad()
def heldout_loss(run):
    """Mean L1 error of the averaged network on held-out images, for uniform timesteps and noise that never change, so
    that runs of any timestep density can be compared."""
    count, error = len(run.heldout_rows), 0.0
    timesteps = ((torch.arange(count) + 0.5) / count * run.args.timesteps).long().to(run.device)
    for numbers in torch.arange(count).split(run.micro_batch):
        streams = [generator("held-out", number, device=run.device) for number in numbers.tolist()]
        x_0, t = run.faces.batch(run.heldout_rows[numbers]), timesteps[numbers]
        x_t, noise = forward_diffusion(x_0, t, run.model.alphas_cumprod, randn(streams, run.args.image_size))
        with autocast(run.device, run.precision):
            predicted = run.ema(x_t, t)
        error += F.l1_loss(predicted.float(), noise).item() * len(numbers) / count
    return error


def batches_left(run):
    """Row numbers (B,) of each batch that is left of this epoch. Their order depends on (seed, epoch) alone."""
    order = torch.randperm(len(run.train_rows), generator=generator("order", run.args.seed, run.at.epoch))
    rest = run.train_rows[order][run.at.images_in_epoch:].to(run.faces.pixels.device)
    return rest.tensor_split(math.ceil(len(rest) / run.args.batch_size)) if len(rest) else ()


def end_epoch(run, at_end, stop):
    """Metrics, a line and pictures of an epoch, or of the part of it with which the run ends; only in rank 0."""
    at, args, begun = run.at, run.args, time.time()
    if at.images_in_epoch and run.losses[1]:  # no row without a finite step
        loss, speed, heldout = (run.losses[0] / run.losses[1]).item(), run.images_per_second(), heldout_loss(run)
        rate = run.optimizers["adam"].param_groups[0]["lr"].item()
        at.history.append([at.epoch + 1, at.step, at.images_seen, loss, heldout, rate, speed, run.seconds()])
        if at_end or begun - run.said > 10:
            run.said = begun
            lowest, minutes = min(row[4] for row in at.history), run.seconds_left() / 60
            memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if run.device.type == "cuda" else ""
            say(f"epoch {at.epoch + 1}: step {at.step:,}, loss {loss:.4f}, held out {heldout:.4f} (lowest {lowest:.4f})"
                f", {speed:.0f} images/s, {minutes:.1f} minutes left{memory}")
    with replacing(args.results / "metrics.csv") as file:  # always whole, so that no row is cut off or there twice
        file.writelines(f"{','.join(map(str, row))}\r\n".encode() for row in (COLUMNS, *at.history))
    if at.history and (at_end or begun > run.next_drawing):
        draw_pictures(run, args.sample_steps if at_end else max(1, args.sample_steps // 2), stop)
        run.next_drawing = time.time() + (time.time() - begun) / DRAWING_SHARE


def train(run):
    """Train to the end of the run. Returns the exit status: 0 finished, 130 stopped by Ctrl-C or SIGTERM."""
    at, args, stop, at_end, stopped, looked = run.at, run.args, [], False, False, 0.0
    for number in (signal.SIGINT, signal.SIGTERM):  # the first ends the run, the second ends the program at once
        signal.signal(number, lambda *_: os._exit(130) if stop else stop.append(True))
    while not (at_end or stopped):
        bar = Bar(f"epoch {at.epoch + 1}", len(run.train_rows), at.images_in_epoch)
        run.epoch_begun, run.epoch_seen = time.time(), at.images_seen
        for rows in batches_left(run):
            part, stopped = broadcast(run.part_done(), bool(stop))
            if stopped or part >= 1:
                break
            at.first_step = at.first_step or run.seconds()
            training_step(run, rows, part)
            if RANK == 0:
                run.saver.save_if_due(run.state)  # writes in the background
                bar.update(len(rows))
            if RANK == 0 and time.time() - looked > LOOK_SECONDS:  # not in each step, since it waits for the device
                looked, left = time.time(), run.seconds_left() / 60
                bar.status = f"loss {run.losses[0] / run.losses[1]:.4f}, {left:.1f} minutes left in all"
                warn_if_not_written(write_page, args.results, run, "training")
                if run.bad_steps >= BAD_STEPS:
                    raise UserError(f"{BAD_STEPS} steps in a row had no finite gradient and changed nothing: resume "
                                    "the checkpoint with a lower --lr or with --precision fp32")
        bar.close()
        at_end, stopped = broadcast(run.part_done() >= 1, bool(stop))
        if RANK == 0 and not stopped:
            warn_if_not_written(end_epoch, run, at_end, stop)
        if not stopped and at.images_in_epoch >= len(run.train_rows):
            at.epoch, at.images_in_epoch = at.epoch + 1, 0
            run.losses.zero_()
        stopped, = broadcast(bool(stop))  # a last grid that Ctrl-C cut short is drawn at the next start
    if RANK == 0:
        run.saver.save_last(run.state(finished=not stopped))
        warn_if_not_written(write_page, args.results, run, "stopped" if stopped else "finished")
    say(f"Stopped after {at.step} steps, checkpoint saved: the same command resumes the run." if stopped else
        f"Done in {run.seconds() / 60:.1f} minutes. Open {args.results / 'index.html'}; --sample 64 draws more faces.")
    return 130 if stopped else 0


# ----------------------------------------------------------------------------------------------------------- data ----

Image.init()
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MAX_PIXELS = 64_000_000
HELDOUT_ONE_IN = 20


def read_image(path, size):
    """First frame of an image file, upright, over white, centre-cropped: (size, size, 3) uint8. Pillow's errors."""
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"claims {image.width} x {image.height} pixels")
        image.draft(None, (2 * size, 2 * size))  # a JPEG is scaled as it is decoded, to no less than twice the size
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits per channel, which Pillow would clip
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return np.asarray(image)


def decode(path, size):
    """read_image for any file: (pixels, "") or (None, the reason to skip it)."""
    try:
        return (read_image(path, size), "") if os.path.isfile(path) else (None, "not a file")
    except UnidentifiedImageError:
        return None, "not an image that this program can read"
    except Exception as error:  # Pillow's decoders raise almost anything for damaged files
        return None, printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def list_files(root):
    """Sorted (name, bytes, modified in ns) of every file below `root`, through links, without hidden ones."""
    files, visited = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        seen = os.path.realpath(folder) in visited  # through a link
        visited.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not seen)
        for path in (os.path.join(folder, name) for name in names if not name.startswith(".") and not seen):
            size, modified = 0, 0
            with contextlib.suppress(OSError):  # a link to nowhere, or deleted since
                size, modified = os.stat(path).st_size, os.stat(path).st_mtime_ns
            files.append((os.path.relpath(path, root).replace(os.sep, "/"), size, modified))
    return sorted(files)


def open_cache(path, size, files):
    """({(name, bytes, modified): reason to skip it or ""}, memory-mapped pixels) of the cache; ({}, None) if damaged.

    `path` has the pixels of all files without a reason, (N, size, size, 3) uint8, then a random token; `path`.json has
    the same token and, in the same order, [name, bytes, modified, reason] of all files.
    """
    try:
        index_path, most = path.with_name(path.name + ".json"), 10_000 + sum(6 * len(name) + 2000 for name, *_ in files)
        if path.is_file() and index_path.is_file() and index_path.stat().st_size < most:  # larger: not of these files
            saved = json.loads(index_path.read_text(encoding="utf-8"))
            index = {(str(name), int(length), int(ns)): str(reason) for name, length, ns, reason in saved["files"]}
            pixels = np.memmap(path, np.uint8, "c", shape=(sum(not reason for reason in index.values()), size, size, 3))
            with open(path, "rb") as file:
                file.seek(pixels.nbytes)
                if file.read(100) == saved["token"].encode():
                    return index, pixels
    except Exception:  # a damaged file can make the readers raise almost anything
        pass
    return {}, None


def write_cache(path, size, root, files, index, pixels):
    """Write the cache of `files`: copies what an older cache (index, pixels) has of them and decodes the rest."""
    rows = {file: row for row, file in enumerate(file for file, reason in index.items() if not reason)}
    written, token, bar = [], secrets.token_hex(8), Bar(f"reading images at {size} px", len(files))
    with replacing(path) as out, ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about single files
        with contextlib.suppress(KeyboardInterrupt):  # the next start goes on from what is done
            for some in (files[first:first + 256] for first in range(0, len(files), 256)):  # all would fill the memory
                new = [file for file in some if file not in index]
                decoded = dict(zip(new, pool.map(lambda file: decode(os.path.join(root, file[0]), size), new)))
                for file in some:
                    image, reason = decoded.get(file) or (pixels[rows[file]] if file in rows else None, index[file])
                    out.write(b"" if image is None else image.data)
                    written.append([*file, reason])
                    bar.update(1)
        out.write(token.encode())
    with replacing(path.with_name(path.name + ".json")) as out:
        out.write(json.dumps({"token": token, "files": written}).encode())
    bar.close()
    if len(written) < len(files):
        raise KeyboardInterrupt


def load_images(root, size, results):
    """(names, their memory-mapped pixels, {name: reason} of skipped images) of all images below `root`, decoded once
    and then kept in a cache that follows the folder. It is in `root`, or in `results` where `root` cannot be written.
    UserError where there are fewer than two images."""
    files = list_files(root)
    path = pathlib.Path(root if os.access(root, os.W_OK) else results, f".faces_{size}px.cache")
    index, pixels = open_cache(path, size, files)
    if [*index] != files:
        write_cache(path, size, root, files, index, pixels)
        index, pixels = open_cache(path, size, files)
    names = [name for (name, *_), reason in index.items() if not reason]
    skipped = {name: reason for (name, *_), reason in index.items() if reason and name.lower().endswith(SUFFIXES)}
    if len(names) < 2:
        raise UserError(f"{root} holds fewer than two usable images, and {len(skipped)} that cannot be used: run "
                        "download_images.py to fetch faces, or name a folder with --dataroot (--demo needs none)")
    return names, pixels, skipped


def split(names, compared=()):
    """(training rows, held-out rows, hashes of the held-out rows, a number that identifies the training images). The
    hash of an image's path below the data root decides, so an image stays on its side as the folder grows. The held-out
    rows returned are those whose hashes are in `compared`, or if there are none, the first HELDOUT_MOST."""
    hashes = np.array([int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7], "little") for name in names])
    known, order = np.isin(hashes, compared), hashes.argsort()
    heldout = (hashes % HELDOUT_ONE_IN == 0) | known
    if heldout.all() or not heldout.any():  # neither side is ever empty
        heldout[order[0]], heldout[order[-1]] = True, False
    rows = order[(heldout & known)[order]] if (heldout & known).any() else order[heldout[order]][:HELDOUT_MOST]
    return (torch.from_numpy(np.flatnonzero(~heldout)), torch.from_numpy(rows), hashes[rows].tolist(),
            zlib.crc32(hashes[~heldout].tobytes()))


class Faces:
    """The cached pixels as batches on a device. They stay on a card if they take less than a quarter of its memory."""

    def __init__(self, pixels, device):
        self.device, self.pixels = device, torch.from_numpy(pixels)
        if device.type == "cuda" and self.pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.pixels = self.pixels.to(device)

    def batch(self, rows, flip=None):
        """Images x_0 (B, 3, S, S) in [-1, 1] of `rows` (B,), mirrored where `flip` (B,) is True."""
        images = self.pixels[rows.to(self.pixels.device)].to(self.device)
        if flip is not None:
            images = torch.where(flip[:, None, None, None], images.flip(2), images)
        return to_x_0(images).contiguous(memory_format=memory_format(self.device))


def to_x_0(pixels):
    """Images (B, S, S, 3) uint8 as (B, 3, S, S) float32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


# ------------------------------------------------------------------------------------------------------- pictures ----

COLUMNS = ("epoch", "step", "images_seen", "train_loss", "heldout_loss", "lr", "images_per_second", "seconds")


def to_image(x):
    """A picture (3, H, W) in [-1, 1] as a Pillow image."""
    return Image.fromarray(((x.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy())


def save_grid(images, path, columns=8):
    """Images (N, 3, S, S) in [-1, 1] as one PNG, `columns` a row, padding 2."""
    with replacing(path) as file:
        to_image(make_grid(images, nrow=columns, padding=2, pad_value=-1)).save(file, "PNG")


def draw(model, count, at_once=64, first=0, **settings):
    """sample() of `count` images, at most `at_once` at a time, fewer where memory is too small."""
    images = []
    while len(images) < count:
        part = min(at_once, count - len(images))
        try:
            images.extend(sample(model, part, first=first + len(images), **settings))
        except RuntimeError as error:
            at_once = halved(part, error)
    return torch.stack(images)


def draw_pictures(run, steps, stop):
    """Grid, denoising strip, loss curve and animation of this moment of the run, with `steps` evaluations per image."""
    folder, history, stages = run.args.results, run.at.history, []

    def on_step(x_t, x_0):
        stages.append((x_t[:4].cpu(), x_0[:4].cpu()))
        return stop

    images = draw(run.ema, 64, steps=steps, seed=run.args.seed, precision=run.precision, on_step=on_step)
    if not stop:
        save_grid(images, folder / "epoch_{}_step_{}.png".format(*history[-1]))
        first = stages[:len(sampling_schedule(run.args.timesteps, steps)[0])]  # of draw()'s first pass
        save_denoising([*first, (images[:4], images[:4])], folder / "denoising.png")
        save_animation([folder / name for *_, name in grids(folder, history)], folder / "progress.webp")
    save_curve(history, folder / "loss.png")


def save_denoising(stages, path, columns=10):
    """How samples come out of noise: for each one a row of x_t and below it the estimates of x_0 at the same moments,
    chosen such that the pictures change equally from column to column. `stages` are pairs (x_t, x_0), each (N, 3, S,
    S), noisiest first."""
    pictures = torch.stack([torch.stack(pair, dim=1) for pair in stages])  # (moments, N, 2, 3, S, S)
    change = F.pad(pictures.diff(dim=0).abs().flatten(1).mean(dim=1).cumsum(0), (1, 0))
    chosen = torch.searchsorted(change, torch.linspace(0, 1, columns) * change[-1]).clamp(max=len(stages) - 1)
    save_grid(pictures[chosen].permute(1, 2, 0, 3, 4, 5).flatten(0, 2), path, columns)


def grids(folder, history):
    """[epoch, step, file name] of every grid of this run that is in `folder`, oldest first."""
    named = ([epoch, step, f"epoch_{epoch}_step_{step}.png"] for epoch, step, *_ in history)
    return [grid for grid in named if (folder / grid[2]).exists()]


def save_animation(paths, path, frames=60, side=1100):
    """At most `frames` of the grids `paths`, evenly chosen, as a WebP animation at most `side` pixels wide."""
    pictures = []
    for number in np.unique(np.linspace(0, len(paths) - 1, frames).round().astype(int)):
        with Image.open(paths[number]) as picture:
            scale = max(1, round(540 / picture.width))  # small pictures are enlarged, each pixel to a square
            pictures.append(ImageOps.scale(picture.convert("RGB"), scale, Image.Resampling.NEAREST))
            pictures[-1].thumbnail((side, side))
    with replacing(path) as file:
        pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:], loop=0, quality=75,
                         duration=[150] * (len(pictures) - 1) + [2500])


def distances(images, pixels):
    """Euclidean distances (N, M) between images (N, 3, S, S) in [-1, 1], as they are or mirrored, whichever is closer,
    and training images, pixels (M, S, S, 3) uint8."""
    both = torch.stack((images, images.flip(3))).flatten(2)
    parts = (to_x_0(part).flatten(1) for part in torch.from_numpy(pixels).split(1000))
    return torch.cat([torch.cdist(both, part).amin(0) for part in parts], dim=1)


def save_nearest(images, pixels, path):
    """Each of `images` (N, 3, S, S) beside the closest training image, with a number: their distance, divided by the
    median distance between a training image and its closest other one. Returns the numbers (N,)."""
    rows = np.linspace(0, len(pixels) - 1, min(len(pixels), 200)).astype(int)
    between = distances(to_x_0(torch.from_numpy(pixels[rows])), pixels)
    between[np.arange(len(rows)), rows] = math.inf
    least, closest = distances(images, pixels).min(dim=1)
    ratios = least / between.amin(1).median()
    pairs, lines = torch.stack((images, to_x_0(torch.from_numpy(pixels[closest]))), dim=1), math.ceil(len(images) / 4)
    figure = Figure(figsize=(8, 1.2 * lines), layout="constrained")
    for number, pair in enumerate(pairs):
        axes = figure.add_subplot(lines, 4, number + 1)
        axes.axis("off")
        axes.imshow(to_image(make_grid(pair, padding=1, pad_value=1)))
        axes.set_title(f"{ratios[number]:.2f}", y=-0.25, fontsize=9)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return ratios


def save_curve(history, path):
    """The loss curve: one point for each epoch, against images seen."""
    table = dict(zip(COLUMNS, zip(*history)))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("train_loss", "training images"), ("heldout_loss", "held-out images, uniform timesteps")):
        axes.plot(table["images_seen"], table[name], label=label, marker="." if len(history) < 30 else None)
    lowest, median = min(table["train_loss"] + table["heldout_loss"]), sorted(table["train_loss"])[len(history) // 2]
    axes.set(xlabel="images seen", ylabel="L1 error of the predicted noise", xlim=(0, None),
             ylim=(0.9 * lowest, max(1.3 * median, 1.05 * table["heldout_loss"][-1])))  # cuts off the first fall
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def write_page(folder, run=None, status=None):
    """run.js, the data of index.html: a function call, since a page that is opened from disk can load scripts only.
    Without `run` only the list of pictures is renewed."""
    data, path = {}, folder / "run.js"
    if run:
        rows = run.at.history
        speed = run.images_per_second() if status == "training" or not rows else rows[-1][6]
        data = {"state": status, "progress": run.part_done(), "seconds": run.seconds(), "columns": COLUMNS,
                "seconds_left": run.seconds_left(), "images_per_second": speed, "settings": run.about,
                "history": rows[::-math.ceil(len(rows) / 1000) or -1][::-1], "grids": grids(folder, rows),
                "grid": {"side": run.args.image_size, "padding": 2, "per_row": 8, "count": 64}}
    elif path.exists():
        data = json.loads(path.read_text(encoding="utf-8").removeprefix("show(").removesuffix(");\n"))
    else:  # no run to show
        return
    names = ("denoising.png", "nearest.png", "samples.png", "loss.png", "progress.webp", "metrics.csv")
    data |= {"pictures": [name for name in names if (folder / name).exists()], "updated": time.time()}
    with replacing(path) as file:
        file.write(f"show({json.dumps(data)});\n".encode())


# ----------------------------------------------------------------------------------------------------- checkpoint ----

VERSION = 2  # of the checkpoint's format and network
RETRY_SECONDS = 30


def previous_path(path):
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_checkpoint(path, state):
    """Write `state`, a nested dict of CPU tensors, whole or not at all, and keep the checkpoint before. OSError or
    RuntimeError where that fails, UserError where a weight is not finite: the file at `path` then stays."""
    if not all(weight.isfinite().all() for part in ("model", "ema") for weight in state[part].values()):
        raise UserError(f"the weights are not finite any more: resume {path}, which is good, with a lower --lr")
    with replacing(path) as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        if path.exists():  # at every moment there is a whole one under one of the two names
            os.replace(path, previous_path(path))


def read_checkpoint(path, rename=False):
    """The dict at `path`, or the one before where that is missing or damaged; None where there is none yet. With
    `rename` a damaged one gets another name, so that nothing overwrites it. UserError where there are files, but none
    that can be used. Only tensors and plain values are loaded, so nothing in a file is executed."""
    problem = ""
    for candidate in filter(pathlib.Path.exists, (path, previous_path(path))):
        try:
            with zipfile.ZipFile(candidate) as file:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()) or file.testzip():
                    raise ValueError("it is damaged")  # or a decompression bomb
            saved = torch.load(candidate, map_location="cpu", weights_only=True)
            if saved.get("version") != VERSION:
                raise ValueError("it is not from this version of the program")
        except Exception as error:  # a damaged or foreign file can make the readers raise anything
            reason = (str(error) or type(error).__name__).partition("\n")[0]
            problem = problem or f"{candidate} is not a checkpoint that this program can resume ({reason})"
            continue
        if problem:
            broken = path.with_name(f"{path.name}.broken-{time.time():.0f}")
            renamed = f"it is renamed to {broken.name}, and " if rename else ""
            say(f"{problem}: {renamed}{candidate.name} is used")
            if rename:
                with contextlib.suppress(OSError):  # in a folder that cannot be written it stays
                    os.replace(path, broken)
        return saved
    if problem:
        raise UserError(f"{problem}: move it away to begin anew")
    return None


def build_network(config, weights=None, device="cpu"):
    """A SimpleUnet of the settings `config` with `weights`, a state dict or None; UserError where they do not fit."""
    model = SimpleUnet(**{name: config[name] for name in NETWORK})
    try:
        model.load_state_dict(weights or model.state_dict())
    except RuntimeError:
        raise UserError("the checkpoint's weights do not fit its own settings: move it away to begin anew") from None
    return model.to(device, memory_format=memory_format(torch.device(device)))


def load_model(path, device="cpu"):
    """The averaged (EMA) SimpleUnet of the checkpoint at `path`, ready to evaluate; UserError where there is none."""
    saved = read_checkpoint(pathlib.Path(path))
    if not saved:
        raise UserError(f"there is no checkpoint {path}: train first, or name another with --checkpoint")
    return build_network(saved["config"], saved["ema"], device).eval().requires_grad_(False)


class Saver:
    """Writes a checkpoint every `seconds` in the background. A failed one is a warning and soon tried again."""

    def __init__(self, path, seconds):
        self.path, self.seconds, self.thread = path, seconds, ThreadPoolExecutor(1)
        self.cost, self.due = 0.0, time.time() + seconds  # cost: seconds that the last one took
        self.writing = self.thread.submit(int)  # the last write; this first one does nothing

    def write(self, state):
        """Save `state` now. Returns whether that worked."""
        begun = time.time()
        try:
            save_checkpoint(self.path, state)
            self.cost = time.time() - begun
            return True
        except (OSError, RuntimeError) as error:
            say(f"warning: {self.path} could not be saved ({error}). The one before stays. Is the disk full?")
            self.due = time.time() + min(self.seconds, RETRY_SECONDS)
            return False

    def save_if_due(self, state):
        """Begin to write what the function `state` returns, if it is time to and the last one is written."""
        if time.time() >= self.due and self.writing.done():
            self.writing.result()  # if the last write ended with a UserError, it is raised here
            self.due = time.time() + max(self.seconds - 2 * self.cost, 2 * self.cost)  # early, to be on disk in time
            self.writing = self.thread.submit(self.write, state())

    def save_last(self, state):
        """Write `state` and wait for it; UserError where that fails three times."""
        self.thread.shutdown()
        for _ in range(3):
            if self.write(state):
                return
            time.sleep(RETRY_SECONDS / 6)
        raise UserError(f"{self.path} could not be saved at the end, the one before is still good: make room on the "
                        "disk, then the same command resumes the run")


# ------------------------------------------------------------------------------------------------------- plumbing ----

OUT_OF_MEMORY = ("out of memory", "alloc_failed", "not enough memory", "can't allocate memory", "find an engine")


def halved(size, error):
    """Half of `size`, images at a time, after the exception `error`; raises it if it does not mean lack of memory, and
    UserError where one image is too many already."""
    if not any(text in str(error).lower() for text in OUT_OF_MEMORY):
        raise error
    if size == 1:
        raise UserError("there is not enough memory for one image: give a smaller --image-size or narrower --channels")
    return math.ceil(size / 2)


def choose_device(name):
    """The torch.device for --device; UserError where there is none of that name, or fewer cards than processes."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(kind for kind in present if present[kind])
    if not present[name]:
        raise UserError(f"PyTorch finds no {name} device here: leave out --device to use another")
    if name != "cuda":
        return torch.device(name)
    local_rank, cards = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= cards:
        raise UserError(f"there are more processes than CUDA cards: start torchrun with --nproc_per_node={cards}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_precision(name, device):
    """The number format for --precision: of those that train well, the one in which the device is fastest."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if fast else "fp32"


def join_processes():
    """Form one group of the processes that torchrun has started."""
    store, *_ = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")  # else restarts by torchrun find addresses of dead processes
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", rank=RANK,
                            world_size=PROCESSES, store=dist.PrefixStore(f"attempt {attempt}", store),
                            timeout=datetime.timedelta(days=1))  # the others wait while rank 0 reads images and draws


def broadcast(*numbers):
    """`numbers` as rank 0 has them, so that all processes decide alike."""
    values = torch.tensor(numbers, dtype=torch.float64)
    if PROCESSES > 1:
        dist.broadcast(values, 0)
    return tuple(values.tolist())


@contextlib.contextmanager
def rank_0_first():
    """Of several processes, rank 0 runs the block alone, then all others run it."""
    if RANK > 0:
        broadcast(0)
    yield
    if RANK == 0:
        broadcast(0)


def printable(text):
    """`text` in one line of at most 400 characters, with escapes in place of control characters."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))[:400]


def say(line):
    """Print a line, above the progress bar if there is one; only in the process of rank 0."""
    if RANK == 0:
        tqdm.write(printable(line))


class Bar:
    """Progress of `total` images: a bar on a terminal, elsewhere a line every LOG_SECONDS; only for rank 0."""

    def __init__(self, title, total, done=0):
        self.bar = tqdm(desc=title, total=total, initial=done, unit="img", leave=False, disable=RANK > 0 or None)
        self.title, self.total, self.done, self.said, self.close = title, total, done, time.time(), self.bar.close
        self.status = ""  # shown beside the number of images

    def update(self, count):
        """`count` more images are done."""
        self.done += count
        self.bar.set_postfix_str(self.status, refresh=False)
        self.bar.update(count)
        if self.bar.disable and time.time() - self.said > LOG_SECONDS:
            self.said = time.time()
            say(f"{self.title}: {self.done:,} of {self.total:,} images{self.status and ', '}{self.status}")


def warn_if_not_written(write, *arguments):
    """write(*arguments), where a disk that is full or disconnected is no more than a warning."""
    try:
        write(*arguments)
    except OSError as error:
        say(f"warning: results could not be written ({error}); training goes on")


def lock(path):
    """An open file whose lock reserves the checkpoint at `path` until this process ends. UserError if it is taken."""
    file = path.with_name(f".{path.name}.lock").open("a")
    with contextlib.suppress(ImportError, OSError):  # Windows, or a network drive that has no locks
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is training {path} at this moment: let it finish, or stop it") from None
    return file


@contextlib.contextmanager
def replacing(path):
    """Yield a file to write; it appears under `path` whole, or not at all."""
    for left_over in path.parent.glob(f".{path.name}.*.tmp"):  # of a run that was killed
        with contextlib.suppress(OSError):
            if time.time() - left_over.stat().st_mtime > 600:  # not of one that writes now
                left_over.unlink()
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # random: nobody can plant a link there
    try:
        with open(unfinished, "x+b") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- main ----


def begin(run):
    """Say what is about to happen; write the list of skipped images and the page."""
    args, count, listing = run.args, len(run.faces.pixels), run.args.results / "skipped_images.txt"
    ends = " or ".join(f"{vars(args)[name]:,.10g} {name.removeprefix('max_')}" for name in LIMITS if vars(args)[name])
    about = {"images": f"{count:,} below {args.dataroot}, {count - len(run.train_rows):,} of them held out"}
    if run.skipped:
        name, reason = min(run.skipped.items())
        about["skipped"] = f"{len(run.skipped):,} files, such as {printable(name)} ({reason}); all are in {listing}"
    about |= {"network": f"channels {args.channels}, {sum(map(torch.numel, run.weights)) / 1e6:.1f} M parameters",
              "device": f"{run.device.type}, {run.precision}, {PROCESSES} process{'es' * (PROCESSES > 1)}",
              "training": f"until {ends}, {args.batch_size} images a step, learning rate {args.lr:g}",
              "checkpoint": f"{args.checkpoint}, saved every {args.save_minutes:g} minutes and at the end",
              "pictures": str(args.results / "index.html")}
    for label, text in about.items():
        say(f"{label:12}{text}")
    run.about = list(about.items())
    if RANK == 0:
        lines = (f"{printable(name)}: {reason}\n" for name, reason in sorted(run.skipped.items()))
        listing.write_text("".join(lines), encoding="utf-8")
        with contextlib.suppress(OSError):  # it is there already, or was not fetched with the scripts
            shutil.copy(HERE / "results" / "index.html", args.results)


def draw_samples(args, device):
    """--sample: images in results/samples, the first 64 as a grid, the first 16 beside their closest training image."""
    model, folder = load_model(args.checkpoint, device), args.results / "samples"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("sample_*.png"):
        old.unlink()
    bar, grid = Bar("drawing", args.sample), args.results / "samples.png"
    for first in range(0, args.sample, 64):
        images = draw(model, min(64, args.sample - first), first=first, steps=args.sample_steps, seed=args.seed,
                      precision=choose_precision(args.precision, device))
        for number, image in enumerate(images, first + 1):
            to_image(image).save(folder / f"sample_{number:05d}.png")
        bar.update(len(images))
        if first == 0:
            save_grid(images, grid)
            pictures = images[:16]
    bar.close()
    say(f"{args.sample} images are in {folder}, the first {min(64, args.sample)} in {grid}")
    try:
        pixels = load_images(args.dataroot, args.image_size, args.results)[1]
        ratio = save_nearest(pictures, pixels, args.results / "nearest.png").median()
        say(f"nearest.png: the distance to the closest training image is {ratio:.2f} times (median) the one "
            "between a training image and its closest other one; far below 1, the network repeats its images")
    except UserError as error:
        say(f"no nearest.png: {error}")
    write_page(args.results)


def run_command(argv):
    """Read settings and checkpoint, then train or draw. Returns the exit status."""
    args = read_settings(argv)
    with rank_0_first():
        args.results.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.results).close()  # OSError now, not after hours
        if not args.sample:
            args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            locked = lock(args.checkpoint) if RANK == 0 else None  # noqa: F841 (held while this function runs)
        saved = read_checkpoint(args.checkpoint, rename=not args.sample)
    args = read_settings(argv, saved and saved["config"])
    device = choose_device(args.device)
    args.channels = args.channels or default_channels(device, args.image_size)
    if args.sample:
        if RANK == 0:
            draw_samples(args, device)
        broadcast(0)  # the others wait
        return 0
    if args.demo:
        from fake_face.draw_faces import fill_folder

        with rank_0_first():
            fill_folder(args.dataroot, DEMO_IMAGES, args.image_size)
    run = Run(args, device, saved)
    same_limits = saved and all(vars(args)[name] == saved["config"][name] for name in LIMITS)
    if saved and saved["finished"] and (same_limits or run.part_done() >= 1):
        say(f"This run is finished: {saved['epoch']} epochs, {saved['step']} steps. A larger --epochs, --minutes or "
            f"--max-steps resumes it, --sample 64 draws faces, {args.begin_anew} begins a new run.")
        return 0
    begin(run)
    return train(run)


def main(argv=None):
    """Run the script on the command line `argv`. Returns the exit status."""
    sys.stdout.reconfigure(line_buffering=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    status = 1
    try:
        if PROCESSES > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's signal while the others form a new group
            join_processes()
        return run_command(argv)
    except UserError as error:
        message = str(error)  # not the exception, which would keep the lock open
    except KeyboardInterrupt:
        status, message = 130, "stopped"
    except OSError as error:
        message = (f"{error}: see whether the disk is full or disconnected, or name folders that can be written with "
                   "--results and --checkpoint, then the same command resumes the run")
    except RuntimeError as error:
        if PROCESSES == 1:
            raise
        message = (f"process {RANK} cannot go on, most likely since another one ended ({error}): the same command "
                   "resumes the checkpoint, automatically with torchrun --max-restarts=3")
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"scriptc.py: {printable(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
