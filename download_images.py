"""Fill a folder with different face images from thispersondoesnotexist.com, or an address like it.

    python download_images.py                          # 50,000 originals into fake_face/faces, about 27 GB
    python download_images.py --count 2000 --size 128  # 2,000 small ones, about 20 MB
    python download_images.py --url http://127.0.0.1:8000/ --out faces --count 200 --max-rate 0

The site shows one image at a time and replaces it about once a second.  The program finds that out by
itself and asks just often enough to miss none.  A file is named by the hash of the bytes that were served, so
a folder never holds an image twice, however often runs are stopped, repeated or merged; the same command
again goes on.

Exit status: 0 the folder holds --count images, 1 gave up (it says why, and how to go on), 2 bad arguments,
130 stopped by Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import hashlib
import io
import math
import os
import queue
import random
import secrets
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import requests
import urllib3
from PIL import Image, ImageOps
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows, where a file that someone has open cannot be deleted: as good as a lock
    fcntl = None

MAX_BODY = 25_000_000  # bytes; an original has about 550,000
MAX_PIXELS = 64_000_000
MIN_SIDE = 64  # pixels of the shorter side
LASTING_TRIES = 5  # answers in a row that waiting does not help, until the program gives up
LONGEST_PAUSE = 30.0  # seconds between tries while the site is in passing trouble
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
SUFFIXES = {**FORMATS, "MPO": ".jpg"}  # MPO: what Pillow calls a JPEG with more pictures behind the first
IMAGE_SUFFIXES = {*SUFFIXES.values(), ".jpeg", ".tiff"}
HEADERS = {
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Accept": "image/jpeg,image/png,image/*;q=0.8",
    "Accept-Encoding": "identity",  # a small body cannot inflate to a huge one
    "Cache-Control": "no-cache",
}


class Trouble(Exception):
    """A request brought no good image.

    `lasting`: waiting does not help; `retry_after`: seconds that the site asks to wait.
    """

    def __init__(self, reason, lasting=False, retry_after=0.0):
        super().__init__(reason)
        self.lasting, self.retry_after = lasting, retry_after


class GiveUp(Exception):
    """The run cannot go on; the message says why."""


# ---------------------------------------------------------------------------------------------- one request


def fetch(session, url, timeout):
    """Return the body that `url` answers with (at most MAX_BODY bytes) and how many redirects led there.

    `timeout` (seconds) bounds the connection, each silence, and the body as a whole.  Raises Trouble.
    """
    deadline = time.monotonic() + timeout
    too_large = Trouble(f"the body is larger than {MAX_BODY // 1_000_000} MB", lasting=True)
    try:
        with session.get(url, timeout=timeout, stream=True) as response:
            code = response.status_code
            if code != 200:
                passing = code in (408, 425, 429) or code >= 500
                reason = f"the site answered {code} {response.reason}"
                raise Trouble(reason, lasting=not passing, retry_after=retry_after(response))
            if int(response.headers.get("Content-Length", 0)) > MAX_BODY:
                raise too_large
            pieces, total = [], 0
            # read1 returns what is there; read would wait for all it was asked for, hours if the body drips.
            while piece := response.raw.read1(1 << 16, decode_content=False):
                pieces.append(piece)
                total += len(piece)
                if total > MAX_BODY:
                    raise too_large
                if time.monotonic() > deadline:
                    raise Trouble(f"the body took longer than {timeout:g} s")
            return b"".join(pieces), len(response.history)
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise explain(error, timeout) from None


def retry_after(response):
    """Seconds that a Retry-After of either form asks to wait; without one, 1 for a 429 and 0 for the rest."""
    try:
        asked = urllib3.Retry().get_retry_after(response.raw)
    except urllib3.exceptions.InvalidHeader:
        asked = None
    return float(response.status_code == 429) if asked is None else asked


def explain(error, timeout):
    """The Trouble that an exception of requests, urllib3 or the socket stands for."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if any(isinstance(e, socket.gaierror) for e in chain):
        return Trouble("the site's name cannot be resolved", lasting=True)
    if isinstance(error, requests.exceptions.SSLError):
        return Trouble(f"no secure connection: {chain[-1]}", lasting=True)
    if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError)):
        return Trouble(f"the site was silent for {timeout:g} s")
    broken = (requests.ConnectionError, urllib3.exceptions.ProtocolError, ConnectionError)
    if isinstance(error, broken) and not isinstance(error, requests.exceptions.ProxyError):
        return Trouble(f"the connection broke: {chain[-1]}")
    return Trouble(f"the request failed: {error}", lasting=True)


