"""How fast a training step and sampling are: against the copied notebook, and against what the machine can do at all.

    python tests/benchmarks/bench_step.py                          two cores: about twelve minutes
    python tests/benchmarks/bench_step.py --device cuda            a card
    python tests/benchmarks/bench_step.py --only step measures     some of the parts: step, sampling, measures, loop, start

Everything that is compared runs in turn, several times, training steps in processes of their own; the table gives medians.
"default-allocator" is this network without keep_freed_memory(). FLOPs are those of the convolutions and matrix products,
counted by PyTorch, forward and backward. The ceiling is the best rate that a forward convolution of one of the network's
own main shapes reaches in the same precision on the same machine.
"""

import argparse
import copy
import csv
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import scriptc  # noqa: E402
from fake_face.draw_faces import fill_folder  # noqa: E402


class NotebookBlock(nn.Module):
    """Two convolutions with batch normalisation, the time added in between, then a strided convolution."""

    def __init__(self, c_in, c_out, c_time, up):
        super().__init__()
        self.time = nn.Linear(c_time, c_out)
        self.conv1 = nn.Conv2d(2 * c_in if up else c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.resize = (nn.ConvTranspose2d if up else nn.Conv2d)(c_out, c_out, 4, 2, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(c_out), nn.BatchNorm2d(c_out)

    def forward(self, x, time):
        h = self.norm1(F.relu(self.conv1(x))) + F.relu(self.time(time))[:, :, None, None]
        return self.resize(self.norm2(F.relu(self.conv2(h))))


class Notebook(nn.Module):
    """The network of the much copied notebook, whose widths are 64 to 1024; here `base` to 16 x `base`."""

    def __init__(self, base):
        super().__init__()
        widths = [base * 2**level for level in range(5)]
        self.time = nn.Sequential(scriptc.SinusoidalPositionEmbeddings(32), nn.Linear(32, 32), nn.ReLU())
        self.first = nn.Conv2d(3, base, 3, padding=1)
        self.down = nn.ModuleList(NotebookBlock(a, b, 32, False) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(NotebookBlock(b, a, 32, True) for a, b in reversed([*zip(widths, widths[1:])]))
        self.last = nn.Conv2d(base, 3, 1)

    def forward(self, x, t):
        time, skips, x = self.time(t), [], self.first(x)
        for block in self.down:
            x = block(x, time)
            skips.append(x)
        for block in self.up:
            x = block(torch.cat((x, skips.pop()), dim=1), time)
        return self.last(x)


def flops_forward(network, size):
    """Floating-point operations of one image through the network."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.zeros(1, 3, size, size, device=args.device), torch.zeros(1, dtype=torch.long, device=args.device))
    return counter.get_total_flops()


def flops_training(network):
    """The same for one image forward and backward; what an optimiser computes beside does not count as useful."""
    counter = FlopCounterMode(display=False)
    with counter:
        network(torch.zeros(2, 3, args.size, args.size), torch.zeros(2, dtype=torch.long)).sum().backward()
    return counter.get_total_flops() / 2


def seconds(works, repeats):
    """Median seconds of each of several functions, run in turn."""
    times = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(taken) for name, taken in times.items()}


def our_step(batch, precision=None, channels_last=True, at_a_time=10**6, compiled=False, muon=True, shared=True):
    """A function that makes one training step as train() does, on images that are in memory already."""
    device, precision = torch.device(args.device), precision or scriptc.choose_precision("auto", torch.device(args.device))
    form = torch.channels_last if channels_last else torch.contiguous_format
    model = scriptc.SimpleUnet(channels, args.size).to(device, memory_format=form)
    ema = copy.deepcopy(model).requires_grad_(False)
    network = torch.compile(model) if compiled else model
    cores = scriptc.Cores(device, batch if shared else 1)
    weights, averages = list(model.parameters()), list(ema.parameters())
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    optimizer = (scriptc.Muon(model, 1e-3, dtype, scriptc.Cores(device, 64 if shared else 1)) if muon
                 else torch.optim.AdamW(weights, 1e-3, fused=True))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    alphas_cumprod = torch.cumprod(1 - scriptc.linear_beta_schedule(1000), 0).float().to(device)
    images = torch.randint(0, 256, (batch, args.size, args.size, 3), dtype=torch.uint8, device=device)

    def step():
        noise = torch.randn(batch, args.size, args.size, 3, device=device).permute(0, 3, 1, 2)
        t = torch.randint(0, 1000, (batch,), device=device)
        x_0 = images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)

        def gradients_of(part):
            x_t, target = scriptc.forward_diffusion(x_0[part], t[part], alphas_cumprod, noise[part])
            if not channels_last:
                x_t = x_t.contiguous()
            with scriptc.autocast(device, precision):
                predicted = network(x_t, t[part])
            return torch.autograd.grad(scaler.scale((predicted.float() - target).abs().sum() / noise.numel()), weights)

        sums = None
        for found in cores.map(gradients_of, scriptc.slices(0, batch, at_a_time, cores.count)):
            sums = torch._foreach_add(sums, found) if sums else found
        for weight, gradient in zip(weights, sums, strict=True):
            weight.grad = gradient
        scaler.unscale_(optimizer)
        finite = nn.utils.clip_grad_norm_(weights, 1.0).isfinite()
        optimizer.step(finite) if muon else optimizer.step()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, weights, 0.01)

    return step


def notebook_step(batch, base):
    """The same for the notebook's loop as it is copied: float32, Adam, standard memory format, its loss read every step."""
    device = torch.device(args.device)
    model = Notebook(base).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 300), 0).to(device)
    x_0 = torch.rand(batch, 3, args.size, args.size, device=device) * 2 - 1

    def step():
        optimizer.zero_grad()
        t = torch.randint(0, 300, (batch,), device=device)
        x_t, noise = scriptc.forward_diffusion(x_0, t, alphas_cumprod)
        loss = F.l1_loss(noise, model(x_t, t))
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def ceiling(batch):
    """FLOPs a second of the fastest of the network's 3 x 3 convolutions, on its own, in the network's precision."""
    device = torch.device(args.device)
    precision = scriptc.choose_precision("auto", device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    side, works, flops = args.size, {}, {}
    for level, width in enumerate(channels):
        x = torch.randn(batch, width, side >> level, side >> level, device=device, dtype=dtype)
        weight = torch.randn(width, width, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        works[level] = lambda x=x, weight=weight: [F.conv2d(x, weight, padding=1) for _ in range(5)]
        flops[level] = 5 * 2 * 9 * width * x.numel()
    with torch.no_grad():
        taken = seconds(works, args.repeats)
    return max(flops[level] / taken[level] for level in works)


def matched_base():
    """The notebook's narrowest width at which it needs as many FLOPs an image as our network; and both numbers."""
    ours = flops_forward(scriptc.SimpleUnet(channels, args.size).to(args.device), args.size)
    candidates = {base: flops_forward(Notebook(base).to(args.device), args.size) for base in range(8, 129, 4)}
    base = min(candidates, key=lambda base: abs(math.log(candidates[base] / ours)))
    return base, candidates[base], ours


def in_own_processes(names, batch):
    """Median seconds of a step of each of several networks, in a process of its own: they set C's allocator differently."""
    times = {name: [] for name in names}
    for _ in range(3):
        for name in names:
            command = [sys.executable, __file__, "--only", name, "--batches", str(batch), "--device", args.device, "--size",
                       str(args.size), "--repeats", str(max(2, args.repeats // 2)), "--channels", *map(str, channels)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            times[name].append(float(done.stdout.split()[-1]))
    return {name: statistics.median(taken) for name, taken in times.items()}


def bench_bare(name):
    """A step of one network, as in_own_processes() wants it: the seconds, last."""
    batch = args.batches[0]
    if name == "default-allocator":
        scriptc.keep_freed_memory = lambda: None
    print(seconds({name: notebook_step(batch, matched_base()[0]) if name == "notebook" else our_step(batch)},
                  args.repeats)[name])


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def bench_step():
    base, notebook_flops, ours = matched_base()
    flops = {"ours": flops_training(scriptc.SimpleUnet(channels, args.size)), "notebook": flops_training(Notebook(base))}
    flops["default-allocator"] = flops["ours"]
    row("training step", "batch", "images/s", "GFLOP/s", "of the ceiling", "against the notebook, per FLOP")
    row(*["---"] * 6)
    most = max(ceiling(batch) for batch in args.batches)
    for batch in args.batches:
        taken = in_own_processes(["ours", "default-allocator", "notebook"], batch)
        slow = batch * flops["notebook"] / taken["notebook"]
        for name in taken:
            rate = batch * flops[name] / taken[name]
            row(f"{name}, {(ours if name != 'notebook' else notebook_flops) / 1e9:.2f} GFLOPs an image", batch,
                f"{batch / taken[name]:.1f}", f"{rate / 1e9:.0f}", f"{rate / most:.0%}", f"{rate / slow:.2f}")
    row("fastest convolution", "the best of them", "", f"{most / 1e9:.0f}", "100%", "")


def bench_sampling():
    device = torch.device(args.device)
    model = scriptc.SimpleUnet(channels, args.size).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    notebook = Notebook(matched_base()[0]).to(device).eval().requires_grad_(False)
    x, t = torch.randn(64, 3, args.size, args.size, device=device), torch.zeros(64, dtype=torch.long, device=device)
    precision, steps = scriptc.choose_precision("auto", device), scriptc.build_parser().get_default("sample_steps")
    cores = scriptc.Cores(device, 64)
    works = {f"this project, {steps} evaluations": lambda: scriptc.draw_images(model, cores, 0, 64, 64, steps, 0, precision),
             "notebook, 300 evaluations": lambda: [notebook(x, t) for _ in range(300 // 30)]}
    taken = seconds(works, max(2, args.repeats // 3))
    taken["notebook, 300 evaluations"] *= 30  # a tenth of the tenth is measured, all evaluations cost the same
    most = ceiling(64)
    row("sampling, 64 at a time", "images/s", "of the ceiling")
    row(*["---"] * 3)
    for name in works:
        evaluations, network = (300, notebook) if "notebook" in name else (steps, model)
        flops = 64 * evaluations * flops_forward(network, args.size)
        row(name, f"{64 / taken[name]:.2f}", f"{flops / taken[name] / most:.0%}")


def bench_measures():
    batch = args.batches[-1]
    works = {"as it is": our_step(batch), "float32": our_step(batch, precision="fp32"),
             "standard memory format": our_step(batch, channels_last=False), "in parts of eight": our_step(batch, at_a_time=8),
             "AdamW (fused) for Muon": our_step(batch, muon=False),
             "all cores at every operation": our_step(batch, shared=False)}
    if args.compile:
        works["torch.compile"] = our_step(batch, compiled=True)
    taken = seconds(works, args.repeats)
    row("switched off or on", "batch", "images/s", "time against as it is")
    row(*["---"] * 4)
    for name in works:
        row(name, batch, f"{batch / taken[name]:.1f}", f"{taken[name] / taken['as it is']:.2f}")


def bench_loop():
    """The real loop, by command, beside the bare step above: they differ by data, metrics and the clock."""
    batch = 32
    with tempfile.TemporaryDirectory() as place:
        fill_folder(pathlib.Path(place, "faces"), 1000, args.size)
        ratios = []
        for attempt in range(3):
            places = ["--dataroot", f"{place}/faces", "--results", f"{place}/results", "--checkpoint", f"{place}/{attempt}.pth"]
            flags = ["--image-size", str(args.size), "--device", args.device, "--batch-size", str(batch), "--max-steps", "30",
                     "--epochs", "1", "--sample-steps", "2"]
            subprocess.run([sys.executable, str(ROOT / "scriptc.py"), *places, *flags], check=True, stdout=subprocess.DEVNULL)
            with open(f"{place}/results/metrics.csv", newline="") as file:
                real = batch / float([*csv.DictReader(file)][-1]["images_per_second"])
            bare = seconds({"bare": our_step(batch)}, 15)["bare"]
            ratios.append(real / bare)
    row("step in the real loop against the bare step, batch 32", f"{statistics.median(ratios):.3f}",
        "of three: " + ", ".join(f"{ratio:.3f}" for ratio in ratios))


def bench_start():
    """From the start of a process to the first optimiser step of a run with a warm cache, against importing torch alone."""
    with tempfile.TemporaryDirectory() as place:
        fill_folder(pathlib.Path(place, "faces"), 1000, args.size)
        common = ["--dataroot", f"{place}/faces", "--results", f"{place}/results", "--device", args.device, "--image-size",
                  str(args.size), "--batch-size", "2"]
        code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import scriptc; "
                "scriptc.Muon.step = lambda *_: os._exit(0); scriptc.main(sys.argv[2:])")
        started = [sys.executable, "-c", code, str(ROOT), *common]
        subprocess.run([*started, "--checkpoint", f"{place}/first.pth"], stdout=subprocess.DEVNULL)
        works = {"import": lambda: subprocess.run([sys.executable, "-c", "import torch, torchvision"]),
                 "start": lambda: subprocess.run([*started, "--checkpoint", f"{place}/new.pth"], stdout=subprocess.DEVNULL)}
        taken = seconds(works, args.repeats)
    allowed = 1.3 * taken["import"] + 1
    row("process start to first step, two images a step, against 1.3 x `import torch, torchvision` + 1 s",
        f"{taken['start'] / allowed:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=64, help="image size in px")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--channels", type=int, nargs="+", help="of this project's network (the device's default)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parts = {"step": bench_step, "sampling": bench_sampling, "measures": bench_measures, "loop": bench_loop,
             "start": bench_start}
    bare = {name: lambda name=name: bench_bare(name) for name in ("ours", "default-allocator", "notebook")}
    parser.add_argument("--only", nargs="+", default=[*parts], choices=[*parts, *bare])
    args = parser.parse_args()
    channels = args.channels or scriptc.default_channels(torch.device(args.device), args.size)
    print(f"{args.device}, {scriptc.choose_precision('auto', torch.device(args.device))}, {args.size} px, channels {channels}, "
          f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}\n")
    for part in args.only:
        (parts | bare)[part]()
        print()
