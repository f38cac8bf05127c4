"""Fill a folder with different face images from thispersondoesnotexist.com, or from an address like it.

    python download_images.py                          # 50,000 originals into fake_face/faces, about 27 GB
    python download_images.py --count 2000 --size 128  # 2,000 small ones, about 20 MB

The site shows one image at a time and replaces it about once a second. The program measures that period and sends just
enough requests to miss no image. A file is named by the hash of the bytes that were served, so a folder never holds an
image twice, however often runs are stopped, repeated or run side by side. The same command continues a stopped run.

Exit status: 0 the folder holds --count images, 1 gave up (it says why, and how to go on), 2 bad arguments, 130 stopped
by Ctrl-C or SIGTERM. The order below: one request, one image, the folder, the pace, the display, the run, the command.
"""

import argparse
import email.utils
import hashlib
import io
import math
import os
import queue
import random
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import requests
from PIL import Image, ImageOps
from tqdm import tqdm

MAX_BODY, MAX_PIXELS, MIN_SIDE = 25_000_000, 64_000_000, 64  # bytes, pixels, and pixels of the shorter side
MAX_PERMANENT_ERRORS = 5  # consecutive ones, until the program gives up
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0  # seconds between two tries, after one error and after many
LONGEST_RETRY_AFTER = 600.0  # seconds; the site may ask for more
GIVE_UP_AFTER = 120.0  # seconds of transient errors in a run that has received no image at all
LEFTOVER_AGE = 3600.0  # seconds; no run takes that long to write one temporary file
LINE_EVERY, TICK = 30.0, 0.2  # seconds between lines of text; between updates of the bar and checks of deadlines
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
IMAGE_SUFFIXES = {*FORMATS.values(), ".jpeg"}
AGENT = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
HEADERS = {"User-Agent": AGENT, "Accept": "image/jpeg,image/png,image/*;q=0.8"}
HEADERS |= {"Accept-Encoding": "identity", "Cache-Control": "no-cache"}


