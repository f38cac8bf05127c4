"""How fast a training step and sampling are: against the copied notebook, and against the fastest convolution here.

    python tests/benchmarks/bench_step.py                          two cores: about ten minutes
    python tests/benchmarks/bench_step.py --size 32 --only step    only some of the parts (--help lists them)
    python tests/benchmarks/bench_step.py --device cuda            a GPU

Everything that is compared runs in turn, several times; the tables give medians. "ours" is training_step of scriptc.py.
FLOPs are those of the convolutions and matrix products of the network, counted by PyTorch, forward and backward; those of
the optimizer do not count. The fastest convolution is the best rate that a forward 3 x 3 convolution of one of the
network's own shapes, or of 128 channels at 32 px, reaches in the same precision on the same machine.

`launches` counts the operations of a training step and the bytes that they read and write, without views and empty
tensors, on CPU tensors with the settings for a GPU (bf16 autocast, wide channels), and those of the forward pass also under
CUDA's own autocast rules, on tensors without values. It stands in for a profiler: most operations are one kernel on a GPU,
those for lists of tensors (foreach, fused) a few. Where there is a GPU, the profiler counts and times its kernels as well.
"""

import argparse
import contextlib
import csv
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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


def flops(network, backward=False):
    """Floating-point operations of one image through the network, forward, or forward and backward."""
    counter = FlopCounterMode(display=False)
    with counter, contextlib.nullcontext() if backward else torch.no_grad():
        x = torch.zeros(2, 3, args.size, args.size, device=device)
        predicted = network(x, torch.zeros(2, dtype=torch.long, device=device))
        if backward:
            predicted.sum().backward()
    return counter.get_total_flops() / 2


def seconds(works, repeats):
    """Median seconds of each of several functions, run in turn."""
    times = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            begun = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(taken) for name, taken in times.items()}


def our_run(batch, precision, widths):
    """A Run of scriptc.py whose images are random; needs no disk."""
    flags = ["--image-size", args.size, "--batch-size", batch, "--precision", precision, "--channels", *widths,
             *(["--compile"] if args.compile else [])]
    run = scriptc.Run(scriptc.read_settings([str(flag) for flag in flags]), device)
    pixels = torch.randint(0, 256, (200, args.size, args.size, 3), dtype=torch.uint8)
    run.faces = scriptc.Faces(pixels.numpy(), range(200), device)
    return run


def our_step(batch, precision):
    """A function that makes one training step of scriptc.py."""
    run = our_run(batch, precision, channels)
    numbers = torch.arange(batch, device=run.faces.rows.device) % 200
    return lambda: scriptc.training_step(run, numbers, 0.5)