# ------------------------------------------------------------------------------------------------ one image


def is_whole(head, tail):
    """Whether a file that begins with `head` and ends with `tail` (1 KB each) has the end of its format.

    Cheap, and no JPEG or PNG that was cut short passes; other formats do unless they are empty.
    """
    if head.startswith(b"\xff\xd8"):
        return b"\xff\xd9" in tail
    if head.startswith(b"\x89PNG"):
        return b"IEND" in tail
    return bool(head)


def check_image(body, size=None):
    """Decode `body` (bytes) in full; return the bytes to store and their suffix.

    These are `body` itself or, with `size` (pixels), a JPEG of its centre square at that size.  Raises
    Trouble, lasting for what is no image, too large or too small, passing for one that is broken.
    """
    too_many = Trouble(f"the image claims more than {MAX_PIXELS:,} pixels", lasting=True)
    if not body:
        raise Trouble("the body is empty")
    try:
        with Image.open(io.BytesIO(body), formats=list(FORMATS)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise too_many
            if min(image.size) < MIN_SIDE:
                raise Trouble(f"the image has only {image.width} x {image.height} pixels", lasting=True)
            image.load()
            if not is_whole(body[:1024], body[-1024:]):
                raise Trouble("the image is broken: it has no end")
            if size is None:
                return body, SUFFIXES[image.format]
            upright = ImageOps.exif_transpose(image).convert("RGB")
            square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
    except Trouble:
        raise
    except Image.UnidentifiedImageError:
        raise Trouble("the answer is not an image", lasting=True) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise too_many from None
    except Exception as error:  # Pillow answers damage with errors of many kinds
        raise Trouble(f"the image is broken: {error}") from None
    file = io.BytesIO()
    square.save(file, "JPEG", quality=95)
    return file.getvalue(), ".jpg"


# ----------------------------------------------------------------------------------------------- the folder


class Folder:
    """The images in a folder, counted by file name without suffix: one image has one, whoever saved it.

    A file begins under a hidden name, locked while it is written, and gets its own when it is whole.
    """

    def __init__(self, path, target):
        """Create `path` and look through it; `target`: how many images it shall hold.  Raises OSError."""
        self.path, self.target = Path(path), target
        self.known, self.broken = set(), set()
        self.measured = self.bytes = 0  # images whose size is known, and their size together
        self.closed, self.lock = False, threading.Lock()
        self.scanned, self.scan_seconds = -math.inf, 0.0
        self.path.mkdir(parents=True, exist_ok=True)
        self.clean()
        for name in self.images():
            try:
                with open(self.path / name, "rb") as file:
                    head, size = file.read(1024), file.seek(0, os.SEEK_END)
                    file.seek(max(0, size - 1024))
                    whole = is_whole(head, file.read(1024))
            except OSError:  # a folder of that name, or not ours to read
                whole = False
            if whole:
                self.add(name, size)
            else:
                self.broken.add(name)

    def __len__(self):
        return len(self.known)

    def images(self):
        """The names of the image files, without those known to be broken."""
        names = os.listdir(self.path)
        return [n for n in names if os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES and n not in self.broken]

    def add(self, name, size):
        self.known.add(os.path.splitext(name)[0])
        self.measured += 1
        self.bytes += size

    def save(self, stem, suffix, data):
        """Put `data` (bytes) into the file stem + suffix, whole or not at all; return whether it was added.

        It is not if the image is there, or the folder is full or closed.  Raises OSError.
        """
        with self.lock:
            # Another process may be filling the same folder: look again, near the end every time, else for at
            # most a twentieth of the time.
            if self.target - len(self) < 100 or time.monotonic() - self.scanned > 20 * self.scan_seconds:
                started = time.thread_time()
                self.known.update(os.path.splitext(name)[0] for name in self.images())
                self.scanned, self.scan_seconds = time.monotonic(), time.thread_time() - started
            if self.closed or stem in self.known or len(self) >= self.target:
                return False
            for last_try in (False, True):
                part = self.path / f".{stem}.{secrets.token_hex(4)}.part"
                try:
                    with open(part, "xb") as file:
                        if fcntl:
                            with contextlib.suppress(OSError):  # some network folders have no locks
                                fcntl.flock(file, fcntl.LOCK_EX)
                        file.write(data)
                    os.replace(part, self.path / (stem + suffix))
                    break
                except FileNotFoundError:  # another run cleaned up in one of the moments without the lock
                    if last_try:
                        raise
                except OSError:
                    part.unlink(missing_ok=True)
                    raise
            self.broken.discard(stem + suffix)
            self.add(stem + suffix, len(data))
            return True

    def clean(self):
        """Delete the hidden files that no running process has locked: those that killed runs left."""
        for part in self.path.glob(".*.part"):
            with contextlib.suppress(OSError):
                with open(part, "rb") as file:
                    if fcntl:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()

    def close(self):
        """Write nothing from now on."""
        with self.lock:
            self.closed = True
        self.clean()

    def check_disk(self, guess):
        """Compare what is free with what the rest needs; `guess`: bytes of an image while there is none.

        Raises GiveUp when it does not fit; where that rests on the guess it prints a warning instead.
        """
        size = self.bytes / self.measured if self.measured else guess
        rest, free = self.target - len(self), shutil.disk_usage(self.path).free
        if size * rest <= free:
            return
        message = (
            f"the {rest:,} images still wanted need about {size * rest / 1e9:.2f} GB, and {self.path} has "
            f"{free / 1e9:.2f} GB free: free some, use --size, "
            f"or --count {len(self) + int(0.95 * free / size)}"
        )
        if self.measured:
            raise GiveUp(message)
        print(f"Warning: {message}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------- the pace


class Pace:
    """When to ask next and how many requests may be in flight, from the answers alone.  Times are in seconds.

    `period` is the time from one request to the next.  A new image makes it a little shorter, a repeat makes
    it longer by seven times as much; so about one answer in eight is a repeat, the price of missing nothing.
    After a repeat the change is near and the next request follows soon: requests stay shortly behind the
    changes, where one that is late still finds its image.  An image that is shown for longer than the period,
    and a long run without a repeat, change it faster.

    Where answers are slower than the period, the number in flight doubles while that brings more new images.
    """

    STEP = 0.05  # growth of the period at a repeat
    USUAL_RUN = 10  # new images in a row, after which the site is probably faster than thought

    def __init__(self, max_rate, workers):
        self.shortest = 1 / max_rate if max_rate else 0.0
        self.workers = workers
        self.period = max(0.1, self.shortest)
        self.next_at = self.planned = self.last = 0.0
        self.first_seen = {}  # the latest images: which request, by its time, first brought them
        self.run, self.settled = 0, False  # new images since the last repeat; whether there was a repeat
        self.trusted = math.inf  # the period when the latest new image came, once there was a repeat
        self.limit, self.limit_pays_from, self.hold_until = min(2, workers), None, 0.0
        self.window = Counter()

    def asked(self, now, starved=False):
        """A request leaves at `now`; `starved`: others in flight kept it from leaving when it was due."""
        self.last = now
        # One that leaves a little late does not make the next ones late.
        self.planned = self.next_at if now - self.next_at < self.period else now
        self.next_at = self.planned + self.period
        self.window["starved"] += starved
        self.window["since"] = self.window["since"] or now

    def answered(self, sent, key, now):
        """At `now` the answer to the request of the time `sent` is here: the image `key` (any hashable)."""
        if key not in self.first_seen:
            self.window["new"] += 1
            self.first_seen[key] = sent
            if len(self.first_seen) > 64:
                del self.first_seen[next(iter(self.first_seen))]
            self.run += 1
            hurry = 2 ** max(0, min(self.run, 20) - self.USUAL_RUN)
            shrink = min(0.3, self.STEP / 7 * hurry) if self.settled else 0.3
            self.period = max(self.period * (1 - shrink), self.shortest, 0.001)
            self.trusted = self.period if self.settled else math.inf
            if sent == self.last:
                self.next_at = self.planned + self.period
        else:
            self.window["repeats"] += 1
            shown = sent - self.first_seen[key]
            overdue = shown - self.period
            if overdue > 0:
                # Once a period is known, one image that stays may be the site pausing: it can only double it.
                self.period = min(shown, 2 * self.trusted)
            self.period *= 1 + self.STEP
            self.run, self.settled = 0, True
            if sent == self.last:
                self.next_at = sent + max(self.period / 4, min(overdue / 2, 10.0), self.shortest)
        self.widen(now)

    def widen(self, now):
        """At the end of a window of answers, see whether the number in flight should change."""
        answers, seconds = self.window["new"] + self.window["repeats"], now - self.window["since"]
        if answers < max(8, 2 * self.limit) or seconds < 0.25:
            return
        rate = self.window["new"] / seconds
        wasted = self.limit_pays_from and rate < self.limit_pays_from and not self.window["repeats"]
        self.limit_pays_from = None
        if wasted:
            self.limit, self.hold_until = max(2, self.limit // 2), now + 5
        elif self.window["starved"] * 2 >= answers and self.limit < self.workers and now >= self.hold_until:
            self.limit, self.limit_pays_from = min(2 * self.limit, self.workers), 1.1 * rate
        self.window = Counter(since=now)


# --------------------------------------------------------------------------------------------- what is seen


class Display:
    """What became of the requests: a bar on a terminal, else a line every 30 s; both on standard error."""

    def __init__(self, folder):
        self.folder, self.counts, self.waiting = folder, Counter(), ""
        self.started = self.shown = time.monotonic()
        self.shown_kept = len(folder)
        self.bar = tqdm(
            total=folder.target,
            initial=len(folder),
            unit=" images",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            bar_format="{n_fmt}/{total_fmt} |{bar}| {rate_fmt}, {remaining} left{postfix}",
        )

    def update(self, last=False):
        """Show where things stand, if it is time to or for the `last` time."""
        now, kept = time.monotonic(), len(self.folder)
        text = f"{self.counts['seen']} seen again, {self.counts['refused']} refused{self.waiting}"
        if not self.bar.disable and (last or now - self.shown >= 0.2):
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(kept - self.bar.n)
            self.bar.refresh()
            self.shown = now
        elif self.bar.disable and now - self.shown >= 30:
            rate = (kept - self.shown_kept) / (now - self.shown)
            left = tqdm.format_interval((self.folder.target - kept) / rate) if rate else "unknown time"
            line = f"{kept}/{self.folder.target} kept, {rate:.2f} a second, {text}, {left} left"
            print(line, file=sys.stderr, flush=True)
            self.shown, self.shown_kept = now, kept

    def close(self):
        """End the bar and return the summary."""
        self.update(last=True)
        self.bar.close()
        seconds, counts = time.monotonic() - self.started, self.counts
        return (
            f"{counts['kept']} new images in {tqdm.format_interval(seconds)}, {counts['kept'] / seconds:.2f} "
            f"a second, from {counts['requests']} requests: {counts['seen']} seen again, {counts['refused']} "
            f"refused, {counts['trouble']} in passing trouble. {self.folder.path} holds {len(self.folder)}."
        )


# -------------------------------------------------------------------------------------------------- the run


class Result(NamedTuple):
    """What became of the request of the time `sent`: an image, by its hash `key`, or an error."""

    sent: float
    key: str = ""
    added: bool = False
    redirects: int = 0
    error: Exception | None = None


def work(jobs, results, decoders, folder, args):
    """A thread: make the requests in the queue `jobs` (their times) over one connection, for ever."""
    session = requests.Session()
    session.headers.update(HEADERS)
    while True:
        sent = jobs.get()
        try:
            body, redirects = fetch(session, args.url, args.timeout)
            key = hashlib.sha256(body).hexdigest()[:20]
            added = False
            if key not in folder.known:
                data, suffix = decoders.submit(check_image, body, args.size).result()
                added = folder.save(key, suffix, data)
            results.put(Result(sent, key, added, redirects))
        except Exception as error:  # the run decides about it, not the thread
            results.put(Result(sent, error=error))


def download(folder, args, display):
    """Ask until the folder is full.  Raises GiveUp, OSError when the folder cannot be written."""
    pace, counts = Pace(args.max_rate, args.workers), display.counts
    jobs, results = queue.SimpleQueue(), queue.SimpleQueue()
    decoders = ThreadPoolExecutor(os.cpu_count())  # each thread that decodes keeps megabytes for the next
    in_flight, threads, starved = set(), 0, False
    calm = trouble = urllib3.Retry(total=None, backoff_factor=0.5)  # counts failures in a row
    lasting, not_before, last_good, last_try, reason = 0, 0.0, 0.0, 0.0, ""
    stalled_after = 1.0  # seconds; a request that takes longer than most does not keep others from leaving
    disk_checked = -math.inf
    while len(folder) < folder.target:
        now = time.monotonic()
        if now - disk_checked > 10:
            folder.check_disk(guess=args.size**2 // 2 if args.size else 550_000)
            disk_checked = now
        # In trouble, a single request finds out whether it is over.
        limit = min(pace.limit, folder.target - len(folder)) if trouble is calm else 1
        due = max(pace.next_at, not_before, pace.last + pace.shortest)
        active = sum(now - sent < stalled_after for sent in in_flight)
        if due <= now and active < limit and len(in_flight) < args.workers:
            if len(in_flight) >= threads:
                threads += 1
                tools = jobs, results, decoders, folder, args
                threading.Thread(target=work, args=tools, daemon=True).start()
            pace.asked(now, starved)
            starved = False
            in_flight.add(now)
            jobs.put(now)
            counts["requests"] += 1
            continue
        starved = due <= now
        display.waiting = f", waiting {not_before - now:.0f} s because {reason}" if not_before > now else ""
        display.update()
        try:
            result = results.get(timeout=0.2 if starved else min(due - now, 0.2))
        except queue.Empty:
            continue
        now = time.monotonic()
        in_flight.discard(result.sent)
        if result.error is None:
            counts["kept" if result.added else "seen"] += 1
            counts["requests"] += result.redirects
            not_before = max(not_before, pace.last + (1 + result.redirects) * pace.shortest)
            stalled_after = max(1.0, 3 * (now - result.sent))
            trouble, lasting, last_good = calm, 0, max(last_good, result.sent)
            pace.answered(result.sent, result.key, now)
            continue
        if not isinstance(result.error, Trouble):
            raise result.error
        reason = str(result.error)
        counts["refused" if result.error.lasting else "trouble"] += 1
        not_before = max(not_before, now + result.error.retry_after)
        if result.sent < max(last_good, last_try):
            continue  # no try of its own: one sent later succeeded, or one out at the same time failed before
        lasting += result.error.lasting
        if lasting >= LASTING_TRIES:
            raise GiveUp(f"{reason}, {lasting} times in a row")
        if trouble.get_backoff_time() < LONGEST_PAUSE:  # urllib3 would count on until its numbers overflow
            trouble = trouble.increment("GET", args.url, error=result.error)
        pause = min(trouble.get_backoff_time(), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        last_try, not_before = now, max(not_before, now + pause)
        pace.next_at = min(pace.next_at, not_before)


# ---------------------------------------------------------------------------------------------- the command


def number(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind` from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = "number"  # which is how argparse calls it in messages
    return parse


def address(text):
    """An argparse type: an http or https address."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise argparse.ArgumentTypeError(f"{text} is not an address that starts with http:// or https://")
    return text


def parse_args(argv):
    """The settings; what makes no sense ends the program with status 2 and a sentence."""
    parser = argparse.ArgumentParser(
        description="Download different face images until the folder holds enough.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    faces = str(Path(__file__).resolve().parent / "fake_face" / "faces")
    add = parser.add_argument
    site = "https://thispersondoesnotexist.com/"
    add("--count", type=number(int, 1), default=50000, metavar="N", help="how many good images to stop at")
    add("--out", default=faces, metavar="DIR", help="where images go; created if missing")
    add("--url", type=address, default=site, help="what answers with an image")
    add("--workers", type=number(int, 1, 256), default=16, metavar="N", help="the most requests in flight")
    add("--max-rate", type=number(float, 0), default=20, metavar="R", help="requests a second; 0: no limit")
    add("--size", type=number(int, 16, 4096), metavar="PX", help="store PX x PX JPEGs, not what was served")
    add("--timeout", type=number(float, 0.01), default=15, metavar="S", help="seconds a request may take")
    args = parser.parse_args(argv)
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        parser.error(f"--out {args.out} is a file; name a folder")
    return args


def interrupt(*_):
    """A signal handler: end as Ctrl-C does."""
    raise KeyboardInterrupt


def main(argv=None):
    """Run the command with the arguments `argv` (default: those of the process); return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    go_on = "To go on: " + shlex.join([sys.executable, os.path.abspath(__file__), *argv])
    handlers = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    for which in handlers:  # SIGINT too: a shell starts what it puts into the background with SIGINT ignored
        signal.signal(which, interrupt)
    folder = display = None
    status, message = 0, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            folder = Folder(args.out, args.count)
            if folder.broken:
                some = ", ".join(sorted(folder.broken)[:9])
                print(f"{len(folder.broken)} broken files do not count: {some}", flush=True)
            display = Display(folder)
            download(folder, args, display)
    except KeyboardInterrupt:
        status, message = 130, f"Stopped. {go_on}"
    except GiveUp as error:
        status, message = 1, f"Gave up: {error}. {go_on}"
    except OSError as error:
        status, message = 1, f"Gave up: cannot write to {args.out}: {error.strerror or error}. {go_on}"
    finally:
        for which in handlers:  # what is left takes milliseconds, and the folder is clean after it
            signal.signal(which, signal.SIG_IGN)
        if folder:
            folder.close()
        if display:
            print(display.close(), flush=True)
        if message:
            print(message, file=sys.stderr, flush=True)
        for which, handler in handlers.items():
            signal.signal(which, handler)
    return status


if __name__ == "__main__":
    sys.exit(main())
