"""Teach a network to draw faces of people who do not exist, by denoising diffusion.

    python scriptc.py                  train on every image below fake_face/, or go on with the run begun there
    python scriptc.py --demo           the same within a few minutes, on faces that it draws itself
    python scriptc.py --sample 64      no training: draw 64 new faces with what the checkpoint has learnt
    torchrun --nproc_per_node=2 scriptc.py      any of these on two cards, or two processes

In reading order: settings, data, forward diffusion, network, sampling, pictures, checkpoint, training, main.

The method is Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (arXiv:2006.11239), and names follow it: x_0 is
an image in [-1, 1], x_t the same image with the noise of timestep t in it, alphas_cumprod[t] the paper's alpha-bar_t.
"""

import time

START = time.time()  # before the slow imports: --minutes counts from here

import argparse
import contextlib
import copy
import csv
import ctypes
import datetime
import hashlib
import io
import itertools
import json
import logging
import math
import mmap
import os
import pathlib
import shutil
import signal
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HERE = pathlib.Path(__file__).resolve().parent
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


class UserError(Exception):
    """What only the user can put right; the text is the sentence that says how."""


# ------------------------------------------------------------------------------------------------------- settings ----

NETWORK = ("image_size", "channels", "timesteps")  # fixed for the life of a checkpoint
LIMITS = ("epochs", "minutes", "max_steps")  # where a run ends: giving one replaces the three of the checkpoint
STORED = NETWORK + LIMITS + ("dataroot", "results", "batch_size", "lr", "seed", "precision")
DEMO = {"images": 2000, "size": 32, "minutes": 5}  # everything included, so under six minutes on two cores too


def whole_number(least, most=10**9, multiple_of=1):
    """A type for argparse: an int from `least` to `most` that `multiple_of` divides."""

    def convert(text):
        number = int(text) if text.lstrip("+-").isdecimal() else None
        if number is None or not least <= number <= most or number % multiple_of:
            kind = "a whole number" if multiple_of == 1 else f"a multiple of {multiple_of}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind} from {least} to {most}")
        return number

    return convert


def positive_number(most):
    """A type for argparse: a float above 0, up to `most`."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if 0 < float(text) <= most:
                return float(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0, up to {most:g}")

    return convert


def build_parser():
    """Every setting and its default: this is their only home."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]    --help lists them",
        description="Train a denoising diffusion network on a folder of faces, and draw new ones.",
        epilog="What is not given comes from the checkpoint when there is one, else from the default in brackets.")
    add = parser.add_argument
    add("--dataroot", metavar="DIR", help="train on every image below it (fake_face beside this script)")
    add("--results", metavar="DIR", help="for grids, curve and metrics (results beside this script)")
    add("--checkpoint", metavar="FILE", help="created, later resumed from (model_checkpoint.pth beside this script)")
    add("--image-size", metavar="PX", type=whole_number(16, 256, 16), default=64, help="side of the images (64)")
    add("--channels", metavar="C", type=whole_number(8, 4096, 8), nargs="+",
        help="width of the network at each resolution, first to last (by device)")
    add("--batch-size", metavar="N", type=whole_number(1), default=128, help="images per optimiser step (128)")
    add("--epochs", metavar="N", type=whole_number(1), help="passes over the images (100; else until --minutes...)")
    add("--minutes", metavar="M", type=positive_number(1e6), help="wall-clock budget of the whole run, start-up included")
    add("--max-steps", metavar="N", type=whole_number(1), help="stop after N optimiser steps in all")
    add("--save-minutes", metavar="M", type=positive_number(1e6), default=10, help="longest time between checkpoints (10)")
    add("--lr", metavar="X", type=positive_number(1), default=8e-3, help="highest learning rate (0.008)")
    add("--timesteps", metavar="T", type=whole_number(10, 10_000), default=1000, help="of the diffusion (1000)")
    add("--seed", metavar="S", type=whole_number(0), default=0, help="fixes weights, order, noise and samples (0)")
    add("--device", choices=("cuda", "mps", "cpu"), help="(the first of these that is there)")
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="(the fastest that trains well)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="use torch.compile (no)")
    add("--demo", action="store_true", help="no images needed: train on drawn faces, everything in results/demo")
    add("--sample", metavar="N", type=whole_number(1), help="no training: draw N images into results/samples")
    add("--sample-steps", metavar="K", type=whole_number(1), default=30, help="network evaluations per image (30)")
    return parser


def read_settings(argv):
    """(settings, checkpoint to go on from or None): the command line, completed by the checkpoint, then by defaults."""
    parser = build_parser()
    args = parser.parse_args(argv)
    untouched = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = {name: value for name, value in vars(parser.parse_args(argv, untouched)).items() if value is not None}
    if args.demo and given.keys() & {"dataroot", "checkpoint"}:
        parser.error("--demo draws its own faces and keeps all in results/demo: leave --dataroot and --checkpoint out")

    folder = pathlib.Path(args.results or HERE / "results", "demo") if args.demo else HERE
    args.checkpoint = pathlib.Path(args.checkpoint or folder / "model_checkpoint.pth")
    with first_process_first():
        if not args.sample:
            check_writable(args.checkpoint.parent)
            args.lock = lock(args.checkpoint)
        saved = read_checkpoint(args.checkpoint)
    config = dict(saved["config"]) if saved else {}
    differ = [name for name in NETWORK if saved and given.get(name, config[name]) != config[name]]
    if differ:
        changes = [f"{flag(name)} {shown(config[name])} there, {shown(given[name])} here" for name in differ]
        raise UserError(f"{args.checkpoint} holds another network ({', '.join(changes)}): leave "
                        f"{' and '.join(map(flag, differ))} out to go on with it, or begin anew with --checkpoint NEW.pth")
    if given.keys() & set(LIMITS):
        config = {name: value for name, value in config.items() if name not in LIMITS}
    vars(args).update(config | given | {"checkpoint": args.checkpoint})
    if not (args.epochs or args.minutes or args.max_steps):
        vars(args).update({"minutes": DEMO["minutes"]} if args.demo else {"epochs": 100})
    if args.demo and not saved and "image_size" not in given:
        args.image_size = DEMO["size"]
    args.device = choose_device(args.device)
    args.channels = args.channels or default_channels(args.device, args.image_size)
    args.config = {name: vars(args)[name] for name in STORED}
    halved = len(args.channels) - 1
    if args.image_size % 2**halved:
        raise UserError(f"--image-size {args.image_size} cannot be halved {halved} times, as --channels "
                        f"{shown(args.channels)} would need: give fewer channels or another size")

    args.results = pathlib.Path(args.results or HERE / "results", "demo" if args.demo else "")
    args.dataroot = args.results / "faces" if args.demo else pathlib.Path(args.dataroot or HERE / "fake_face")
    return args, saved


def flag(name):
    return "--" + name.replace("_", "-")


def shown(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def duration(seconds):
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {round(seconds) % 60} s"


def say(line):
    """A line that stays, above the progress bar if there is one; of several processes the first one talks."""
    if RANK == 0:
        tqdm.write(line)


def join_processes():
    """Make one group of the processes that torchrun has started."""
    store, *_ = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")  # else torchrun's restarts find addresses of dead processes
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", rank=RANK, world_size=PROCESSES,
                            store=dist.PrefixStore(f"attempt {attempt}", store),
                            timeout=datetime.timedelta(days=1))  # decoding and drawing are waited for


@contextlib.contextmanager
def first_process_first():
    """Of several processes, the first one runs the block alone, then all others do."""
    if PROCESSES > 1 and RANK > 0:
        dist.all_reduce(torch.zeros(1))
    yield
    if PROCESSES > 1 and RANK == 0:
        dist.all_reduce(torch.zeros(1))


def from_first_process(*numbers):
    """These numbers as the first process has them, in every process: what depends on a clock or a signal is its to tell."""
    if PROCESSES > 1:
        told = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(told, 0)
        numbers = told.tolist()
    return numbers


def track(items, total, what):
    """Pass `items` on: behind a progress bar on a terminal, with a plain line every 30 s elsewhere."""
    bar = tqdm(items, total=total, desc=what, unit="img", leave=False, disable=None if RANK == 0 else True)
    said = time.time()
    for done, item in enumerate(bar, 1):
        yield item
        if bar.disable and time.time() - said > 30:
            say(f"{what}: {done} of {total}")
            said = time.time()


