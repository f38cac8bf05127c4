"""Runs of scriptc.py as tests and benchmarks make them: the command, and what it leaves."""

import csv
import hashlib
import pathlib
import sys
import zipfile

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = ["--image-size", "16", "--channels", "8", "16", "--batch-size", "16", "--sample-steps", "3"]
PARTS = ("model", "ema", "optimizer", "epoch", "step", "images_seen")  # of a checkpoint: what has to be equal


def command(folder, *flags):
    """The command line of a training in `folder`, with its faces/, results/ and checkpoint.pth, on the CPU."""
    defaults = {"--dataroot": folder / "faces", "--results": folder / "results",
                "--checkpoint": folder / "checkpoint.pth", "--device": "cpu"}
    flags = [str(flag) for flag in flags]
    own = [text for flag, value in defaults.items() if flag not in flags for text in (flag, str(value))]
    return [sys.executable, str(ROOT / "scriptc.py"), *own, *flags]


def table(folder):
    """The rows of metrics.csv; none where it is not there."""
    path = folder / "results" / "metrics.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def whole(path):
    """The checkpoint at `path`; raises where it is not a whole one."""
    with zipfile.ZipFile(path) as file:
        if file.testzip():
            raise ValueError("checksum")
    return torch.load(path, weights_only=True)


def checkpoint(folder, name="checkpoint.pth"):
    return whole(folder / name)


def digest(value):
    """A text that is the same for states that are equal to the bit, and for no others."""
    if isinstance(value, torch.Tensor):
        data = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, dict):
        return repr([(key, digest(part)) for key, part in value.items()])
    return repr([digest(part) for part in value]) if isinstance(value, list | tuple) else repr(value)


def outcome(folder):
    """What a run has to end with, to the bit, however often it was disturbed."""
    state = checkpoint(folder)
    clock = ("seconds", "images_per_second", "sample_distance")  # there is a distance where there was time for a grid
    rows = [[value for name, value in row.items() if name not in clock] for row in table(folder)]
    grid = folder / "results" / f"epoch_{rows[-1][0]}_step_{state['step']}.png"
    return {**{name: digest(state[name]) for name in PARTS}, "metrics.csv": rows,
            "grid": hashlib.sha256(grid.read_bytes()).hexdigest() if grid.exists() else ""}