def notebook_step(batch, base, precision):
    """The notebook's loop as it is copied: Adam, contiguous tensors, its loss read every step."""
    model = Notebook(base).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 300), 0).to(device)
    x_0 = torch.rand(batch, 3, args.size, args.size, device=device) * 2 - 1

    def step():
        optimizer.zero_grad()
        t = torch.randint(0, 300, (batch,), device=device)
        x_t, noise = scriptc.forward_diffusion(x_0, t, alphas_cumprod)
        with scriptc.autocast(device, precision):
            loss = F.l1_loss(noise, model(x_t, t).float())
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def fastest_convolution(precision):
    """The fastest 3 x 3 convolution, on its own, in `precision`: a function that computes it, and its FLOPs."""
    dtype = scriptc.DTYPES[precision]
    works, count = {}, {}
    for width, side in {(128, 32), *((width, args.size >> level) for level, width in enumerate(channels))}:
        for batch in (32, 128):
            x = torch.randn(batch, width, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            weight = torch.randn(width, width, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            times = math.ceil(5e9 / (2 * 9 * width * x.numel()))
            works[width, side, batch] = torch.no_grad()(
                lambda x=x, weight=weight, times=times: [F.conv2d(x, weight, padding=1) for _ in range(times)])
            count[width, side, batch] = times * 2 * 9 * width * x.numel()
    taken = seconds(works, args.repeats)
    best = max(works, key=lambda shape: count[shape] / taken[shape])
    return works[best], count[best]


def matched_base():
    """The notebook's narrowest width at which it needs as many FLOPs an image as our network."""
    ours = flops(scriptc.SimpleUnet(channels, args.size).to(device))
    return min(range(8, 129, 4), key=lambda base: abs(math.log(flops(Notebook(base).to(device)) / ours)))


def row(*cells):
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def bench_step():
    base, best = matched_base(), scriptc.choose_precision("auto", device)
    count = {"ours": flops(scriptc.SimpleUnet(channels, args.size).to(device), True),
             "notebook": flops(Notebook(base).to(device), True)}
    precisions = sorted({best, "fp32"})
    convolutions = {precision: fastest_convolution(precision) for precision in precisions}
    row("training step", "precision", "batch", "images/s", "GFLOP/s", "of the fastest convolution",
        "against the notebook in the same precision, per FLOP")
    row(*["---"] * 7)
    for batch in args.batches:
        works = {}
        for precision in precisions:
            works["ours", precision] = our_step(batch, precision)
            works["notebook", precision] = notebook_step(batch, base, precision)
            works["convolution", precision] = convolutions[precision][0]
        taken = seconds(works, args.repeats)
        for precision in precisions:
            most = convolutions[precision][1] / taken["convolution", precision]
            notebook = batch * count["notebook"] / taken["notebook", precision]
            for name in count:
                spent = taken[name, precision]
                rate = batch * count[name] / spent
                row(f"{name}, {count[name] / 1e9:.2f} GFLOPs an image", precision, batch, f"{batch / spent:.1f}",
                    f"{rate / 1e9:.0f}", f"{rate / most:.0%}", f"{rate / notebook:.2f}")
            row("fastest convolution", precision, "", "", f"{most / 1e9:.0f}", "100%", "")
        if best != "fp32":
            times = taken["notebook", "fp32"] / taken["ours", best] * count["ours"] / count["notebook"]
            row(f"ours in {best} against the notebook in fp32, as it is copied", "", batch, "", "", "", f"{times:.2f}")


def bench_sampling():
    model = scriptc.build_network({"image_size": args.size, "channels": channels, "timesteps": 1000}, device).eval()
    notebook = Notebook(matched_base()).to(device).eval().requires_grad_(False)
    x, t = torch.randn(64, 3, args.size, args.size, device=device), torch.zeros(64, dtype=torch.long, device=device)
    precision, steps = scriptc.choose_precision("auto", device), scriptc.build_parser().get_default("sample_steps")
    works = {f"this project, {steps} evaluations": lambda: scriptc.sample(model, 64, steps, precision=precision),
             "notebook, 300 evaluations": lambda: [notebook(x, t) for _ in range(300 // 30)]}
    taken = seconds(works, max(2, args.repeats // 3))
    taken["notebook, 300 evaluations"] *= 30  # a thirtieth is measured: all evaluations cost the same
    row("sampling, 64 at a time", "images/s")
    row(*["---"] * 2)
    for name in works:
        row(name, f"{64 / taken[name]:.2f}")


def bench_loop():
    """The real loop, by command, beside training_step on its own: they differ by clock, log and page."""
    with tempfile.TemporaryDirectory() as place:
        fill_folder(pathlib.Path(place, "faces"), 1000, args.size)
        bare, ratios = our_step(32, "auto"), []
        for attempt in range(3):
            flags = ["--dataroot", f"{place}/faces", "--results", f"{place}/results", "--checkpoint", f"{place}/{attempt}.pth",
                     "--image-size", str(args.size), "--device", device.type, "--batch-size", "32", "--max-steps", "30",
                     "--epochs", "1", "--sample-steps", "2", "--channels", *map(str, channels)]
            subprocess.run([sys.executable, str(ROOT / "scriptc.py"), *flags], check=True, stdout=subprocess.DEVNULL)
            with open(f"{place}/results/metrics.csv", newline="") as file:
                real = 32 / float([*csv.DictReader(file)][-1]["images_per_second"])
            ratios.append(real / seconds({"bare": bare}, 15)["bare"])
    row("step in the real loop against training_step alone, batch 32", f"{statistics.median(ratios):.3f}",
        "of three: " + ", ".join(f"{ratio:.3f}" for ratio in ratios))


def bench_start():
    """From the start of a process to the first optimizer step of a run with a warm cache, against importing torch alone."""
    with tempfile.TemporaryDirectory() as place:
        fill_folder(pathlib.Path(place, "faces"), 1000, args.size)
        common = ["--dataroot", f"{place}/faces", "--results", f"{place}/results", "--device", device.type, "--image-size",
                  str(args.size), "--batch-size", "2"]
        code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import scriptc; "
                "scriptc.training_step = lambda *_: os._exit(0); scriptc.main(sys.argv[2:])")
        started = [sys.executable, "-c", code, str(ROOT), *common]
        subprocess.run([*started, "--checkpoint", f"{place}/first.pth"], stdout=subprocess.DEVNULL)
        works = {"import": lambda: subprocess.run([sys.executable, "-c", "import torch, torchvision"]),
                 "start": lambda: subprocess.run([*started, "--checkpoint", f"{place}/new.pth"], stdout=subprocess.DEVNULL)}
        taken = seconds(works, args.repeats)
    row("process start to first step, against 1.3 x `import torch, torchvision` + 1 s",
        f"{taken['start'] / (1.3 * taken['import'] + 1):.2f}")


def bench_norm():
    """Group norm, forward and backward, of features as wide as those of each level, in both layouts."""
    row("group norm of 32 images, forward and backward", "precision", "channels last, ms", "channels first, ms", "ratio")
    row(*["---"] * 5)
    for level, width in enumerate(channels):
        side = args.size >> level
        for precision in sorted({scriptc.choose_precision("auto", device), "fp32"}):
            works = {}
            for layout in (torch.channels_last, torch.contiguous_format):
                x = torch.randn(32, width, side, side, device=device, dtype=scriptc.DTYPES[precision])
                x = x.contiguous(memory_format=layout).requires_grad_()
                norm = scriptc.Norm(8, width).to(device)
                works[layout] = lambda x=x, norm=norm: norm(x).backward(x.detach())
            last, first = seconds(works, 2 * args.repeats).values()
            row(f"{width} channels, {side} px", precision, f"{1e3 * last:.2f}", f"{1e3 * first:.2f}", f"{last / first:.1f}")


class Counter(TorchDispatchMode):
    """Counts operations and bytes by section and kind; `section` is set from outside, except for the backward pass."""

    def __init__(self):
        super().__init__()
        self.section, self.kinds = "forward", {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if torch._C._current_autograd_node() is not None:
            self.section = "backward"
        elif self.section == "backward":
            self.section = "clip"
        name = operation.overloadpacket.__name__
        view = any(value.alias_info and not value.alias_info.is_write for value in operation._schema.returns)
        if not view and not name.startswith(("empty", "new_empty", "_unsafe_view", "_record_function", "device")):
            tensors = [x for x in tree_leaves((arguments, options, result)) if isinstance(x, torch.Tensor)]
            counted = self.kinds.setdefault((self.section, name), [0, 0])
            counted[0] += 1
            counted[1] += sum(x.numel() * x.element_size() for x in tensors)
        return result


def count_forward_on_gpu(counter, widths):
    """Counts the forward pass of 64 images under CUDA's autocast rules, which differ from the CPU's. The tensors have
    shapes, but no values; there need not be a GPU, so only the rules of torch.autocast can be switched on by hand."""
    gpu = torch.device("cuda", 0)
    with FakeTensorMode(), gpu:
        model = scriptc.SimpleUnet(widths, args.size)
        layout = torch.channels_last
        for weight in model.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=layout)
        x_t = torch.empty(64, 3, args.size, args.size).contiguous(memory_format=layout)
        t = torch.zeros(64, dtype=torch.long)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        counter.section = "forward, 64 images, CUDA's autocast"
        with counter:
            F.l1_loss(model(x_t, t).float(), x_t, reduction="sum")
        torch.set_autocast_enabled("cuda", False)


def bench_launches():
    """Operations and bytes of one training step with the settings for a GPU, by section and kind."""
    widths = scriptc.default_channels(torch.device("cuda"), args.size)
    run = our_run(8, "bf16", widths)
    run.micro_batch = 8
    numbers = torch.arange(8)
    scriptc.training_step(run, numbers, 0.5)  # makes the moments
    counter = Counter()
    for name, optimizer in run.optimizers.items():
        optimizer.register_step_pre_hook(lambda *_, name=name: setattr(counter, "section", name))
        optimizer.register_step_post_hook(lambda *_: setattr(counter, "section", "average and counts"))
    with counter:
        scriptc.training_step(run, numbers, 0.5)
    count_forward_on_gpu(counter, widths)
    row("launches, 8 images", "operations", "MB read and written", "most frequent")
    row(*["---"] * 4)
    for section in dict.fromkeys(section for section, _ in counter.kinds):
        kinds = {name: counted for (where, name), counted in counter.kinds.items() if where == section}
        often = sorted(kinds, key=lambda name: -kinds[name][0])[:5]
        row(section, sum(count for count, _ in kinds.values()), f"{sum(size for _, size in kinds.values()) / 1e6:,.0f}",
            ", ".join(f"{kinds[name][0]} {name}" for name in often))
    step = [counted for (section, _), counted in counter.kinds.items() if "CUDA" not in section]
    row("all of 8 images", sum(count for count, _ in step), f"{sum(size for _, size in step) / 1e6:,.0f}", "")
    if device.type == "cuda":
        row("step on the GPU", "ms", "kernels", "ms in kernels", "TFLOP/s", "of a large matrix product", "GiB")
        row(*["---"] * 7)
        for precision in scriptc.DTYPES:
            bench_gpu(precision)


def bench_gpu(precision, batch=64, side=8192):
    """A training step on the GPU: its time, the kernels that it launches and their time, the memory, and the share of the
    rate of a matrix product of `side` x `side` in the same precision."""
    torch.cuda.reset_peak_memory_stats()
    step = our_step(batch, precision)
    step()
    memory = torch.cuda.max_memory_allocated() / 2**30
    left, right = torch.randn(2, side, side, device=device, dtype=scriptc.DTYPES[precision])
    taken = seconds({"step": lambda: [step() for _ in range(10)], "product": lambda: [left @ right for _ in range(10)]},
                    args.repeats)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages()
               if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]
    of_step = taken["step"] / 10
    of_product = taken["product"] / 10
    rate = batch * flops(scriptc.SimpleUnet(channels, args.size).to(device), True) / of_step
    row(f"{precision}, {batch} images", f"{1e3 * of_step:.1f}", sum(event.count for event in kernels),
        f"{sum(event.self_device_time_total for event in kernels) / 1e3:.1f}", f"{rate / 1e12:.0f}",
        f"{rate / (2 * side**3 / of_product):.0%}", f"{memory:.1f}")


def machine():
    """The processor or the GPU, with the instruction sets that matter for convolutions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = pathlib.Path("/proc/cpuinfo").read_text() if pathlib.Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", info)
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{name}\b", info)]
    return f"{found[1] if found else platform.processor()} ({', '.join(sets) or 'instruction sets unknown'})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: as the program chooses")
    parser.add_argument("--size", type=int, default=64, help="image size in px")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--channels", type=int, nargs="+", help="of this project's network (the device's default)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parts = {"step": bench_step, "sampling": bench_sampling, "loop": bench_loop, "start": bench_start,
             "norm": bench_norm, "launches": bench_launches}
    parser.add_argument("parts", nargs="*", metavar="PART", help="as --only")
    parser.add_argument("--only", nargs="+", default=[*parts], choices=[*parts])
    args = parser.parse_args()
    if {*args.parts} - parts.keys():
        parser.error(f"parts are {', '.join(parts)}")
    device = scriptc.choose_device(args.device)
    channels = args.channels or scriptc.default_channels(device, args.size)
    print(f"{machine()}, {scriptc.choose_precision('auto', device)}, {args.size} px, channels {channels}, "
          f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}\n")
    for part in args.parts or args.only:
        parts[part]()
        print()
