"""What one choice in scriptc.py is worth: train copies of it that differ in a line or two, and compare held-out errors.

    python tests/benchmarks/ablate.py --list
    python tests/benchmarks/ablate.py --dataroot FACES "as it is" "batch of 64" -- --image-size 32 --minutes 5
    python tests/benchmarks/ablate.py --dataroot FACES --seeds 3 --keep OUT "no mirroring" -- --image-size 64 --minutes 10

What stands after -- is passed on to scriptc.py. Each run gets the machine for itself, one after the other, and they take
turns by seed. With --keep the results folders stay, for the grids to be looked at and scored.
"""

import argparse
import csv
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

VARIANTS = {  # name: [(text in scriptc.py, what replaces it), ...]
    "as it is": [],
    "uniform timesteps": [("return density / density.sum()", "return torch.ones_like(density) / timesteps")],
    "density mean 0": [("DENSITY_MEAN, DENSITY_DEVIATION = 1.0,", "DENSITY_MEAN, DENSITY_DEVIATION = 0.0,")],
    "density mean 2": [("DENSITY_MEAN, DENSITY_DEVIATION = 1.0,", "DENSITY_MEAN, DENSITY_DEVIATION = 2.0,")],
    "two blocks at the bottom": [("c_time) for _ in range(4))", "c_time) for _ in range(2))")],
    "noise straight from the layers": [("return (1 - a_t).sqrt() * x_t + a_t.sqrt() * self", "return self")],
    "more channels at quarter size": [("[16, 64, 64, 192] if", "[16, 64, 128, 192] if"),
                                      ("else [16, 32, 64, 128, 192]", "else [16, 32, 128, 128, 192]")],
    "fewer channels at full size": [("[16, 64, 64, 192] if", "[16, 32, 64, 192] if"),
                                    ("else [16, 32, 64, 128, 192]", "else [16, 16, 64, 128, 192]")],
    "no norm": [("        self.norm = nn.GroupNorm(8, c_in)\n", ""), ("F.silu(self.norm(x))", "F.silu(x)")],
    "batch of 128": [("type=count, default=64, help", "type=count, default=128, help")],
    "learning rate doubled": [("default=8e-3", "default=1.6e-2")],
    "learning rate halved": [("default=8e-3", "default=4e-3")],
    "momentum 0.95": [("MOMENTUM = 0.9 ", "MOMENTUM = 0.95 ")],
    "five usual Newton-Schulz iterations": [
        ("(8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)",
         "[(3.4445, -4.775, 2.0315)] * 5")],
    "Adam for every weight": [("if weight.ndim == 4 and weight not in plain]", "if weight.ndim > 4]"),
                              ("if weight.ndim != 4 or weight in plain]", "]"), ("default=8e-3", "default=2e-3"),
                              ('{"muon": Muon(kernels, torch.tensor(lr, device=device)),\n            "adam"', '{"adam"')],
    "no mirroring": [("generator=stream, device=run.device) < 0.5", "generator=stream, device=run.device) < 0")],
    "average over a fifth of the run": [("EMA_POWER = 12", "EMA_POWER = 5")],
    "timesteps drawn one by one": [("(torch.arange(count, device=run.device) + position) / count", "position")],
}


def train(text, folder, flags):
    """Train the program `text` in `folder`; returns the last row of its metrics."""
    folder.mkdir(parents=True)
    (folder / "scriptc.py").write_text(text)
    places = ["--results", str(folder / "results"), "--checkpoint", str(folder / "checkpoint.pth")]
    subprocess.run([sys.executable, str(folder / "scriptc.py"), *places, *flags], check=True, stdout=subprocess.DEVNULL)
    (folder / "checkpoint.pth").unlink()
    (folder / "checkpoint.previous.pth").unlink(missing_ok=True)
    with open(folder / "results" / "metrics.csv", newline="") as file:
        return [*csv.DictReader(file)][-1]


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
    args = parser.parse_args(own)
    if args.list or not args.dataroot or {*args.variants} - VARIANTS.keys():
        print("\n".join(VARIANTS))
        sys.exit(0 if args.list else "name variants of this list, and a folder of faces with --dataroot")
    source, rows = (ROOT / "scriptc.py").read_text(), {name: [] for name in args.variants or VARIANTS}
    place = pathlib.Path(args.keep or tempfile.mkdtemp())
    print("| variant | seed | steps | images seen | held-out error |\n| --- | --- | --- | --- | --- |")
    for seed in range(args.seeds):
        for name in rows:
            text = source
            for old, new in VARIANTS[name]:
                if text.count(old) != 1:
                    sys.exit(f"{name}: scriptc.py has changed, {old!r} stands there {text.count(old)} times")
                text = text.replace(old, new)
            flags = ["--dataroot", args.dataroot, "--seed", str(seed), *passed_on]
            last = train(text, place / f"{name.replace(' ', '_')}_{seed}", flags)
            rows[name].append(float(last["heldout_loss"]))
            print(f"| {name} | {seed} | {last['step']} | {last['images_seen']} | {rows[name][-1]:.4f} |", flush=True)
    if args.seeds > 1:
        for name, errors in rows.items():
            print(f"| {name} | mean of {args.seeds} | | | {statistics.mean(errors):.4f} |")
    if not args.keep:
        shutil.rmtree(place)
