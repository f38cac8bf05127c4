"""Measure the data part of scriptc.py: reading images, starting again, the cost of a step, memory; print a markdown table.

    python tests/benchmarks/bench_data.py --faces FOLDER       # every row, about 15 minutes and 4 GB of disk on two cores
    python tests/benchmarks/bench_data.py cold again --images 100 --files 2000 --repeats 2        # some rows, small

Half of the 1024 px JPEGs are drawn, half are real images of FOLDER, upscaled; without --faces all are drawn. Needs Linux
for its memory rows. The second process of a row counts from after its imports.
"""

import argparse
import io
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import scriptc  # noqa: E402  (found by the line above)
from fake_face.draw_faces import draw_face  # noqa: E402

SIZE, BATCH = 64, 128
LANCZOS = Image.Resampling.LANCZOS


def make_jpeg(task):
    """Write one 1024 px JPEG: the drawn face of that number, or a real image upscaled."""
    source, path = task
    if isinstance(source, int):
        image = draw_face(source, 1024)
    else:
        image = ImageOps.fit(Image.open(source).convert("RGB"), (1024, 1024), LANCZOS)
    image.save(path, quality=90)


def make_jpegs(folder, count, faces):
    """`count` different JPEGs of 1024 px; where there are fewer real images than needed, drawn ones fill up."""
    real = sorted(faces.iterdir())[: count // 2] if faces else []
    sources = [*real, *range(count - len(real))]
    folder.mkdir(parents=True)
    with Pool(os.cpu_count()) as pool:
        pool.map(make_jpeg, [(source, folder / f"{number:05d}.jpg") for number, source in enumerate(sources)], 8)
    return len(real)


def make_many(folder, count):
    """`count` names for ten small JPEGs."""
    folder.mkdir(parents=True)
    originals = [folder / f"face_{number:06d}.jpg" for number in range(10)]
    for number, path in enumerate(originals):
        draw_face(number, SIZE).save(path)
    for number in range(10, count):
        os.link(originals[number % 10], folder / f"face_{number:06d}.jpg")


def make_cache(root, size=SIZE):
    """The cache of a folder of make_many, where each of the ten is decoded once."""
    pixels = [scriptc.read_image(root / f"face_{number:06d}.jpg", size) for number in range(10)]
    decode, scriptc.decode = scriptc.decode, lambda path, size: pixels[int(path[-5])]
    try:
        return load(root, size)
    finally:
        scriptc.decode = decode


def load(root, size=SIZE):
    """load_images() of a folder on the CPU: names, Faces, skipped."""
    args = argparse.Namespace(dataroot=root, image_size=size, results=root / "results", checkpoint=root / "c.pth")
    return scriptc.load_images(args, scriptc.list_files(args), torch.device("cpu"))


def child(command):
    """Run a command; returns (exit status, output, errors, seconds, peak resident memory in MB).

    The peak is read from /proc until the end, since ru_maxrss begins with that of the process that starts it.
    """
    peak, begun = 0, time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=errors)
        while process.poll() is None:
            if found := re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()):
                peak = int(found[1]) / 1024
            time.sleep(0.01)
        seconds = time.perf_counter() - begun
        for file in (out, errors):
            file.seek(0)
        return process.returncode, out.read(), errors.read(), seconds, peak


def train_command(root, results, *flags):
    return [sys.executable, ROOT / "scriptc.py", "--dataroot", root, "--results", results, "--device", "cpu",
            "--checkpoint", results / "checkpoint.pth", "--sample-steps", "2", *flags]


