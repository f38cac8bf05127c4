"""Measure download_images.py against the local site; print a markdown table.

    python tests/benchmarks/bench_download.py               # every row, about seven minutes
    python tests/benchmarks/bench_download.py latency kill  # some
    python tests/benchmarks/bench_download.py --script OLD  # each row with the script OLD first, then with this one

Needs nothing but the repository; on Linux, for the memory row.  Rates count from the first request to the end
of the process, so that the start of Python is left out.
"""

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import requests
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from download_images import HEADERS, check_image  # noqa: E402  (found by the line above)
from tests.fake_site import FakeSite  # noqa: E402

NO_LIMIT = ("--max-rate", "0")


def start(script, site, out, count, *options):
    """Start the downloader `script` on a site, as a user does; returns the process."""
    command = [sys.executable, script, "--url", site.url, "--out", out]
    command += ["--count", str(count), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    """Wait for a downloader; returns the time of its end.  Raises RuntimeError if it failed."""
    output = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"the downloader ended with {process.returncode}: {output}")
    return time.monotonic()


def judge(out):
    """Decode every file of a folder; returns (images, different pictures, other or broken files)."""
    pictures, images, bad = set(), 0, 0
    for path in Path(out).iterdir():
        try:
            with Image.open(path) as image:
                pictures.add(hashlib.sha256(image.convert("RGB").tobytes()).digest())
                images += 1
        except OSError:
            bad += 1
    return images, len(pictures), bad


def verdict(out):
    return "{} images, {} different, {} other or broken files".format(*judge(out))


def pace(script, period, count, doubles=False):
    """A row: a new image every `period` seconds, twice as long in the second half if it `doubles`."""
    with tempfile.TemporaryDirectory() as out, FakeSite(period=period, latency=0.02, size=256) as site:
        process = start(script, site, out, count)
        if doubles:
            change = threading.Timer(period * count / 2, site.set_period, [2 * period])
            change.start()
        finish(process)
        kept = {path.stem for path in Path(out).iterdir()}
        last = site.shown() - 1
        shown = [site.name(i) in kept for i in range(20, last)]
        counted = sum(t >= site.times[0] + 20 * period for t in site.times)
        return (
            f"{sum(shown)} of {len(shown)} shown after the first 20 ({sum(shown) / len(shown):.1%}), "
            f"{counted / sum(shown):.2f} requests per kept image "
            f"({len(site.times) / count:.2f} from the start)"
        )


def plain_loop(site, out, count):
    """Images a second of what people write first: get, write, repeat."""
    out.mkdir()
    started = time.monotonic()
    for i in range(count):
        (out / f"{i}.jpg").write_bytes(requests.get(site.url, headers=HEADERS).content)
    return count / (time.monotonic() - started)


def latency(script):
    with tempfile.TemporaryDirectory() as out, FakeSite(period=0, latency=0.2) as site:
        plain = plain_loop(site, Path(out, "plain"), 40)
        before = len(site.times)
        count = 800
        rate = count / (finish(start(script, site, Path(out, "ours"), count, *NO_LIMIT)) - site.times[before])
        return f"{rate:.1f} images a second, plain loop {plain:.1f}: {rate / plain:.1f} times"


def slow(script):
    figures = []
    for images in (4, 2):  # a second that the connection can carry
        with tempfile.TemporaryDirectory() as out, FakeSite(period=0, size=256) as site:
            site.bandwidth = images * len(site.body(0))
            rate = 40 / (finish(start(script, site, out, 40, "--timeout", "1.5")) - site.times[0])
            figures.append(f"{rate:.2f} images a second of {images} ({len(site.times)} requests)")
    return ", ".join(figures)


def speed(script):
    with tempfile.TemporaryDirectory() as out, FakeSite(period=0, size=1024) as site:
        count = 400
        os.sync()  # before each part, so that none pays for what another left to be written
        plain = plain_loop(site, Path(out, "plain"), count)
        copies = Path(out, "copies")
        copies.mkdir()
        os.sync()
        started = time.monotonic()
        for path in Path(out, "plain").iterdir():
            (copies / path.name).write_bytes(check_image(path.read_bytes())[1])
        copied = count / (time.monotonic() - started)
        os.sync()
        before, cpu = len(site.times), os.times()
        seconds = finish(start(script, site, Path(out, "ours"), count, *NO_LIMIT)) - site.times[before]
        now = os.times()
        used = now.children_user + now.children_system - cpu.children_user - cpu.children_system
        served = now.user + now.system - cpu.user - cpu.system
        return (
            f"{count / seconds:.0f} images a second of {len(site.body(0)) / 1e6:.2f} MB; "
            f"plain loop {plain:.0f}, copied from disk with the same check {copied:.0f}. "
            f"A second of it took {used / seconds:.2f} s of CPU in the downloader "
            f"and {served / seconds:.2f} s in the site, of {os.cpu_count()} cores"
        )