def printable(text):
    """At most 300 characters of `text`, with "?" for control characters: they could steer a terminal or forge lines."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:300])


class RequestError(Exception):
    """A request brought no good image. `permanent`: waiting does not help; `retry_after`: seconds the site asks for."""

    def __init__(self, reason, permanent=False, retry_after=0.0):
        super().__init__(printable(reason))
        self.permanent, self.retry_after = permanent, retry_after


class GiveUp(Exception):
    """The run cannot go on; the message says why."""


# --------------------------------------------------------------------------------------------------------- one request
class Adapter(requests.adapters.HTTPAdapter):
    """Sends one request at a time, which another thread can abort: its timeouts begin anew with every byte received."""

    def __init__(self):
        super().__init__()
        self.aborted, self.sockets = False, deque(maxlen=8)  # several, as redirects lead to other hosts

    def get_connection_with_tls_context(self, *args, **kwargs):
        pool, sockets = super().get_connection_with_tls_context(*args, **kwargs), self.sockets

        class Connection(type(pool).ConnectionCls):
            def connect(self):
                super().connect()
                sockets.append(self.sock)

        pool.ConnectionCls = Connection
        return pool

    def abort(self):
        """End the request in flight: its thread sees an exception or the end of the body."""
        self.aborted = True
        for sock in list(self.sockets):
            with suppress(OSError):  # closed already
                sock.shutdown(socket.SHUT_RDWR)


def new_session():
    """A session with one Adapter, `session.adapter`, for all addresses."""
    session = requests.Session()
    session.headers.update(HEADERS)
    session.adapter = session.adapters["http://"] = session.adapters["https://"] = Adapter()
    return session


def fetch(session, url, timeout):
    """Return the body (bytes) that `url` answers with, and the number of redirects on the way. Raises RequestError.

    `timeout` (seconds) bounds each silence. To bound the whole request, another thread aborts `session.adapter`.
    """
    try:
        with session.get(url, timeout=timeout, stream=True) as response:
            code, body = response.status_code, bytearray()
            if code != 200:
                wait, transient = retry_after(response), code in (408, 425, 429) or code >= 500
                asked = f" and asked to wait {wait:.0f} s" if "Retry-After" in response.headers else ""
                raise RequestError(f"the site answered {code} {response.reason}{asked}", not transient, wait)
            for piece in response.iter_content(1 << 16):
                body += piece
                if len(body) > MAX_BODY:
                    raise RequestError(f"the body is larger than {MAX_BODY // 1_000_000} MB", permanent=True)
        if session.adapter.aborted:  # a body of unknown length seems complete
            raise TimeoutError
        return bytes(body), len(response.history)
    except RequestError:
        raise
    except Exception as error:  # not everything that urllib3, http.client and ssl raise is wrapped by requests
        raise explain(TimeoutError() if session.adapter.aborted else error, timeout) from None


def retry_after(response):
    """Seconds to wait, at most LONGEST_RETRY_AFTER, by the header of that name; without one, 1 after a 429, else 0."""
    asked = response.headers.get("Retry-After", "1" if response.status_code == 429 else "0")
    date = None if asked.isdecimal() else email.utils.parsedate_tz(asked)
    seconds = email.utils.mktime_tz(date) - time.time() if date else float(asked) if asked.isdecimal() else 1.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def explain(error, timeout):
    """The RequestError for any other exception of a request."""
    cause = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, TimeoutError):
        return RequestError(f"there was no complete answer within {timeout:g} s")
    if isinstance(cause, socket.gaierror):
        return RequestError("the site's name cannot be resolved", permanent=True)
    transient = isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError))
    transient = transient and not isinstance(error, (requests.exceptions.ProxyError, requests.exceptions.SSLError))
    return RequestError(f"the {'connection broke' if transient else 'request failed'}: {cause}", not transient)


# ----------------------------------------------------------------------------------------------------------- one image
def is_whole(head, tail):
    """Whether a file with this first and last KB is complete; of formats other than JPEG and PNG: is not empty."""
    end = b"\xff\xd9" if head.startswith(b"\xff\xd8") else b"IEND" if head.startswith(b"\x89PNG") else b""
    return bool(head) and end in tail


def check_image(body, size=None):
    """Suffix and bytes to store for `body`: itself or, with `size` (pixels), its centre square. Raises RequestError."""
    if not is_whole(body[:1024], body[-1024:]):
        raise RequestError("the image is broken: it is empty or has no end")
    try:
        with Image.open(io.BytesIO(body), formats=list(FORMATS)) as image:
            if min(image.size) < MIN_SIDE or image.width * image.height > MAX_PIXELS:
                raise RequestError(f"the image has {image.width} x {image.height} pixels", permanent=True)
            image.load()
            if size is None:
                return FORMATS.get(image.format, ".jpg"), body  # Pillow calls a JPEG with several pictures MPO
            upright, file = ImageOps.exif_transpose(image).convert("RGB"), io.BytesIO()
            ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS).save(file, "JPEG", quality=95)
            return ".jpg", file.getvalue()
    except RequestError:
        raise
    except (Image.UnidentifiedImageError, Image.DecompressionBombError):
        raise RequestError(f"the answer is not an image of at most {MAX_PIXELS:,} pixels", permanent=True) from None
    except Exception as error:  # Pillow raises many kinds of exceptions for damaged files
        raise RequestError(f"the image is broken: {error}") from None


# ---------------------------------------------------------------------------------------------------------- the folder
class Folder:
    """The images in a folder, counted by file name without suffix: the same image has the same name in every run."""

    def __init__(self, path, target, guess):
        """Look through `path`, to hold `target` images; `guess`: bytes of one, while there is none. Raises OSError."""
        self.path, self.target, self.guess = path, target, guess
        self.known, self.sizes = set(), []  # names without suffix; bytes of the images that this run has seen
        self.closed, self.lock = False, threading.Lock()
        path.mkdir(parents=True, exist_ok=True)
        self.leftovers = list(path.glob(".*.part"))
        self.remove_leftovers(LEFTOVER_AGE)
        self.broken = self.image_files()
        for name in sorted(self.broken):
            with suppress(OSError), open(path / name, "rb") as file:
                head, size = file.read(1024), file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 1024))
                if is_whole(head, file.read(1024)):
                    self.broken.remove(name)
                    self.known.add(os.path.splitext(name)[0])
                    self.sizes.append(size)

    def image_files(self):
        return {name for name in os.listdir(self.path) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES}

    def save(self, stem, suffix, data):
        """Write `data` (bytes) to stem + suffix if it is new and wanted; return whether. Raises OSError, GiveUp."""
        with self.lock:
            if self.target - len(self.known) < 100 or len(self.known) % 32 == 0:  # other runs may add images as well
                self.known.update(os.path.splitext(name)[0] for name in self.image_files() - self.broken)
                if self.sizes:
                    self.check_disk()
            if self.closed or stem in self.known or len(self.known) >= self.target:
                return False
            # Written under a temporary name first, so that a killed run leaves no half-written image.
            part = self.path / f".{stem}.{os.urandom(4).hex()}.part"
            try:
                part.write_bytes(data)
                part.replace(self.path / (stem + suffix))
            finally:
                part.unlink(missing_ok=True)
            self.known.add(stem)
            self.sizes.append(len(data))
            return True

    def remove_leftovers(self, age):
        """Remove the temporary files that were there when this run began and are older than `age` (seconds)."""
        for part in self.leftovers:
            with suppress(OSError):  # renamed or removed by another run
                if time.time() - part.stat().st_mtime > age:
                    part.unlink()

    def close(self):
        """Write nothing from now on, and remove what killed runs left: no run is still writing those files."""
        with self.lock:
            self.closed = True
        self.remove_leftovers(1.0)

    def check_disk(self):
        """Return how many images are wanted still, and their bytes. Raises GiveUp if these do not fit on the disk."""
        rest, free = self.target - len(self.known), shutil.disk_usage(self.path).free
        size = sum(self.sizes) / len(self.sizes) if self.sizes else self.guess
        if rest * size > free:
            text = f"{self.path} has {free / 1e9:.2f} GB free, the {rest:,} images wanted need {rest * size / 1e9:.2f}"
            text += f" GB: free some, use --size, or --count {len(self.known) + int(0.95 * free / size)}"
            if self.sizes:
                raise GiveUp(text)
            print(f"Warning: {text}", file=sys.stderr, flush=True)  # the size of an image is a guess
        return rest, rest * size


# ------------------------------------------------------------------------------------------------------------ the pace
class Pace:
    """When the next request leaves, from the answers alone. Times are in seconds; `max_rate` is in requests a second.

    `period` is the time between two requests. A new image makes it a little shorter, a repeat longer by seven times as
    much, so about one answer in eight is a repeat: the price of missing nothing. After a repeat the image is about to
    change, so the next request follows soon: requests stay shortly behind the changes, where one that is late still
    finds its image. An image that stays, and many new images without a repeat, change the period faster.
    """

    def __init__(self, max_rate):
        self.shortest = 1 / max_rate if max_rate else 0.0
        self.period = max(0.1, self.shortest)
        self.last = self.next_at = self.not_before = 0.0  # latest request; next one by the period; no request earlier
        self.first_sent = {}  # the latest images: when the request left that first brought them
        self.run, self.trusted = 1, math.inf  # new images since the latest repeat; the period after that repeat
        self.errors = self.permanent = 0  # consecutive errors, and how many of them are permanent
        self.counts_from = 0.0  # failures of requests that left earlier say nothing new

    def received(self, sent, key, redirects=0):
        """The request that left at `sent` brought the image `key` (any hashable), after `redirects` more requests."""
        self.errors, self.permanent, self.counts_from = 0, 0, max(self.counts_from, sent)
        shown = sent - self.first_sent.setdefault(key, sent)
        if len(self.first_sent) > 64:
            del self.first_sent[next(iter(self.first_sent))]
        if self.first_sent[key] == sent:
            self.trusted = self.trusted if self.run else self.period
            self.run = min(self.run + 1, 20)
            shrink = 0.05 / 7 * 2 ** max(0, self.run - 10)  # a long run: the site is probably faster
            self.period = wait = max(self.period * (1 - min(0.3, shrink)), self.shortest, 0.001)
        else:
            overdue = shown - self.period
            if overdue > 0:  # a single image that stays may be a pause of the site, so it can only double the period
                self.period = min(shown, 2 * self.trusted)
            self.run, self.period = 0, self.period * 1.05
            wait = max(self.period / 4, min(overdue / 2, 10.0), self.shortest)
        next_at = sent + wait if sent == self.last else self.next_at
        self.next_at = max(next_at, self.last + (1 + redirects) * self.shortest)

    def failed(self, sent, error, now):
        """The request that left at `sent` failed at `now` with the RequestError `error`. Raises GiveUp."""
        self.not_before = max(self.not_before, now + error.retry_after)
        if sent >= self.counts_from:
            self.errors, self.permanent, self.counts_from = self.errors + 1, self.permanent + error.permanent, now
            pause = min(FIRST_PAUSE * 2 ** min(self.errors - 1, 20), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            self.not_before = max(self.not_before, now + pause)
        if self.permanent >= MAX_PERMANENT_ERRORS:
            raise GiveUp(f"{error}, {self.permanent} times in a row")


# --------------------------------------------------------------------------------------------------------- the display
class Display:
    """Counts what the requests brought, and shows it: a bar on a terminal, else lines; both on standard error."""

    def __init__(self, folder):
        self.folder, self.begin, self.counts = folder, len(folder.known), Counter()
        self.started = self.shown = time.monotonic()

    def update(self, waiting="", last=False):
        """Show the counts and the text `waiting`, if it is time to or for the `last` time."""
        now, terminal, done = time.monotonic(), sys.stderr.isatty(), len(self.folder.known)
        if now - self.shown < (TICK if terminal else LINE_EVERY) and not last:
            return
        self.shown, columns = now, os.get_terminal_size(sys.stderr.fileno()).columns - 1 if terminal else None
        line = tqdm.format_meter(
            done, max(done, self.folder.target), now - self.started, columns, initial=self.begin, unit=" images",
            bar_format="{n_fmt}/{total_fmt} " + "|{bar}| " * terminal + "{rate_fmt}, {remaining} left{postfix}",
            ascii=" #", postfix=f"{self.counts['seen']} seen again, {self.counts['refused']} refused{waiting}",
        )  # fmt: skip
        print("\r" * terminal + line, end="" if terminal and not last else "\n", file=sys.stderr, flush=True)

    def close(self):
        """Show the counts once more, and the summary."""
        self.update(last=True)
        seconds, counts = time.monotonic() - self.started, self.counts
        new = f"{counts['kept']} new images in {tqdm.format_interval(seconds)}, {counts['kept'] / seconds:.2f} a second"
        rest = f"{counts['seen']} seen again, {counts['refused']} refused, {counts['transient']} transient errors"
        there = f"{self.folder.path} holds {len(self.folder.known)}"
        print(f"{new}, from {counts['requests']} requests: {rest}. {there}.", flush=True)


# ------------------------------------------------------------------------------------------------------------- the run
def get_image(session, folder, args):
    """Make a request; return the image's hash, whether `folder` gained it, and the redirects. Raises RequestError."""
    body, redirects = fetch(session, args.url, args.timeout)
    key = hashlib.sha256(body).hexdigest()[:20]
    return key, key not in folder.known and folder.save(key, *check_image(body, args.size)), redirects


