"""Runs of scriptc.py as tests and benchmarks make them: the command, and what it leaves."""

import csv
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = ["--image-size", "16", "--channels", "8", "16", "--batch-size", "16", "--sample-steps", "3"]


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


def checkpoint(folder, name="checkpoint.pth"):
    return torch.load(folder / name, weights_only=True)


def same(one, other):
    """Whether two nested state dicts are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
