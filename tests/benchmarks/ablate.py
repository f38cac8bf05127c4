"""What one choice in scriptc.py is worth: train it with one thing changed, draw 256 samples, and compare.

    python tests/benchmarks/ablate.py --list
    python tests/benchmarks/ablate.py --dataroot FACES "as it is" "batch of 64" -- --image-size 32 --minutes 5
    python tests/benchmarks/ablate.py --dataroot FACES --seeds 3 --keep OUT "no mirroring" -- --image-size 64 --minutes 10

What stands after -- is passed on to scriptc.py. Each run gets the machine for itself, one after the other, and they take
turns by seed. With --keep the results folders stay: look at the grids, and score `samples/` with a face network.
"""

import argparse
import csv
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import scriptc  # noqa: E402


def setting(**values):
    """A change of constants of scriptc.py."""
    return lambda: vars(scriptc).update(values)


def uniform_timesteps():
    scriptc.timestep_probabilities = lambda timesteps, size: torch.full((timesteps,), 1 / timesteps, dtype=torch.float64)


def bottleneck_of_two():
    real = scriptc.SimpleUnet.__init__

    def build(self, *arguments, **options):
        real(self, *arguments, **options)
        del self.bottleneck[2:]

    scriptc.SimpleUnet.__init__ = build


def adam_for_every_weight():
    scriptc.build_optimizers = lambda model, lr, dtype: {
        "adam": torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99), fused=True)}


def draws(change):
    """A change of flip, t, noise of each step."""
    def set_draws():
        real = scriptc.random_draws
        scriptc.random_draws = lambda run, count: change(run, *real(run, count))

    return set_draws


VARIANTS = {  # name: (what changes scriptc.py, flags)
    "as it is": (setting(), []),
    "uniform timesteps": (uniform_timesteps, []),
    "density mean 0": (setting(DENSITY_MEAN=0.0), []),
    "density mean 2": (setting(DENSITY_MEAN=2.0), []),
    "two blocks at the bottom": (bottleneck_of_two, []),
    "batch of 64": (setting(), ["--batch-size", "64"]),
    "learning rate doubled": (setting(), ["--lr", "0.016"]),
    "learning rate halved": (setting(), ["--lr", "0.004"]),
    "momentum 0.95": (setting(MOMENTUM=0.95), []),
    "five usual Newton-Schulz iterations": (setting(NEWTON_SCHULZ=[(3.4445, -4.775, 2.0315)] * 5), []),
    "Adam for every weight": (adam_for_every_weight, ["--lr", "0.002"]),
    "no mirroring": (draws(lambda run, flip, t, noise: (flip & False, t, noise)), []),
    "average over a fifth of the run": (setting(EMA_POWER=5), []),
}


def run(name, folder, flags):
    """Train and sample one variant in `folder`, in a process of its own; returns the numbers of its last epoch."""
    places = ["--results", str(folder), "--checkpoint", str(folder / "checkpoint.pth")]
    for more in ([], ["--sample", "256"]):
        command = [sys.executable, __file__, "--as", name, "--", *flags, *places, *more]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    with open(folder / "metrics.csv", newline="") as file:
        return [*csv.DictReader(file)][-1] | {"distance": float(re.search(r"sample distance (\S+),", out)[1])}


if __name__ == "__main__":
    own, passed_on = sys.argv[1:], []
    if "--" in own:
        own, passed_on = own[: own.index("--")], own[own.index("--") + 1:]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="names from --list (all)")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dataroot", help="a folder of faces")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", metavar="DIR", help="keep the results there")
    parser.add_argument("--as", dest="one", metavar="VARIANT", help="run scriptc.py with this change")
    args = parser.parse_args(own)
    if args.one:
        change, more = VARIANTS[args.one]
        change()
        sys.exit(scriptc.main([*more, *passed_on]))
    if args.list or not args.dataroot or {*args.variants} - VARIANTS.keys():
        print("\n".join(VARIANTS))
        sys.exit(0 if args.list else "name variants of this list, and a folder of faces with --dataroot")
    distances = {name: [] for name in args.variants or VARIANTS}
    with tempfile.TemporaryDirectory() as temporary:
        print("| variant | seed | steps | held-out error | sample distance, 256 samples |\n| --- | --- | --- | --- | --- |")
        for seed in range(args.seeds):
            for name in distances:
                place = pathlib.Path(args.keep or temporary, f"{name.replace(' ', '_')}_{seed}")
                last = run(name, place, ["--dataroot", args.dataroot, "--seed", str(seed), *passed_on])
                distances[name].append(last["distance"])
                print(f"| {name} | {seed} | {last['step']} | {float(last['heldout_loss']):.4f} | {last['distance']:.2f} |",
                      flush=True)
    if args.seeds > 1:
        for name, found in distances.items():
            print(f"| {name} | mean of {args.seeds} | | | {statistics.mean(found):.2f} |")