def download(folder, args, display):
    """Send requests until the folder is full. Raises GiveUp, and OSError if it cannot be written."""
    pace, counts, reason = Pace(args.max_rate), display.counts, ""
    executor, finished = ThreadPoolExecutor(args.workers), queue.SimpleQueue()
    in_flight, idle = {}, []  # future: (time sent, session); sessions without a request
    started = time.monotonic()
    while len(folder.known) < folder.target:
        now = time.monotonic()
        for sent, session in in_flight.values():
            if now - sent > args.timeout:
                session.adapter.abort()
        if pace.errors and not (counts["kept"] or counts["seen"]) and now - started > GIVE_UP_AFTER:
            tried = f"{counts['requests']} requests to {args.url} in {now - started:.0f} s"
            raise GiveUp(f"{tried} brought no image; the last error: {reason}")
        # After an error, one request at a time finds out whether the site works again.
        limit = 1 if pace.errors else min(args.workers, folder.target - len(folder.known))
        wait = max(pace.not_before, pace.last + pace.shortest if pace.errors else pace.next_at) - now
        if wait <= 0 and len(in_flight) < limit:
            session = idle.pop() if idle else new_session()
            future = executor.submit(get_image, session, folder, args)
            in_flight[future] = now, session
            future.add_done_callback(finished.put)
            pace.last, pace.next_at = now, now + pace.period
            counts["requests"] += 1
            continue
        display.update(f", waiting {wait:.0f} s because {reason}" if now < pace.not_before else "")
        try:
            future = finished.get(timeout=min(wait, TICK) if wait > 0 else TICK)
        except queue.Empty:
            continue
        sent, session = in_flight.pop(future)
        try:
            key, added, redirects = future.result()
        except RequestError as error:  # its session is not used again
            reason = str(error)
            counts["refused" if error.permanent else "transient"] += 1
            pace.failed(sent, error, time.monotonic())
            continue
        idle += [] if session.adapter.aborted else [session]
        counts["kept" if added else "seen"] += 1
        counts["requests"] += redirects
        pace.received(sent, key, redirects)