def faults(script):
    with tempfile.TemporaryDirectory() as out, FakeSite(period=0, fault_rate=0.15, latency=0.01) as site:
        finish(start(script, site, out, 400, "--timeout", "1"))
        met = sum(site.counts.values()) - site.counts["good"]
        return f"{verdict(out)}; {met} faults of {len(site.counts) - 1} kinds in {len(site.times)} requests"


def kill(script):
    with tempfile.TemporaryDirectory() as out, FakeSite(period=0, size=256) as site:
        kills, moment = 0, random.Random(0)
        while kills < 50:
            process = start(script, site, out, 500, "--max-rate", "60")
            begin = len(site.times)
            while process.poll() is None and len(site.times) == begin:
                time.sleep(0.001)
            time.sleep(moment.uniform(0, 0.25))
            process.kill()
            process.communicate()
            kills += 1
        done = len(os.listdir(out))
        finish(start(script, site, out, 500, *NO_LIMIT))
        return f"{verdict(out)}; {kills} kills, {done} files after the last"


def two(script):
    with tempfile.TemporaryDirectory() as out, FakeSite(period=0, latency=0.02) as site:
        for process in [start(script, site, out, 300, *NO_LIMIT) for _ in range(2)]:
            finish(process)
        own = verdict(out)
    with tempfile.TemporaryDirectory() as out, FakeSite(period=0.05, latency=0.02) as site:
        for process in [start(script, site, out, 300) for _ in range(2)]:
            finish(process)
        return f"{own}; when both see the same images: {verdict(out)}"


def memory(script):
    def resident(what="VmRSS"):
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(what)), 0)

    with tempfile.TemporaryDirectory() as out, FakeSite(period=0, size=1024) as site:
        process = start(script, site, out, 2000, *NO_LIMIT)
        early = late = peak = 0
        while process.poll() is None:
            now = resident()
            late, peak = now or late, resident("VmHWM") or peak
            if not early and len(site.times) >= 200:
                early = now
            time.sleep(0.02)
        finish(process)
        return f"{early:.0f} MB after 200, {late:.0f} MB after 2,000, highest {peak:.0f} MB"


ROWS = {
    "pace-0.1": ("a new image every 0.1 s", lambda script: pace(script, 0.1, 300)),
    "pace-0.3": ("a new image every 0.3 s", lambda script: pace(script, 0.3, 120)),
    "pace-1": ("a new image every 1 s", lambda script: pace(script, 1.0, 50)),
    "pace-double": ("a period of 0.2 s that doubles half-way", lambda script: pace(script, 0.2, 200, doubles=True)),
    "latency": ("a new image every request, latency 200 ms, --max-rate 0", latency),
    "speed": ("a new image every request, 1024 px, latency 0, --max-rate 0", speed),
    "slow": ("a slow connection, 40 wanted, --timeout 1.5, so that it can answer 6 or 3 at once", slow),
    "faults": ("15% faults of every kind, 400 wanted", faults),
    "kill": ("killed 50 times while filling 500", kill),
    "two": ("two processes filling one folder of 300", two),
    "memory": ("memory over 2,000 images of 1024 px", memory),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default all")
    parser.add_argument("--script", type=Path, help="another version of download_images.py, to compare with this one")
    args = parser.parse_args()
    scripts, wanted = [ROOT / "download_images.py"], args.rows or list(ROWS)
    if args.script:
        scripts.insert(0, args.script)
        if not args.script.is_file():
            parser.error(f"--script {args.script} is not a file")
    if unknown := set(wanted) - set(ROWS):
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    os.environ["no_proxy"] = "127.0.0.1"
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < 4e9:
        parser.error(f"{tempfile.gettempdir()} has {free / 1e9:.1f} GB free; the rows need 4 GB")
    print("| row | case | script | figure | seconds |\n| --- | --- | --- | --- | --- |", flush=True)
    for row in wanted:
        case, measure = ROWS[row]
        for script in scripts:
            started = time.monotonic()
            figure = measure(script)
            seconds = time.monotonic() - started
            print(f"| {row} | {case} | {script.name} | {figure} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