def quantiles(seconds):
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def cold(args, folder):
    """Two rows: images a second without a cache beside torchvision's, and how near the pixels are to a full decode."""
    root, workers = folder / "jpegs", os.cpu_count()
    real = make_jpegs(root / "faces", args.images, args.faces)
    steps = [transforms.Resize(SIZE, antialias=True), transforms.CenterCrop(SIZE), transforms.ToTensor()]
    theirs = DataLoader(ImageFolder(root, transforms.Compose(steps)), BATCH, num_workers=workers)
    ours_seconds, their_seconds = [], []
    for _ in range(args.repeats):
        begun = time.perf_counter()
        read = sum(len(images) for images, _ in theirs)
        their_seconds.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        names, faces, _ = load(root)
        ours_seconds.append(time.perf_counter() - begun)
        (root / f".faces_{SIZE}px.cache").unlink()
        assert read == len(names) == args.images
    ours, other = (args.images / statistics.median(seconds) for seconds in (ours_seconds, their_seconds))
    yield (f"{args.images} JPEGs of 1024 px ({real} of them real) to {SIZE} px, no cache yet",
           f"{ours:.0f} images/s, torchvision with {workers} workers {other:.0f}: {ours / other:.1f} times "
           f"(from {min(t / o for t, o in zip(their_seconds, ours_seconds)):.1f} to "
           f"{max(t / o for t, o in zip(their_seconds, ours_seconds)):.1f} in {args.repeats} repeats)", "6 times")

    ratios = []
    for name, image in zip(names, faces.pixels[faces.rows].numpy()):
        with Image.open(root / name) as jpeg:
            exact = np.asarray(ImageOps.fit(jpeg.convert("RGB"), (SIZE, SIZE), LANCZOS), np.float64)
        ratios.append(10 * np.log10(255**2 / max(((exact - image) ** 2).mean(), 1e-9)))
    by_kind = [f"{what} {np.mean(part):.1f}" for what, part in (("real", ratios[:real]), ("drawn", ratios[real:])) if part]
    yield ("the same pixels beside full decode and Lanczos", f"PSNR {np.mean(ratios):.1f} dB in the mean "
           f"({', '.join(by_kind)}), {min(ratios):.1f} dB the worst", "45 and 40 dB")


LOAD = """
import argparse, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
import scriptc, torch
root, begun = pathlib.Path(sys.argv[2]), time.perf_counter()
args = argparse.Namespace(dataroot=root, image_size=64, results=root / "results", checkpoint=root / "c.pth")
print(len(scriptc.load_images(args, scriptc.list_files(args), torch.device("cpu"))[0]), time.perf_counter() - begun)
"""


def again(args, folder):
    """Two rows: the first and the second start on many files, each in a new process."""
    root = folder / "again"
    make_many(root, args.files)
    starts = []
    for _ in range(1 + args.repeats):
        status, out, errors, _, peak = child([sys.executable, "-c", LOAD, ROOT, root])
        assert status == 0, errors
        found, seconds = map(float, out.split())
        assert found == args.files
        starts.append((seconds, peak))
    yield (f"first start, {args.files:,} small files", f"{starts[0][0]:.1f} s, peak RSS {starts[0][1]:.0f} MB", "")
    yield (f"second start, {args.files:,} files", f"ready in {quantiles([seconds for seconds, _ in starts[1:]])}, "
           f"peak RSS {max(peak for _, peak in starts[1:]):.0f} MB", "3 s")


def cost(args, folder):
    """One row: what data takes of a training step of the default network on this machine's CPU."""
    make_many(folder / "cost" / "faces", 5000)
    make_cache(folder / "cost" / "faces")
    flags = ["--dataroot", str(folder / "cost" / "faces"), "--results", str(folder / "cost"), "--image-size", str(SIZE)]
    settings, cpu = scriptc.read_settings(flags), torch.device("cpu")
    settings.channels, settings.batch_size = scriptc.default_channels(cpu, SIZE), BATCH
    run, batch, step = scriptc.Run(settings, cpu), [], []
    run.open_images()
    for _ in range(args.steps):
        rows, flip = torch.randint(len(run.faces.rows), (BATCH,)), torch.rand(BATCH) < 0.5
        begun = time.perf_counter()
        run.faces.batch(rows, flip)
        converted = time.perf_counter()
        scriptc.training_step(run, rows, 0.5)
        batch.append(converted - begun)
        step.append(time.perf_counter() - converted)
    batch, step = (1e3 * statistics.median(seconds) for seconds in (batch, step))
    yield (f"data in a step, {SIZE} px, batch {BATCH}, default channels, CPU, {run.precision}",
           f"gather, normalise and flip {batch:.2f} ms of a step of {step:,.0f} ms: {batch / step:.2%}", "2%")