# --------------------------------------------------------------------------------------------------------- the command
def parse_args(argv):
    """The settings. Bad arguments end the program with status 2 and a sentence."""
    parser = argparse.ArgumentParser(description="Download different face images until the folder holds enough.")
    faces, site = Path(__file__).resolve().parent / "fake_face" / "faces", "https://thispersondoesnotexist.com/"
    add = parser.add_argument_group("images").add_argument
    add("--count", type=int, default=50000, metavar="N", help="good images to stop at (default: 50000)")
    add("--out", type=Path, default=faces, metavar="DIR", help="folder (default: fake_face/faces beside the script)")
    add("--size", type=int, metavar="PX", help="store JPEGs of PX x PX pixels (default: what was served)")
    add = parser.add_argument_group("requests").add_argument
    add("--url", default=site, help="any address that answers with an image (default: %(default)s)")
    add("--workers", type=int, default=16, metavar="N", help="the most requests in flight (default: 16)")
    add("--max-rate", type=float, default=20, metavar="R", help="the most requests a second; 0: no limit (default: 20)")
    add("--timeout", type=float, default=15, metavar="S", help="seconds that a request may take (default: 15)")
    args = parser.parse_args(argv)
    ranges = {"count": (1, 1e9), "workers": (1, 256), "max-rate": (0, 1e9), "size": (16, 4096), "timeout": (0.01, 1e6)}
    for name, (low, high) in ranges.items():
        value = getattr(args, name.replace("-", "_"))
        if value is not None and not low <= value <= high:
            parser.error(f"--{name} must be from {low:g} to {high:g}, not {value}")
    try:
        new_session().get_adapter(requests.Request("GET", args.url).prepare().url)
    except requests.RequestException as error:
        parser.error(f"--url is not an address that starts with http:// or https://: {error}")
    if os.path.isfile(args.out):
        parser.error(f"--out {args.out} is a file; name a folder")
    return args