def check_writable(folder):
    """Make `folder` if need be; UserError at once, not after hours, where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): "
                        "name another with --results or --checkpoint") from None


def lock(path):
    """An open file whose lock holds the checkpoint at `path` for this run; UserError where another run has it.

    The system lets go of the lock when the process ends, however it ends.
    """
    if RANK > 0:
        return None
    file = path.with_name(f".{path.name}.lock").open("a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is training {path} at this moment: let it finish or stop it, or begin another with "
                        "--checkpoint NEW.pth") from None
    except OSError:  # a network drive that knows no locks
        return file
    for left_over in path.parent.glob(f".{path.name}.*.tmp"):  # by a run that was killed
        left_over.unlink()
    return file


@contextlib.contextmanager
def replacing(path):
    """Yield a file to write; it appears under `path` whole, or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left_over in path.parent.glob(f".{path.name}.*.tmp"):  # by a run that was killed
        with contextlib.suppress(OSError):
            if time.time() - left_over.stat().st_mtime > 3600:
                left_over.unlink()
    try:
        with open(unfinished, "w+b") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- data ----

Image.init()
FORMATS = {"AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP"}
FORMATS = sorted(FORMATS & Image.OPEN.keys())  # the rest of what Pillow reads is no photographs, or runs other programs
SUFFIXES = (".heic", ".heif", *(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS))
MAX_PIXELS = 64_000_000
HELD_OUT_ONE_IN = 20


def generator(*key, device="cpu"):
    """A random generator that depends on `key` alone, so that any moment of a run can be repeated from its number."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def read_image(path, size):
    """First frame of an image file, upright, over white, centre-cropped: (size, size, 3) uint8. Raises what Pillow does."""
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"claims {image.width} x {image.height} pixels")
        image.draft(None, (2 * size, 2 * size))  # a JPEG is scaled while it is decoded, to no less than twice the need
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits a channel: Pillow would clip them
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return np.asarray(image)


def decode(path, size):
    """read_image for any file whatever: (pixels, "") or (None, the reason to skip it)."""
    try:
        if not os.path.isfile(path):
            return None, "a folder" if os.path.isdir(path) else "not a file"
        return (read_image(path, size), "") if os.path.getsize(path) else (None, "empty")
    except UnidentifiedImageError:
        return None, "not an image that Pillow can read"
    except Exception as error:  # broken files make Pillow's decoders raise almost anything
        return None, getattr(error, "strerror", None) or str(error) or type(error).__name__


@contextlib.contextmanager
def quiet():
    """While images are read: no warnings, nor what C libraries say of broken ones to the terminal; a progress bar stays."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with warnings.catch_warnings(), os.fdopen(os.dup(2), "w") as terminal, open(os.devnull, "w") as nowhere:
        warnings.simplefilter("ignore")
        os.dup2(nowhere.fileno(), 2)
        try:
            with contextlib.redirect_stderr(terminal):
                yield
        finally:
            os.dup2(terminal.fileno(), 2)


def list_files(root):
    """Sorted "name bytes modified", name relative to `root`, of every file below it, through links, but nothing hidden."""
    files, walked, folders = [], set(), [""]
    for folder in folders:  # which grows on the way
        with contextlib.suppress(OSError):  # a folder that cannot be read
            about = os.stat(os.path.join(root, folder))
            entries = [] if (about.st_dev, about.st_ino) in walked else os.scandir(os.path.join(root, folder))
            walked.add((about.st_dev, about.st_ino))  # for a link that leads back up
            for entry in entries:
                name, size, modified = os.path.join(folder, entry.name), 0, 0
                if entry.name.startswith("."):
                    continue
                with contextlib.suppress(OSError):  # a link to nowhere, or gone since
                    if entry.is_dir():
                        folders.append(name)
                        if not name.lower().endswith(SUFFIXES):
                            continue
                    elif entry.is_file():
                        size, modified = entry.stat().st_size, entry.stat().st_mtime_ns
                files.append(f"{name} {size} {modified}")
    return sorted(files)


def open_cache(path, size):
    """(index, pixels) of a cache file; ({}, None) where there is none that is whole and of this image size."""
    try:
        with zipfile.ZipFile(path) as file:
            entry = file.getinfo("pixels")
            if entry.compress_type != zipfile.ZIP_STORED or file.testzip():
                return {}, None
            index = json.loads(file.read("index.json"))
        shape = (sum(not reason for reason in index.values()), size, size, 3)
        with open(path, "rb") as file:
            file.seek(entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        if math.prod(shape) != entry.file_size:
            return {}, None
        return index, np.memmap(path, np.uint8, "c", start, shape)
    except Exception:  # what is in a damaged file can make the readers raise almost anything
        return {}, None


def write_cache(path, size, root, files, index, pixels):
    """Write the cache of `files`: what an older cache (`index`, `pixels`) knows of them is copied, the rest decoded."""
    rows = {file: row for row, file in enumerate(file for file, reason in index.items() if not reason)}

    def read(file):
        if file in index:
            return pixels[rows[file]] if file in rows else None, index[file]
        return decode(os.path.join(root, file.rsplit(" ", 2)[0]), size)

    written, interrupt = {}, None
    with replacing(path) as out, zipfile.ZipFile(out, "w") as archive, ThreadPool(os.cpu_count()) as pool, quiet():
        parts = (pool.map(read, files[first : first + 256], 4) for first in range(0, len(files), 256))  # few in memory
        images = track(itertools.chain.from_iterable(parts), len(files), f"reading images at {size} px")
        try:
            with archive.open("pixels", "w", force_zip64=True) as stream:
                for file, (image, reason) in zip(files, images):
                    if image is not None:
                        stream.write(image.data)
                        release(pixels)
                    written[file] = reason
        except KeyboardInterrupt as stopped:  # what is done is kept: the next start goes on from it
            interrupt = stopped
        archive.writestr("index.json", json.dumps(written))
    if interrupt:
        raise interrupt


def release(pixels):
    """Keep what was read of memory-mapped `pixels` out of this process's memory: the system's page cache has it."""
    if pixels is not None and hasattr(pixels._mmap, "madvise"):
        pixels._mmap.madvise(mmap.MADV_DONTNEED)


def load_images(root, size, results):
    """Every good image below `root`, decoded once, then kept in a cache file that follows the folder.

    The cache is in `root`, or in `results` where `root` cannot be written. It is a zip file, uncompressed, of "pixels",
    (N, size, size, 3) uint8, and "index.json", {"name bytes modified": reason to skip it or ""} in the same order, where
    modified is in ns. It is only ever replaced whole, so neither a kill nor a second training can spoil it, and a start
    compares all of it with the zip file's checksums (2 GB/s) before it believes it.

    Returns (names, memory-mapped pixels in that order, {name: reason} of the skipped, path of the cache).
    """
    files = list_files(root)
    places = [pathlib.Path(folder, f".faces_{size}px.cache") for folder in (root, results)]
    path, (index, pixels) = max(((path, open_cache(path, size)) for path in places), key=lambda found: len(found[1][0]))
    if list(index) != files:
        for path in places:
            try:
                write_cache(path, size, root, files, index, pixels)
                break
            except OSError as error:
                trouble = error
        else:
            raise UserError(f"the image cache can be written neither in {root} nor in {results}: {trouble}")
        index, pixels = open_cache(path, size)
    reasons = {file.rsplit(" ", 2)[0]: reason for file, reason in index.items()}
    names = [name for name, reason in reasons.items() if not reason]
    skipped = {name.encode(errors="backslashreplace").decode(): reason for name, reason in reasons.items()
               if reason and name.lower().endswith(SUFFIXES)}
    if len(names) < 2:
        raise UserError(f"{root} holds {len(names) or 'no'} usable image{'s' * (len(names) != 1)}"
                        f"{f' and {len(skipped)} that are not' if skipped else ''}: run download_images.py to fetch faces, "
                        "or name a folder of images with --dataroot (--demo needs none)")
    return names, pixels, skipped, path


def split(names):
    """Row numbers (train, held out): the hash of its name decides, so an image keeps its side as the folder grows."""
    hashes = np.array([zlib.crc32(os.fsencode(os.path.basename(name))) for name in names])
    held_out = hashes % HELD_OUT_ONE_IN == 0
    held_out[hashes.argmin()] |= not held_out.any()
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


class Faces:
    """The cached pixels as batches on a device: kept on the card where they fit it easily, else read as needed."""

    def __init__(self, pixels, device):
        self.device, self.mapped = device, pixels
        self.pixels = torch.from_numpy(pixels)
        if device.type == "cuda" and self.pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
            self.pixels = self.pixels.to(device)

    def batch(self, rows, flip=None):
        """Images x_0 (B, 3, S, S) in [-1, 1], channels last, of `rows` (B,), mirrored where `flip` (B,) is True."""
        images = self.pixels[rows.to(self.pixels.device)]
        release(self.mapped)
        if self.device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()
        images = images.to(self.device, non_blocking=True)
        if flip is not None:
            images = torch.where(flip[:, None, None, None], images.flip(2), images)
        return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


# ---------------------------------------------------------------------------------------------- forward diffusion ----


def linear_beta_schedule(timesteps):
    """Betas (T,), float64, that rise linearly (Ho et al. 2020, section 4), for any T from 10 up.

    The paper's 1e-4 to 0.02 are for T = 1000. With fewer steps each has to add more noise, else part of the image is
    left at the end and samples, which start from pure noise, come out washed; so the ends are scaled by 1000 / T.
    The product of 1 - beta is below 1e-4 for every T.
    """
    scale = 1000 / timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64).clamp(max=0.999)