def memory(args, folder):
    """One row: the peak memory of two trainings by command that differ in the number of images alone."""
    peaks = {}
    for count in (1000, args.many):
        root, results = folder / f"memory_{count}", folder / f"results_{count}"
        make_many(root, count)
        make_cache(root)
        flags = ["--max-steps", 3, "--channels", 16, 32]
        status, _, errors, seconds, peaks[count] = child(train_command(root, results, *flags))
        assert status == 0 and not errors, errors
        shutil.rmtree(root)
    few, many = peaks
    yield (f"peak RSS of a training, {few:,} and {many:,} images in the cache",
           f"{peaks[few]:.0f} and {peaks[many]:.0f} MB: {peaks[many] - peaks[few]:+.0f} MB", "within 100 MB")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sound_files():
    """{ending: bytes} of good images in the five formats, some in several kinds."""
    face, frames = draw_face(1, 256), [draw_face(number, 96) for number in range(3)]
    moving, exif = {"save_all": True, "append_images": frames[1:]}, Image.Exif()
    exif[0x0112] = 6  # turned
    return {"jpg": encoded(face, "JPEG"), "turned.jpg": encoded(face, "JPEG", progressive=True, exif=exif),
            "cmyk.jpg": encoded(face.convert("CMYK"), "JPEG"), "png": encoded(face, "PNG"),
            "palette.png": encoded(face.quantize(64), "PNG", transparency=bytes(range(64))),
            "moving.png": encoded(frames[0], "PNG", **moving), "gif": encoded(frames[0], "GIF", **moving),
            "webp": encoded(face, "WEBP"), "moving.webp": encoded(frames[0], "WEBP", **moving), "bmp": encoded(face, "BMP")}


def mutate(content, heads, chance):
    """`content` with a few bits flipped, a damaged header, a cut, another format's header, or a hole."""
    content = bytearray(content)
    how = chance.choice(("flip", "header", "cut", "swap", "hole"))
    if how == "flip":
        for _ in range(chance.choice((1, 3, 30))):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif how == "header":
        for _ in range(chance.choice((1, 3, 10))):
            content[chance.randrange(min(len(content), 200))] = chance.randrange(256)
    elif how == "cut":
        del content[chance.randrange(len(content)):]
    elif how == "swap":
        content[:16] = chance.choice(heads)
    else:
        at = chance.randrange(len(content))
        content[at : at + 50] = bytes(len(content[at : at + 50]))
    return content


def mutants(args, folder):
    """One row: a training by command on damaged files only, and one on their sound originals."""
    chance, sound = random.Random(0), sound_files()
    heads = [content[:16] for content in sound.values()]
    peaks = {}
    for what in ("sound", "damaged"):
        root, results = folder / what, folder / f"results_{what}"
        root.mkdir()
        for number in range(args.mutants):
            ending = chance.choice(sorted(sound))
            content = sound[ending] if what == "sound" else mutate(sound[ending], heads, chance)
            (root / f"{number:05d}.{ending}").write_bytes(content)
        flags = ["--max-steps", 1, "--channels", 8, "--batch-size", 16]
        status, _, errors, seconds, peaks[what] = child(train_command(root, results, *flags))
    listing = results / "skipped_images.txt"
    listed = {line.partition(": ")[0] for line in listing.read_text().splitlines() if line.partition(": ")[2]}
    used = set(load(root)[0])
    lost = {path.name for path in root.iterdir() if not path.name.startswith(".")} - used - listed
    yield (f"{args.mutants:,} damaged files of {len({ending.rpartition('.')[2] for ending in sound})} formats",
           f"exit status {status} after {seconds:.0f} s, {len(used)} used, {len(listed)} listed with a reason, {len(lost)} "
           f"neither, {len(errors)} bytes on stderr, peak {peaks['damaged']:.0f} MB ({peaks['sound']:.0f} MB undamaged)",
           "0, none lost, none on stderr")


def main():
    rows = {"cold": cold, "again": again, "cost": cost, "memory": memory, "mutants": mutants}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(rows)} (all)")
    parser.add_argument("--faces", type=Path, metavar="FOLDER", help="real images, for half of the JPEGs")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="JPEGs of 1024 px (1000)")
    parser.add_argument("--files", type=int, default=50_000, metavar="N", help="in the folder of the second start (50000)")
    parser.add_argument("--many", type=int, default=200_000, metavar="N", help="images in the larger cache (200000)")
    parser.add_argument("--mutants", type=int, default=2000, metavar="N", help="damaged files (2000)")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="training steps that are timed (12)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of what is compared in turn (5)")
    args = parser.parse_args()
    if unknown := set(args.rows) - rows.keys():
        parser.error(f"there is no row {', '.join(unknown)}: choose from {', '.join(rows)}")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, torch {torch.__version__}\n", flush=True)
    print("| case | figure | target |\n| --- | --- | --- |")
    for name in args.rows or rows:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows[name](args, Path(folder)):
                print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