def print_plan(folder):
    """Say which files are broken, and in one sentence what the run will do. Raises GiveUp if the disk is too small."""
    if folder.broken:
        some = ", ".join(map(printable, sorted(folder.broken)[:9]))
        print(f"{len(folder.broken)} broken files do not count: {some}", flush=True)
    if len(folder.known) < folder.target:
        rest, size = folder.check_disk()
        duration = f"{rest / 3600:.1f} hours" if rest > 5400 else f"{math.ceil(rest / 60)} min"
        there = f"{folder.path} holds {len(folder.known):,} of {folder.target:,} images wanted"
        cost = f"the other {rest:,} take about {duration} at one a second, and {size / 1e9:.2f} GB of disk"
        print(f"{there}; {cost}; the training can be started meanwhile.", flush=True)


def main(argv):
    """Run the command with the arguments `argv`; return the exit status."""
    args = parse_args(argv)
    try:
        folder = Folder(args.out, args.count, guess=args.size**2 // 2 if args.size else 550_000)
        with closing(Display(folder)) as display, closing(folder):
            print_plan(folder)
            download(folder, args, display)
        return 0
    except KeyboardInterrupt:
        status, message = 130, "Stopped"
    except GiveUp as error:
        status, message = 1, f"Gave up: {error}"
    except OSError as error:
        status, message = 1, f"Gave up: cannot write to {args.out}: {printable(error.strerror or error)}"
    command = shlex.join([sys.executable, os.path.abspath(__file__), *argv])
    print(f"{message}. To go on: {command}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    for signal_number in (signal.SIGTERM, signal.SIGINT):  # SIGINT too: shells ignore it for background commands
        signal.signal(signal_number, signal.default_int_handler)
    # Without waiting for requests in flight: a thread that connects cannot be interrupted, and can save nothing.
    os._exit(main(sys.argv[1:]))