def forward_diffusion(x_0, t, alphas_cumprod, noise=None):
    """Noise images to their timesteps at once: x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (Ho et al. 2020, eq. 4).

    x_0 (B, 3, S, S), t (B,) in [0, T), alphas_cumprod (T,) = cumprod(1 - betas). Returns (x_t, noise), shaped as x_0.
    """
    if noise is None:
        noise = torch.randn_like(x_0)
    a_t = alphas_cumprod[t][:, None, None, None]
    return (a_t.sqrt() * x_0 + (1 - a_t).sqrt() * noise).to(x_0.dtype), noise


# -------------------------------------------------------------------------------------------------------- network ----


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
    """Two convolutions around which x passes unchanged; in between, the time scales and shifts every channel."""

    def __init__(self, c_in, c_out, c_time):
        super().__init__()
        self.norm = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(c_time, 2 * c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # each block begins as the identity: deep networks then train from step one
        nn.init.zeros_(self.conv2.bias)
        self.match = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm(x)))
        h = self.conv2(F.silu(h * (1 + scale) + shift))
        return self.match(x) + h


class SimpleUnet(nn.Module):
    """Predicts the noise in x_t. A contracting path halves the image and deepens its features at each of `channels`; a
    bottleneck; an expanding path doubles it again, at each resolution handed the contracting path's features (skip
    connections, Ronneberger et al. 2015) and, in every block, the time.

    The output F of these layers becomes noise as sqrt(1 - a_t) x_t + sqrt(a_t) F, with a_t from alphas_cumprod: at the
    noisy end x_t itself is the best guess of the noise, and no layer has to copy it there (F is the v of Salimans & Ho
    2022, arXiv:2202.00512). `image_size` (px, divisible by 2 as often as it is halved) and `timesteps` are what it is
    trained for: sample() and load_model() read them.
    """

    def __init__(self, channels=(32, 32, 64, 192), image_size=64, timesteps=1000):
        super().__init__()
        self.image_size, self.timesteps = image_size, timesteps
        self.guides = ()  # for sample(): this network as it was earlier. A tuple, so that it is no part of the weights
        c_time = 256
        self.time = nn.Sequential(SinusoidalPositionEmbeddings(64), nn.Linear(64, c_time), nn.SiLU(),
                                  nn.Linear(c_time, c_time), nn.SiLU())
        self.first = nn.Conv2d(3, channels[0], 3, padding=1)
        narrow, wide = channels[:-1], channels[1:]
        self.down = nn.ModuleList(Block(c, c, c_time) for c in channels)
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(narrow, wide))
        self.bottleneck = nn.ModuleList(Block(channels[-1], channels[-1], c_time) for _ in range(2))
        self.up = nn.ModuleList(Block(2 * c, c, c_time) for c in channels)
        self.grow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(narrow, wide))
        self.last = nn.Sequential(nn.GroupNorm(8, channels[0]), nn.SiLU(), nn.Conv2d(channels[0], 3, 3, padding=1))
        nn.init.zeros_(self.last[-1].weight)
        alphas_cumprod = torch.cumprod(1 - linear_beta_schedule(timesteps), 0).float()
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    def forward(self, x, t):
        """x (B, 3, S, S) in about [-1, 1], t (B,) integer timesteps, to the predicted noise (B, 3, S, S)."""
        x_t, time, skips = x, self.time(t), []
        x = self.first(x.contiguous(memory_format=torch.channels_last))
        for level, block in enumerate(self.down):
            x = block(x, time)
            skips.append(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
        for block in self.bottleneck:
            x = block(x, time)
        for level in reversed(range(len(self.up))):
            x = self.up[level](torch.cat((x, skips[level]), dim=1), time)
            if level > 0:
                x = F.interpolate(self.grow[level - 1](x), scale_factor=2)
        a_t = self.alphas_cumprod[t][:, None, None, None]
        return (1 - a_t).sqrt() * x_t + a_t.sqrt() * self.last(x)


# ------------------------------------------------------------------------------------------------------- sampling ----

SAMPLERS = {  # (eta, order): how much of the noise is drawn anew at each step, how many estimates of x_0 make a step
    "ddpm": (1, 1),  # ancestral sampling, Ho et al. 2020, algorithm 2
    "ddim": (0, 1),  # deterministic, Song et al. 2021 (arXiv:2010.02502)
    "dpm++": (0, 2),  # DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095)
    "sde-dpm++": (1, 2),  # its stochastic form
}
GUIDANCE, GUIDE_AT = 1, 0.6  # how far a guide is left behind; it is the network after that part of training


@torch.no_grad()
def sample(model, count=64, steps=30, sampler="dpm++", seed=0, first=0, precision="fp32", on_step=None,
           guidance=GUIDANCE):
    """Draw `count` images, (count, 3, S, S) float32 in [-1, 1], from a SimpleUnet that has been trained.

    Every sampler of SAMPLERS is the same step from x_t to the less noisy x_s, with a = sqrt(alphas_cumprod) for the
    image's share, b = sqrt(1 - alphas_cumprod) for the noise's, and q = (b_s / a_s) / (b_t / a_t):

        x_s = (b_s / b_t) q^eta x_t  +  a_s (1 - q^(1 + eta)) x_0  +  b_s sqrt(1 - q^(2 eta)) fresh noise

    where x_0, what the network takes the clean image to be, is clipped to [-1, 1] and, for order 2, extrapolated from
    this and the last estimate. eta = 1, order 1 over all timesteps is exactly Ho et al.'s ancestral sampling.

    Where the model has a guide, itself as it was earlier in training, the predicted noise is noise + guidance (noise -
    guide's noise): what training has mended so far is mended further ("autoguidance", Karras et al. 2024, arXiv:2406.02507).
    As it takes two evaluations a step, there are half as many steps; guidance=0 leaves the guide out.

    `steps` is the number of network evaluations, at timesteps that lie quadratically closer towards the end, where the
    detail is decided (Song et al. 2021, appendix D.2). Image i of a `seed`, counted from `first`, is the same however many
    are drawn with it. `on_step(step, x)`, if given, is called with the images after each step; what is true ends it.
    """
    device = next(model.parameters()).device
    eta, order = SAMPLERS[sampler]
    streams = [generator("sample", seed, first + number, device=device) for number in range(count)]
    guides = [guide.to(device) for guide in getattr(model, "guides", ()) if guidance and steps > 1]
    steps //= 1 + len(guides)

    def fresh_noise():
        size = model.image_size
        noise = torch.stack([torch.randn(3, size, size, generator=stream, device=device) for stream in streams])
        return noise.contiguous(memory_format=torch.channels_last)

    alphas_cumprod = torch.cumprod(1 - linear_beta_schedule(model.timesteps), 0)
    if steps < model.timesteps:
        visited = (torch.linspace(1, 0, steps).square() * (model.timesteps - 1)).round().long().unique().flip(0).tolist()
    else:
        visited = range(model.timesteps - 1, -1, -1)
    a = [*alphas_cumprod[list(visited)].sqrt().tolist(), 1.0]  # the last step leads to the clean image
    b = [*(1 - alphas_cumprod[list(visited)]).sqrt().tolist(), 0.0]
    x, x_0_before, q_before = fresh_noise(), None, None
    for step, t in enumerate(visited):
        at = torch.full((count,), t, device=device)
        with autocast(device, precision):
            noise = model(x, at).float()
            for guide in guides:
                noise = noise + guidance * (noise - guide(x, at).float())
        x_0 = ((x - b[step] * noise) / a[step]).clamp(-1, 1)
        q = (b[step + 1] / a[step + 1]) / (b[step] / a[step])
        estimate = x_0
        if order == 2 and step and q > 0:
            estimate = x_0 + (x_0 - x_0_before) * math.log(q) / math.log(q_before) / 2
        x = (b[step + 1] / b[step]) * q**eta * x + a[step + 1] * (1 - q ** (1 + eta)) * estimate
        if eta and q > 0:
            x = x + b[step + 1] * math.sqrt(1 - q ** (2 * eta)) * fresh_noise()
        x_0_before, q_before = x_0, q
        if on_step and on_step(step, x):
            break
    return x.cpu()


def autocast(device, precision):
    """The context in which the network computes in `precision` ("fp32", "bf16" or "fp16") on `device`."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, types.get(precision), enabled=precision in types)


# ------------------------------------------------------------------------------------------------------- pictures ----

COLUMNS = ("epoch", "step", "images_seen", "train_loss", "heldout_loss", "lr", "images_per_second", "seconds")


def to_image(x):
    """A picture (3, H, W) in [-1, 1] as a Pillow image."""
    return Image.fromarray(((x.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy())


def save_grid(images, path, columns=8):
    """Images (N, 3, S, S), or a list of N, in [-1, 1] as one PNG, `columns` a row, padding 2."""
    with replacing(path) as file:
        to_image(make_grid(images, nrow=columns, padding=2, pad_value=-1)).save(file, "PNG")


def save_denoising(stages, path, columns=10):
    """Some of the `stages` (each (N, 3, S, S), noisiest first) side by side, one row per sample."""
    chosen = [stages[round(number * (len(stages) - 1) / (columns - 1))] for number in range(columns)]
    save_grid(torch.stack(chosen, dim=1).flatten(0, 1), path, columns)


def grids(folder, history):
    """[epoch, step, file name] of every grid of this run that is in `folder`, oldest first."""
    there = set(os.listdir(folder))
    named = [[epoch, step, f"epoch_{epoch}_step_{step}.png"] for epoch, step, *_ in history]
    return [grid for grid in named if grid[2] in there]


def save_animation(grids_drawn, folder, frames=60, side=1100):
    """progress.webp: at most so many of the grids, evenly chosen, each at most so many pixels wide."""
    count = min(frames, len(grids_drawn))
    pictures = []
    for number in range(count):
        with Image.open(folder / grids_drawn[number * (len(grids_drawn) - 1) // max(count - 1, 1)][2]) as picture:
            whole = max(1, round(540 / picture.width))  # small pictures are shown larger, each pixel as a square
            pictures.append(picture.convert("RGB").resize((whole * picture.width, whole * picture.height), 0))
            pictures[-1].thumbnail((side, side))
    with replacing(folder / "progress.webp") as file:
        pictures[0].save(file, "WEBP", save_all=True, append_images=pictures[1:], loop=0, quality=75,
                         duration=[150] * (count - 1) + [2500])


def nearest(images, pixels):
    """Each of `images` (N, 3, S, S) followed by the training image closest to it, as it is or mirrored: (2N, 3, S, S).

    The distance is the mean squared difference of pixels; `pixels` is (M, S, S, 3) uint8.
    """
    flat = torch.cat((images, images.flip(3))).flatten(1)
    least, closest = torch.full((len(flat),), math.inf), torch.zeros(len(flat), 3 * pixels.shape[1] ** 2)
    for start in range(0, len(pixels), 1000):
        some = torch.from_numpy(pixels[start:start + 1000]).permute(0, 3, 1, 2).flatten(1) / 127.5 - 1
        distance, which = torch.cdist(flat, some).min(dim=1)
        nearer = distance < least
        least[nearer], closest[nearer] = distance[nearer], some[which[nearer]]
    count, closest = len(images), closest.view(-1, *images.shape[1:])
    mirrored = (least[count:] < least[:count])[:, None, None, None]
    return torch.stack((images, torch.where(mirrored, closest[count:].flip(3), closest[:count])), dim=1).flatten(0, 1)


def write_metrics(history, folder):
    """metrics.csv, whole, so that no row is ever cut or there twice."""
    with replacing(folder / "metrics.csv") as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        csv.writer(text).writerows([COLUMNS, *history])


def write_page(folder, **news):
    """run.js, what index.html shows: one call, since a page that is opened from disk can load a script, but no data.

    What `news` does not name stays as it was in the file.
    """
    data = {}
    with contextlib.suppress(OSError, ValueError):
        data = json.loads((folder / "run.js").read_text().removeprefix("show(").removesuffix(");\n"))
    pictures = {name: f"{name}.png" if (folder / f"{name}.png").exists() else None
                for name in ("denoising", "nearest", "samples")}
    with replacing(folder / "run.js") as file:
        file.write(f"show({json.dumps(data | news | pictures | {'updated': time.time()})});\n".encode())


def save_curve(history, path):
    """The loss curve: one point an epoch, against images seen."""
    from matplotlib.figure import Figure  # here, since it takes half a second to import

    table = dict(zip(COLUMNS, zip(*history, strict=True), strict=True))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    style = {"marker": "."} if len(history) < 30 else {}
    axes.plot(table["images_seen"], table["train_loss"], label="training images", color="tab:blue", **style)
    axes.plot(table["images_seen"], table["heldout_loss"], label="held-out images (averaged weights)",
              color="tab:orange", **style)
    axes.set(xlabel="images seen", ylabel="L1 error of the predicted noise", xlim=(0, None))
    lowest, median = min(table["train_loss"] + table["heldout_loss"]), sorted(table["train_loss"])[len(history) // 2]
    axes.set_ylim(0.9 * lowest, max(1.3 * median, 1.05 * table["heldout_loss"][-1]))  # the first fall is off the top
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


# ----------------------------------------------------------------------------------------------------- checkpoint ----

FRESH_RUN = {"epoch": 0, "step": 0, "images_seen": 0, "images_in_epoch": 0, "losses": [0.0, 0.0], "seconds": 0.0,
             "history": [], "finished": False}  # epoch: whole ones; losses: sum and number in this epoch; history: rows


def before(path):
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def checksum(state, crc=0):
    """CRC-32 of a nested state with all its names, types and shapes: nothing in it can be bent or swapped unseen."""
    if isinstance(state, dict):
        for name, value in state.items():
            crc = checksum(value, zlib.crc32(repr(name).encode(), crc))
        return crc
    if isinstance(state, torch.Tensor):
        crc = zlib.crc32(f"{state.dtype} {tuple(state.shape)}".encode(), crc)
        return zlib.crc32(state.contiguous().view(-1).view(torch.uint8).numpy(), crc)
    return zlib.crc32(repr(state).encode(), crc)


def snapshot(state):
    """A copy of a nested state on the CPU, which training does not change any more."""
    if isinstance(state, dict):
        return {name: snapshot(value) for name, value in state.items()}
    return state.detach().to("cpu", copy=True) if isinstance(state, torch.Tensor) else copy.deepcopy(state)


def save_checkpoint(path, state):
    """Write `state`, a nested dict of CPU tensors, whole or not at all, and keep the checkpoint before.

    It is flushed to disk and read back before it takes the place of the old one. OSError or RuntimeError where that
    fails, UserError where a weight is not finite: what stands at `path` then stays.
    """
    state = {name: value for name, value in state.items() if name != "checksum"}
    for part in ("model", "ema"):
        if not all(weight.isfinite().all() for weight in state[part].values()):
            raise UserError(f"the weights have grown beyond all numbers: {path} is sound, go on from it with a lower --lr")
    with replacing(path) as file:
        torch.save({**state, "checksum": checksum(state)}, file)
        file.flush()
        os.fsync(file.fileno())
        try:
            read_whole(file.name)
        except Exception as error:
            raise OSError(f"it could not be read back: {error}") from None
        if path.exists():
            spare = path.with_name(f".{path.name}.previous.tmp")
            spare.unlink(missing_ok=True)
            try:
                os.link(path, spare)  # a second name, so that there is a checkpoint at `path` at every moment
                os.replace(spare, before(path))
            except OSError:  # a file system without links: at every moment there is one under one of the two names
                os.replace(path, before(path))


def read_whole(path):
    """The checkpoint in the file `path`, which cannot run code; what is cut, bent, foreign or a bomb raises any Exception."""
    with zipfile.ZipFile(path) as file:
        if sum(entry.file_size for entry in file.infolist()) > os.path.getsize(path):
            raise ValueError("it claims to hold more than it has")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if lacking := {"model", "ema", "optimizer", "scaler", "config", "checksum", *FRESH_RUN} - saved.keys():
        raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    if saved.pop("checksum") != checksum(saved):
        raise ValueError("it was damaged or altered: its checksum does not fit")
    return saved


def read_checkpoint(path):
    """The dict at `path`, or the one before where that is missing or broken; None where there is none yet.

    A broken one is set aside, never overwritten. Raises UserError where there are files, but none that can be used.
    """
    troubles = {}
    for candidate in (path, before(path)):
        if not candidate.exists():
            continue
        try:
            saved = read_whole(candidate)
        except Exception as error:  # what is in a broken or foreign file can make the readers raise anything
            troubles[candidate] = (str(error) or type(error).__name__).partition("\n")[0]
            continue
        for bad, trouble in troubles.items():
            aside = bad.with_name(f"{bad.name}.broken-{time.time():.0f}")
            with contextlib.suppress(OSError):  # in a folder that cannot be written it stays; --sample needs no more
                os.replace(bad, aside)
            say(f"{bad} cannot be read ({trouble}): it is set aside as {aside.name}, {candidate.name} is used")
        return saved
    for bad, trouble in troubles.items():
        raise UserError(f"{bad} is not a checkpoint that this program can go on from ({trouble}): move it away to "
                        "begin anew, or name another with --checkpoint")
    return None


def build_network(config, weights=None):
    """A SimpleUnet of the settings `config`, with `weights` (a state dict) if any; UserError where they do not fit."""
    model = SimpleUnet(**{name: config[name] for name in NETWORK})
    try:
        model.load_state_dict(weights or model.state_dict())
    except RuntimeError:
        raise UserError("the checkpoint's weights do not fit its own settings, so it comes from another version of "
                        "this program: begin a new one with --checkpoint NEW.pth") from None
    return model


def load_model(path, device="cpu"):
    """The averaged (EMA) SimpleUnet of the checkpoint at `path`, ready to evaluate; UserError where there is none."""
    return averaged_network(read_checkpoint(pathlib.Path(path)), path, device)


def averaged_network(saved, path, device):
    """load_model for a checkpoint that has been read from `path` already."""
    if not saved:
        raise UserError(f"there is no checkpoint {path}: train first, or name another with --checkpoint")
    model, guide = (build_network(saved["config"], weights).to(device, memory_format=torch.channels_last).eval()
                    .requires_grad_(False) for weights in (saved["ema"], saved.get("guide", saved["ema"])))
    model.guides = (guide,)
    return model


# ------------------------------------------------------------------------------------------------------- training ----

WARM_UP = 0.01  # share of the run in which the learning rate rises, before it falls to zero along a straight line
EMA_POWER = 12  # the weights of step i count as i ** 12 in the average: about the last tenth of a run of any length
DRAWING_SHARE, ANIMATION_SHARE = 0.04, 0.003  # what pictures along the way may take of the time
SAVING_SHARE = 0.05  # writing a checkpoint, beside training, may take this much of the time
RETRY_SECONDS, PAGE_SECONDS = 30, 5
CPU_PIXELS = 128 * 64**2  # in one piece through the network: two cores take some seconds for it
HELD_OUT_MOST = 512
BAD_STEPS = 20


def choose_device(name):
    """The torch.device for --device; UserError where PyTorch has none of that name."""
    there = [kind for kind, found in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()),
                                      ("cpu", True)) if found]
    if name and name not in there:
        raise UserError(f"PyTorch finds no {name} device here: leave --device out to use {there[0]}")
    device = torch.device(name or there[0])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))  # each process of torchrun has its card
        torch.cuda.set_device(device)
    return device


def default_channels(device, image_size):
    """The width of the network at each resolution: on a CPU such that faces come within minutes, on a card within hours."""
    if device.type == "cuda":
        return [64, 128, 256, 512]
    return [32, 64, 64, 256] if image_size <= 32 else [32, 32, 64, 192]


def choose_precision(name, device):
    """The number format for --precision: of those that train well, the one the device is fastest in."""
    if name != "auto":
        return name
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
    fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if fast else "fp32"


# a, b, c of each iteration S <- a S + b S^3 + c S^5 are those that bring singular values of 0.01 to 1 closest to 1 in three,
# found as in Amsel et al. 2025 (arXiv:2505.16932, section 3): they end between 0.73 and 1.27.
NEWTON_SCHULZ = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for convolutions, Adam for all other weights.

    A convolution's weight is the matrix W (outputs, inputs x 3 x 3). Its momentum M = U S V' is replaced by about U V', by
    three Newton-Schulz iterations in `dtype`, so that a step is as long in the rare directions as in the common ones: it
    gets as far in one step as Adam in several. With the factor 0.2 sqrt(longer side) (Liu et al. 2025, arXiv:2502.16982)
    its entries are as large as Adam's, and one learning rate serves both.
    """

    def __init__(self, model, lr, dtype, cores):
        plain = {*model.first.parameters(), *model.last.parameters()}  # those meet pixels, whose directions mean something
        matrices = [weight for weight in model.parameters() if weight.ndim == 4 and weight not in plain]
        others = [weight for weight in model.parameters() if weight.ndim != 4 or weight in plain]
        super().__init__([{"params": matrices}, {"params": others, "steps": 0}], {"lr": lr})
        self.dtype, self.cores = dtype, cores
        for weight in matrices:
            self.state[weight]["momentum"] = torch.zeros_like(weight)
        for weight in others:
            self.state[weight].update(mean=torch.zeros_like(weight), square=torch.zeros_like(weight))

    @torch.no_grad()
    def step(self, finite):
        """One update; none where `finite`, a bool tensor on the device so that nothing waits for it, is False."""
        matrices, others = self.param_groups
        keep = finite.float()

        @torch.no_grad()
        def update(weight):
            gradient = torch.where(finite, weight.grad, 0)
            momentum = self.state[weight]["momentum"]
            momentum.mul_(1 - 0.1 * keep).add_(gradient, alpha=0.1)
            x = gradient.lerp_(momentum, 0.9).permute(0, 2, 3, 1).flatten(1).to(self.dtype)  # as it lies in memory
            tall = x.shape[0] > x.shape[1]
            x = x.T if tall else x
            x = x / (x.norm() + 1e-7)
            for a, b, c in NEWTON_SCHULZ:
                gram = x @ x.T
                x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            rate = 0.2 * math.sqrt(max(x.shape)) * matrices["lr"]
            x = ((x.T if tall else x) * keep).reshape(weight.permute(0, 2, 3, 1).shape)
            weight.add_(x.permute(0, 3, 1, 2), alpha=-rate)

        [*self.cores.map(update, matrices["params"])]
        others["steps"] += 1
        weights = others["params"]
        gradients = [torch.where(finite, weight.grad, 0) for weight in weights]
        mean, square = ([self.state[weight][name] for weight in weights] for name in ("mean", "square"))
        torch._foreach_mul_(mean, 1 - 0.1 * keep)
        torch._foreach_add_(mean, gradients, alpha=0.1)
        torch._foreach_mul_(square, 1 - 0.01 * keep)
        torch._foreach_addcmul_(square, gradients, gradients, 0.01)
        size = torch._foreach_sqrt(torch._foreach_div(square, 1 - 0.99 ** others["steps"]))
        torch._foreach_add_(size, 1e-8)
        torch._foreach_addcdiv_(weights, torch._foreach_mul(mean, keep), size,
                                -others["lr"] / (1 - 0.9 ** others["steps"]))


def learning_rate(highest, part):
    """The learning rate when `part` (0 to 1) of the run is over."""
    return highest * min(1, (part + 1e-3) / WARM_UP) * (1 - min(part, 1))


def keep_freed_memory():
    """Let C's allocator keep what a step has freed for the next one. Else the large tensors come from the system each time,
    page by page, which costs up to a tenth of the step. Without glibc (macOS, Windows) this does nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        allocator = ctypes.CDLL(None).mallopt
        for setting, value in ((-4, 0), (-1, -1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX of malloc.h
            allocator(setting, value)


class Cores:
    """The cores of a CPU, each to take its share of the images: that is faster than to have all of them share every
    operation, after which they wait for each other (1.1 times at 32 px on two). A card, or one of several processes, counts
    as one.
    """

    def __init__(self, device, images):
        threads = torch.get_num_threads() if device.type == "cpu" and PROCESSES == 1 else 1
        self.count = max(1, min(threads, images // 32))  # with fewer images each, sharing is as fast
        self.threads = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=[threads // self.count])
        if device.type == "cpu":
            keep_freed_memory()

    def map(self, function, parts):
        """The results of function(part), in order."""
        return (self.threads.map if self.count > 1 else map)(function, parts)


def slices(begin, end, at_a_time, at_least=1):
    """Even slices of begin to end of at most `at_a_time`, and `at_least` so many of them if there is enough; none of none."""
    count = max(math.ceil((end - begin) / at_a_time), min(at_least, end - begin))
    bounds = [begin + (end - begin) * number // max(count, 1) for number in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(bounds)]


def held_out_loss(model, faces, rows, cores, at_a_time, precision):
    """Mean L1 error on held-out images, with noise and (evenly spread) timesteps that are the same every time."""
    rows, device = rows[:HELD_OUT_MOST], faces.device
    timesteps = ((torch.arange(len(rows)) + 0.5) / len(rows) * model.timesteps).long().to(device)

    @torch.no_grad()
    def error(part):
        x_0, t = faces.batch(rows[part]), timesteps[part]
        noise = torch.stack([torch.randn(image.shape, generator=generator("held-out", number, device=device), device=device)
                             for number, image in enumerate(x_0, part.start)])
        x_t, _ = forward_diffusion(x_0, t, model.alphas_cumprod, noise)
        with autocast(device, precision):
            predicted = model(x_t, t)
        return F.l1_loss(predicted.float(), noise, reduction="sum").item() / noise[0].numel()

    return sum(cores.map(error, slices(0, len(rows), at_a_time, cores.count))) / len(rows)


def draw_images(model, cores, first, count, at_a_time, steps, seed, precision, on_step=None, guidance=GUIDANCE):
    """sample(), of which every core draws a share; `on_step` is called for the first share of them only."""

    def draw(part):
        return sample(model, part.stop - part.start, steps, seed=seed, first=part.start, precision=precision,
                      on_step=on_step if part.start == first else None, guidance=guidance)

    return torch.cat([*cores.map(draw, slices(first, first + count, at_a_time, cores.count))])


@contextlib.contextmanager
def stop_requests():
    """A list that Ctrl-C and SIGTERM add to, so that what is done is saved; the second of them ends the program at once."""
    requests = []

    def on_signal(number, frame):
        requests.append(number)
        if len(requests) > 1:
            os._exit(130)  # files only ever appear whole, so this harms none

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Saver:
    """Writes checkpoints in the background of training. One that fails is a warning, and soon tried again."""

    def __init__(self, path, seconds):
        self.path, self.seconds, self.thread, self.writing = path, seconds, ThreadPoolExecutor(1), None
        self.cost, self.begun, self.due = 0.0, time.time(), time.time() + seconds

    def write(self, state):
        begun = time.time()
        save_checkpoint(self.path, state)
        self.cost = time.time() - begun

    def epoch_over(self):
        """A checkpoint is due, unless writing them would take more than a share of the time: then a little later."""
        self.due = min(self.due, self.begun + self.cost / SAVING_SHARE)

    def save_if_due(self, state):
        """Begin to write what the function `state` returns, when it is time to."""
        if self.writing and self.writing.done():
            error, self.writing = self.writing.exception(), None
            if isinstance(error, UserError):
                raise error
            if error:
                say(f"warning: {self.path} could not be saved ({error}). The one before stays; training goes on and tries "
                    "again. Is the disk full or gone?")
                self.due = time.time() + min(self.seconds, RETRY_SECONDS)
        if not self.writing and time.time() >= self.due:
            self.begun = time.time()
            self.due = self.begun + max(self.seconds - 2 * self.cost, 0)  # it is to be on disk by then, not begun
            self.writing = self.thread.submit(self.write, state())

    def save_last(self, state, tries):
        """Write `state` and wait for it; UserError where that fails `tries` times."""
        self.thread.shutdown()
        for tries_left in reversed(range(tries)):
            try:
                return self.write(state)
            except (OSError, RuntimeError) as error:
                say(f"warning: {self.path} could not be saved ({error})")
                time.sleep(RETRY_SECONDS / 6 if tries_left else 0)
        raise UserError(f"{self.path} could not be saved at the end, the one before is still good: put right what is "
                        "wrong, for instance make room on the disk, and the same command goes on from it")


class Clock:
    """The time that a run has used in all its starts, and what the work beside training costs of it, in seconds."""

    def __init__(self, seconds_before):
        self.seconds_before, self.begun, self.warned = seconds_before, time.time(), 0.0
        self.cost = {"held-out": 0.0, "grid": 0.0, "last grid": 0.0, "curve": 1.0, "animation": 1.0, "metrics": 0.0,
                     "page": 0.0}
        self.spent = dict.fromkeys(self.cost, 0.0)  # cost: of the last time

    def elapsed(self):
        return self.seconds_before + time.time() - START

    def part_used(self, minutes, saving):
        """The share of a budget that is gone, when all that comes after the last step is to fit in it too."""
        after = sum(self.cost.values()) - self.cost["grid"] + saving
        return self.elapsed() / max(60 * minutes - 1.2 * after - 1, 0.1)

    @contextlib.contextmanager
    def timed(self, what):
        """Work beside training: its time is taken, and a disk that is full or gone is no more than a warning."""
        begun = time.time()
        try:
            yield
        except OSError as error:
            if begun - self.warned > RETRY_SECONDS:
                say(f"warning: {what} could not be written ({error}); training goes on")
                self.warned = begun
        self.cost[what] = time.time() - begun
        self.spent[what] += self.cost[what]

    def allows(self, what, share):
        """Whether doing it now keeps it below `share` of the time since training began."""
        return self.spent[what] + self.cost[what] <= share * (time.time() - self.begun)


def images_at_a_time(model, args, precision):
    """How many images of a step go through the network at once: as many as there is memory for, found by trying.

    A step adds up the gradients of as many such parts as it takes, so this changes nothing that is learnt. On the CPU it
    follows from the image size, so that a run repeats to the bit and can be stopped between two parts.
    """
    size, part = args.image_size, math.ceil(args.batch_size / PROCESSES)
    if args.device.type == "cpu":
        return max(1, min(part, CPU_PIXELS // size**2))
    spare = [torch.empty_like(weight) for weight in model.parameters() for _ in range(2)]  # what a whole step needs beside
    while True:
        try:
            x = torch.zeros(part, 3, size, size, device=args.device)
            with autocast(args.device, precision):
                predicted = model(x, torch.zeros(part, dtype=torch.long, device=args.device))
            predicted.float().sum().backward()
            break
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            if part == 1:
                raise UserError(f"{args.device} has not enough memory for one image of {size} px: give a smaller --image-size "
                                "or narrower --channels") from None
        part = math.ceil(part / 2)
        x = predicted = None
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
    del spare
    model.zero_grad(set_to_none=True)
    return part


def compiled(model, args, precision):
    """The network through torch.compile, or as it is, with a word why, where that does not work on this machine."""
    try:
        network = torch.compile(model)
        with autocast(args.device, precision):
            network(torch.zeros(2, 3, args.image_size, args.image_size, device=args.device),
                    torch.zeros(2, dtype=torch.long, device=args.device)).sum().backward()
        return network
    except Exception as error:  # no compiler, or anything a compiler may stumble over
        say(f"compile   does not work here ({str(error).strip().partition(chr(10))[0]}): going on without")
        return model
    finally:
        model.zero_grad(set_to_none=True)


def train(args, saved, precision):
    """Train from the start, or from the checkpoint `saved`, to the end; returns the exit status, 0 done, 130 stopped."""
    device, first_process = args.device, RANK == 0
    with first_process_first():
        names, pixels, skipped, cache = load_images(args.dataroot, args.image_size, args.results)
    train_rows, held_out_rows = split(names)
    del names  # of a million images they would take more memory than all else
    faces, count = Faces(pixels, device), len(train_rows)

    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True  # on a card: the fastest of several ways for each convolution,
    torch.backends.cuda.matmul.allow_tf32 = True  # and TF32 where it is to be float32
    model = build_network(vars(args), saved and saved["model"]).to(device, memory_format=torch.channels_last)
    ema = averaged_network(saved or {"config": vars(args), "ema": model.state_dict()}, args.checkpoint, device)
    guide, = ema.guides
    weights, averages, guide_weights = (list(network.parameters()) for network in (model, ema, guide))
    optimizer = Muon(model, args.lr, torch.bfloat16 if precision == "bf16" else torch.float32, Cores(device, 64))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    run = {name: saved[name] for name in FRESH_RUN} if saved else FRESH_RUN | {"history": []}
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
    losses, bad_steps = torch.tensor(run["losses"], device=device), torch.zeros((), device=device)

    clock, saver = Clock(run["seconds"]), Saver(args.checkpoint, 60 * args.save_minutes)
    batches_left = math.ceil(max(count - run["images_in_epoch"], 0) / args.batch_size)
    epochs_left = (args.epochs or math.inf) - run["epoch"] - 1
    last_step = min(run["step"] + batches_left + epochs_left * math.ceil(count / args.batch_size),
                    args.max_steps or math.inf)

    def progress():
        part = run["step"] / last_step
        return max(part, clock.part_used(args.minutes, saver.cost)) if args.minutes else part

    def seconds_left():
        by_steps = (time.time() - clock.begun) / max(run["step"] - step_before, 1e-9) * (last_step - run["step"])
        return max(0, min(by_steps, 60 * (args.minutes or math.inf) - clock.elapsed()))

    def evaluate():
        with clock.timed("held-out"):
            return held_out_loss(ema, faces, held_out_rows, cores, at_a_time, precision)

    def draw(stop, last):
        steps, stages = args.sample_steps if last else max(1, args.sample_steps // 3), []

        def on_step(step, x):
            stages.append(x[:8].cpu())
            return stop

        epoch, step = run["history"][-1][:2]
        with clock.timed("last grid" if last else "grid"):
            images = draw_images(ema, cores, 0, 64, at_a_time, steps, args.seed, precision, on_step,
                                 GUIDANCE if last else 0)
            if not stop:
                save_grid(images, args.results / f"epoch_{epoch}_step_{step}.png")
                save_denoising(stages, args.results / "denoising.png")
        if not last:
            clock.cost["last grid"] = clock.cost["grid"] * args.sample_steps / steps
        with clock.timed("curve"):
            save_curve(run["history"], args.results / "loss.png")

    def animate():
        with clock.timed("animation"):
            if drawn := grids(args.results, run["history"]):
                save_animation(drawn, args.results)

    def state():
        run.update(seconds=clock.elapsed(), losses=losses.tolist())
        return snapshot({"model": model.state_dict(), "ema": ema.state_dict(), "guide": guide.state_dict(),
                         "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "config": args.config, **run})

    def show(status="training"):
        with clock.timed("page"):
            history = run["history"]
            write_page(args.results, state=status, progress=min(progress(), 1), seconds=clock.elapsed(),
                       seconds_left=seconds_left(), images_per_second=speed(), settings=about, columns=COLUMNS,
                       history=history[::-math.ceil(len(history) / 1000) or -1][::-1], grids=grids(args.results, history),
                       grid={"side": args.image_size, "padding": 2, "per_row": 8, "count": 64})

    def speed():
        return (run["images_seen"] - seen_before) / (time.time() - clock.begun)

    def gradients(rows, stop):
        """Gradients of one step into weights.grad; the mean L1 error of its images, or None when told to stop in between."""
        # All that is random follows from seed and step alone: the same after a restart, and for any number of processes.
        batch, size = len(rows), args.image_size
        stream = generator("step", args.seed, run["step"], device=device)
        flip = torch.rand(batch, generator=stream, device=device) < 0.5
        strata = torch.arange(batch, device=device) + torch.rand(batch, generator=stream, device=device)
        t = (strata / batch * args.timesteps).long().clamp(max=args.timesteps - 1)  # uniform, evenly spread
        noise = torch.randn(batch, size, size, 3, generator=stream, device=device).permute(0, 3, 1, 2)

        begin, end = batch * RANK // PROCESSES, batch * (RANK + 1) // PROCESSES

        def loss_of(part):
            x_t, target = forward_diffusion(faces.batch(rows[part], flip[part]), t[part], model.alphas_cumprod,
                                            noise[part])
            with autocast(device, precision):
                predicted = network(x_t, t[part])
            return (predicted.float() - target).abs().sum() / noise.numel()

        def gradients_of(part):
            if stop:
                return None, None
            loss = loss_of(part)
            return loss.detach(), torch.autograd.grad(scaler.scale(loss), weights)

        error = torch.zeros((), device=device)
        if PROCESSES > 1:
            parts = slices(begin, end, at_a_time) or [slice(0, 1)]  # that one counts nothing, but all must take part
            for part in parts:
                with network.no_sync() if part != parts[-1] else contextlib.nullcontext():
                    loss = loss_of(part) * (end > begin)
                    scaler.scale(loss * PROCESSES).backward()  # processes' gradients are averaged, their errors add up
                error += loss.detach()
            dist.all_reduce(error)
            return error
        sums = None
        for loss, found in cores.map(gradients_of, slices(0, batch, at_a_time, cores.count)):
            if loss is None:
                return None
            error += loss
            sums = torch._foreach_add(sums, found) if sums else found  # in order, so that a run repeats to the bit
        for weight, gradient in zip(weights, sums, strict=True):
            weight.grad = gradient
        return error

    if saved and saved["finished"] and (
            progress() >= 1 or all(vars(args)[name] == saved["config"][name] for name in LIMITS)):
        say(f"This run is finished: {run['epoch']} epochs, {run['step']} steps, {duration(run['seconds'])}. A larger --epochs, "
            "--minutes or --max-steps goes on with it, --sample 64 draws faces, --checkpoint NEW.pth begins anew.")
        return 0
    run["finished"] = False
    cores = Cores(device, args.batch_size)
    at_a_time = math.ceil(images_at_a_time(model, args, precision) / cores.count)
    network = compiled(model, args, precision) if args.compile else model
    if PROCESSES > 1:
        network = nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    run["history"] = [row for row in run["history"] if row[0] <= run["epoch"]]  # an epoch cut short comes again, whole
    about = describe(args, precision, model, len(pixels), skipped, len(held_out_rows), cache, at_a_time * cores.count)
    if first_process:
        for label, text in about:
            say(f"{label:10}{text}")
        write_metrics(run["history"], args.results)
        with contextlib.suppress(OSError):  # it is there already, or was not fetched with the scripts
            shutil.copy(HERE / "results" / "index.html", args.results)
    clock.begun, seen_before, step_before = time.time(), run["images_seen"], run["step"]
    looked_at = shown_at = said_at = clock.begun
    foretold = bad = False

    with stop_requests() as stop:
        while True:
            order = train_rows[torch.randperm(count, generator=generator("order", args.seed, run["epoch"]))]
            rest = order[run["images_in_epoch"]:]
            began, seen_at_beginning = time.time(), run["images_seen"]
            title = f"epoch {run['epoch'] + 1}" + (f" of {args.epochs}" if args.epochs else "")
            bar = tqdm(total=count, initial=run["images_in_epoch"], unit="img", desc=title, leave=False,
                       disable=None if first_process else True)
            for rows in rest.tensor_split(math.ceil(len(rest) / args.batch_size)) if len(rest) else ():
                part, ending = from_first_process(progress(), bool(stop) or bad)
                if ending or part >= 1 and run["step"]:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(args.lr, part)

                loss = gradients(rows, stop)
                if loss is None:
                    optimizer.zero_grad(set_to_none=True)
                    break
                scaler.unscale_(optimizer)
                finite = nn.utils.clip_grad_norm_(weights, 1.0).isfinite() & loss.isfinite()
                optimizer.step(finite)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                run["step"] += 1
                with torch.no_grad():
                    torch._foreach_lerp_(averages, weights, 1 - (1 - 1 / run["step"]) ** EMA_POWER)
                    if part < GUIDE_AT:
                        torch._foreach_copy_(guide_weights, averages)

                run["images_seen"] += len(rows)
                run["images_in_epoch"] += len(rows)
                losses += torch.where(finite, torch.stack((loss, torch.ones_like(loss))), 0)
                bad_steps = torch.where(finite, 0, bad_steps + 1)
                bar.update(len(rows))
                if not first_process:
                    continue
                saver.save_if_due(state)
                now = time.time()
                if not clock.spent["held-out"]:  # until it is known what drawing costs: forward takes a third of a step
                    evaluations = {"held-out": min(len(held_out_rows), HELD_OUT_MOST), "grid": 64 * args.sample_steps / 3,
                                   "last grid": 64 * args.sample_steps}
                    clock.cost.update({what: number / speed() / 3 for what, number in evaluations.items()})
                if now - looked_at > 0.5:  # not at every step: to read from a card is to wait for it
                    looked_at, bad = now, bool(bad_steps >= BAD_STEPS)
                    status = f"loss {losses[0] / losses[1]:.4f}, {duration(seconds_left())} left in all"
                    bar.set_postfix_str(status, refresh=False)
                    if bar.disable and now - said_at > 30:
                        said_at = now
                        say(f"{title}: {run['images_in_epoch']:,} of {count:,} images, {status}")
                    if now - shown_at > PAGE_SECONDS:
                        shown_at = now
                        show()
                    if not foretold and now - clock.begun > 15:
                        foretold = True
                        foretell(args, speed(), seconds_left())
            bar.close()
            at_end, stopped, bad = from_first_process(progress() >= 1, bool(stop), bad)
            if bad:
                raise UserError(f"{BAD_STEPS} steps in a row gave no finite number and were left out: the checkpoint "
                                "is sound, go on from it with a lower --lr or with --precision fp32")

            if first_process and not stopped and run["images_in_epoch"]:
                done, seconds = run["images_seen"] - seen_at_beginning, time.time() - began
                if not done:  # an epoch whose last step was saved, but not its row: the rate of the whole run
                    done, seconds = run["images_seen"], clock.elapsed()
                row = [run["epoch"] + 1, run["step"], run["images_seen"], (losses[0] / losses[1]).item(), evaluate(),
                       optimizer.param_groups[0]["lr"], done / seconds, clock.elapsed()]
                run["history"].append(row)
                with clock.timed("metrics"):
                    write_metrics(run["history"], args.results)
                if at_end or time.time() - said_at > 10:
                    said_at = time.time()
                    say(f"{title}: step {row[1]:,}, loss {row[3]:.4f}, held out {row[4]:.4f}, {row[6]:.0f} images/s, "
                        f"{duration(seconds_left())} left")
                if begins_to_recite(run["history"]):
                    say("overfit   the held-out error rises while the training error falls: the network begins to recite its "
                        "images. More images help, or ending here: the pictures of the epochs before are in the results")
            if not stopped and run["images_in_epoch"] >= count:
                run.update(epoch=run["epoch"] + 1, images_in_epoch=0)
                losses.zero_()
                saver.epoch_over()
            if first_process and not stopped and (at_end or clock.allows("grid", DRAWING_SHARE)):
                draw(stop, at_end)
                stopped = stopped or at_end and bool(stop)  # a last grid that was cut short is drawn at the next start
            if first_process and not (at_end or stopped):
                show()
                saver.save_if_due(state)
                if clock.allows("animation", ANIMATION_SHARE):
                    animate()
            if first_process and (at_end or stopped):
                run["finished"] = not stopped
                saver.save_last(state(), tries=1 if stopped else 3)
                show("finished" if run["finished"] else "stopped")
            if stopped:
                say(f"Stopped after {run['step']} steps, checkpoint saved: the same command goes on from here.")
                return 130
            if at_end:
                if first_process:
                    animate()
                say(f"Done in {duration(clock.elapsed())}. Look into {args.results}, index.html shows it all; --sample 64 "
                    "draws more.")
                return 0


# ----------------------------------------------------------------------------------------------------------- main ----


def describe(args, precision, model, count, skipped, held_out, cache, at_a_time):
    """What is about to happen, as (label, text) pairs; what was skipped goes into skipped_images.txt."""
    about = [("images", f"{count:,} below {args.dataroot}, {held_out:,} of them held out"),
             ("cache", f"{cache}, {cache.stat().st_size / 1e6:,.1f} MB")]
    listing = args.results / "skipped_images.txt"
    if RANK == 0:
        listing.unlink(missing_ok=True)
    if skipped:
        if RANK == 0:
            listing.write_text("".join(f"{name}: {reason}\n" for name, reason in sorted(skipped.items())), encoding="utf-8")
        name, reason = min(skipped.items())
        about += [("skipped", f"{len(skipped):,} files, such as {name} ({reason}): all are listed in {listing}"
                   + "; that is more than half of them, see what is wrong with the folder" * (len(skipped) > count))]
    if count - held_out < args.batch_size:
        about += [("few", f"fewer images than the {args.batch_size} of a batch: the network will recite them, get more")]
    flops = FlopCounterMode(display=False)
    with flops, torch.device("meta"):
        build_network(vars(args))(torch.empty(1, 3, args.image_size, args.image_size), torch.empty(1, dtype=torch.long))
    limits = {"epochs": args.epochs, "steps": args.max_steps, "minutes": args.minutes}
    parts = f", {at_a_time} at a time" if at_a_time * PROCESSES < args.batch_size else ""
    return about + [
        ("network", f"channels {shown(args.channels)}, {sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} "
                    f"M parameters, {flops.get_total_flops() / 1e9:.2f} GFLOPs an image"),
        ("device", f"{args.device.type}, {precision}" + (f", {PROCESSES} processes" if PROCESSES > 1 else "")),
        ("training", f"until {' or '.join(f'{limit:g} {what}' for what, limit in limits.items() if limit)}, "
                     f"{args.batch_size} images a step{parts}, learning rate {args.lr:g}, {args.timesteps} timesteps"),
        ("keeps", f"checkpoint {args.checkpoint}, saved every {args.save_minutes:g} minutes and every epoch"),
        ("pictures", f"in {args.results}: open index.html there; a grid after every epoch, if drawing takes but little time")]


def foretell(args, images_per_second, seconds_left):
    """Say how long it will take, from what was measured, and on a CPU how to make it short."""
    advice = ""
    if args.device.type == "cpu" and seconds_left > 1200:
        advice = "; --minutes 30 makes the best of half an hour" + (
            ", --image-size 32 is about four times as fast" if args.image_size > 32 else "")
    say(f"time      about {duration(seconds_left)} more, at {images_per_second:.0f} images/s{advice}")


def begins_to_recite(history):
    """Whether the held-out errors of the last three epochs are all 3% above the lowest, for the first time."""

    def rises(errors):
        return len(errors) > 3 and min(errors[-3:]) > 1.03 * min(errors)

    errors = [row[4] for row in history]
    return rises(errors) and not rises(errors[:-1])


def draw_samples(args, saved, precision):
    """--sample: images from the checkpoint into results/samples, the first 64 as a grid, the first 16 with their nearest.

    Several processes share the images between them.
    """
    model, folder = averaged_network(saved, args.checkpoint, args.device), args.results / "samples"
    cores = Cores(args.device, 64)
    with first_process_first():
        if RANK == 0:
            folder.mkdir(exist_ok=True)
            for old in folder.glob("sample_*.png"):
                old.unlink()

    def drawn():
        for first in range(64 * RANK, args.sample, 64 * PROCESSES):
            yield from enumerate(draw_images(model, cores, first, min(64, args.sample - first), 64, args.sample_steps,
                                             args.seed, precision), first)

    grid, share = [], min(args.sample, 64 * math.ceil(args.sample / 64 / PROCESSES))
    for number, image in track(drawn(), share, "drawing"):
        to_image(image).save(folder / f"sample_{number + 1:05d}.png")
        if number < 64:
            grid.append(image)
        if number == min(64, args.sample) - 1:  # at once: whoever draws thousands need not wait for them
            save_grid(grid, args.results / "samples.png")
    if RANK == 0:
        try:
            pixels = load_images(args.dataroot, args.image_size, args.results)[1]
            save_grid(nearest(torch.stack(grid[:16]), pixels), args.results / "nearest.png")
            beside = "; nearest.png has the first of them, each beside the training image that is closest to it"
        except UserError:
            beside = f"; no nearest.png, since {args.dataroot} has no training images to compare with"
        if (args.results / "run.js").exists():  # a page that is open shows the new pictures
            write_page(args.results)
        say(f"{args.sample} images in {folder}, the first {min(64, args.sample)} in the grid {args.results / 'samples.png'}"
            f"{beside}")
    with first_process_first():  # none ends before all have drawn
        return 0


def main(argv=None):
    """Run the script on the command line `argv`; returns its exit status."""
    sys.stdout.reconfigure(line_buffering=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what it puts into the background with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        if PROCESSES > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, while it waits for the others of a new group
            join_processes()
        args, saved = read_settings(argv)
        precision = choose_precision(args.precision, args.device)
        check_writable(args.results)
        if args.sample:
            return draw_samples(args, saved, precision)
        if args.demo:
            from fake_face.draw_faces import fill_folder

            with first_process_first():
                fill_folder(args.dataroot, DEMO["images"], args.image_size)
        return train(args, saved, precision)
    except UserError as error:
        if RANK == 0:
            print(f"scriptc.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("scriptc.py: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"scriptc.py: {error}: see whether the disk is full or gone, then the same command goes on", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if PROCESSES == 1:
            raise
        print(f"scriptc.py: process {RANK} cannot go on, most likely since another one ended ({error}): the checkpoint is "
              "sound, the same command goes on from it, by itself with torchrun --max-restarts=3", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
