"""Fill a folder with different face images from thispersondoesnotexist.com, or from an address like it.

    python download_images.py                          # 50,000 originals into fake_face/faces, about 27 GB
    python download_images.py --count 2000 --size 128  # 2,000 small ones, about 20 MB

The site replaces its image about once a second. The program measures that period and sends just enough
requests to miss none. A file is named by the hash of what was served, so no image is stored twice.

Exit status: 0 the folder holds --count images, 1 gave up, 2 bad arguments, 130 stopped by Ctrl-C or a signal.
"""

import argparse
import concurrent.futures
import ctypes
import hashlib
import io
import ipaddress
import os
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import sys
import threading
import time
from collections import Counter, deque
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urljoin

import requests
from PIL import Image, ImageOps
from requests.adapters import HTTPAdapter, Retry
from tqdm import tqdm

MAX_BODY = 25_000_000  # bytes
MAX_PIXELS = 64_000_000
MIN_SIDE = 64  # pixels of the shorter side
MAX_REDIRECTS = 5  # of one request
MAX_PERMANENT_ERRORS = 5  # in a row, until a run that has received no image gives up
GIVE_UP_AFTER = 120.0  # seconds in which every request fails, in a run that has received no image
LONGEST_OUTAGE = 3600.0  # the same, in a run that has received images
LONGEST_PAUSE = 30.0  # seconds between two tries, after many errors
LONGEST_RETRY_AFTER = 600.0  # seconds; the site may ask for more
LINE_EVERY = 30.0  # seconds between two lines of text
TICK = 0.2  # seconds between two updates of the bar, and between two checks of deadlines
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
SUFFIXES = {*FORMATS.values(), ".jpeg"}
HEADERS = {"Accept": "image/jpeg,image/*;q=0.8", "Accept-Encoding": "identity", "Cache-Control": "no-cache",
    "User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"}  # fmt: skip


def printable(text):
    """At most 300 characters of `text`; "?" replaces control characters, which could change the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:300])


def show(text, file=None, end="\n"):
    """Print `text` at once. An output that was closed (a terminal, `| head`) does not end the download."""
    with suppress(OSError):
        print(text, file=file, end=end, flush=True)


class RequestError(Exception):
    """A request brought no good image. `permanent`: waiting does not help; `retry_after`: seconds to wait."""

    def __init__(self, reason, permanent=False, retry_after=0.0):
        super().__init__(printable(reason))
        self.permanent = permanent
        self.retry_after = retry_after


class GiveUp(Exception):
    """The run cannot go on; the message says why."""


# ------------------------------------------------------------------------------------- one request, one image
class Adapter(HTTPAdapter):
    """Sends one request at a time, which another thread can abort: timeouts start over with every byte."""

    def __init__(self):
        super().__init__()
        self.first_host = None  # other hosts, to which it redirects, must have public addresses
        self.aborted = False
        self.sockets = deque(maxlen=8)  # several, as redirects lead to other hosts

    def get_connection_with_tls_context(self, request, *args, **kwargs):
        pool = super().get_connection_with_tls_context(request, *args, **kwargs)
        self.first_host = self.first_host or pool.host

        class Connection(type(pool).ConnectionCls):
            def connect(connection):  # `self` is the adapter
                if connection.host != self.first_host and not connection.proxy:
                    addresses = [entry[4][0] for entry in socket.getaddrinfo(connection.host, None)]
                    if not all(ipaddress.ip_address(address).is_global for address in addresses):
                        raise RequestError(f"a redirect leads to the internal {connection.host}", True)
                super().connect()
                self.sockets.append(connection.sock)
        pool.ConnectionCls = Connection
        if request.url.lower().startswith("https:") and "ssl_context" not in pool.conn_kw:
            with suppress(ssl.SSLError):  # the system's certificates count, too, if none is damaged
                pool.conn_kw["ssl_context"] = ssl.create_default_context()
        return pool

    def abort(self):
        """End the request in flight: its thread sees an exception or the end of the body."""
        self.aborted = True
        for sock in list(self.sockets):
            with suppress(OSError):  # closed already
                socket.socket.shutdown(getattr(sock, "socket", sock), socket.SHUT_RDWR)  # below TLS


def new_session():
    """A session with one Adapter, `session.adapter`, for http and https and nothing else."""
    session = requests.Session()
    session.adapter = session.adapters["http://"] = session.adapters["https://"] = Adapter()
    session.get_redirect_target = lambda response: None  # if requests finds one, it reads the whole body
    return session


def fetch(session, url, timeout):
    """The bytes at `url`. `timeout`: most seconds without data, a quarter to connect. Raises RequestError."""
    try:
        for session.adapter.redirects in range(MAX_REDIRECTS + 1):  # counted for download()
            with session.get(url, headers=HEADERS, timeout=(timeout / 4, timeout), stream=True) as response:
                if not response.is_redirect:
                    return read_body(response)
                url = urljoin(response.url, response.headers["Location"].encode("latin-1").decode())
        raise RequestError(f"the site redirects more than {MAX_REDIRECTS} times", permanent=True)
    except Exception as error:  # requests does not wrap all that urllib3, http.client and ssl raise
        raise (error if isinstance(error, RequestError) else
               explain(TimeoutError() if session.adapter.aborted else error, timeout)) from None  # fmt: skip


def read_body(response):
    """The body of an answer. Raises RequestError if its status is not 200, or if it is too large."""
    if (code := response.status_code) != 200:
        header = response.headers.get("Retry-After")
        wait = min(Retry().parse_retry_after(header or str(int(code == 429))), LONGEST_RETRY_AFTER)
        asked = f" and asked to wait {wait:.0f} s" if header else ""
        permanent = code < 500 and code not in (408, 425, 429)
        raise RequestError(f"the site answered {code} {response.reason}{asked}", permanent, wait)
    body = bytearray()
    for piece in response.iter_content(1 << 16):
        body += piece
        if len(body) > MAX_BODY:
            raise RequestError(f"the body is larger than {MAX_BODY // 1_000_000} MB", permanent=True)
    return bytes(body)


def explain(error, timeout):
    """The RequestError for any other exception of a request."""
    cause = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, TimeoutError):
        return RequestError(f"there was no complete answer within {timeout:g} s")
    if isinstance(cause, socket.gaierror):
        return RequestError("the site's name cannot be resolved", permanent=cause.errno != socket.EAI_AGAIN)
    return RequestError(f"the connection failed or broke: {cause}", permanent=isinstance(
        error, (ValueError, requests.exceptions.ProxyError, requests.exceptions.SSLError)))  # fmt: skip


def is_whole(file):
    """Whether a binary file ends as a complete JPEG or PNG does; of other formats: is more than zeros."""
    head = file.read(1024)
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
    end = b"\xff\xd9" if head.startswith(b"\xff\xd8") else b"IEND" if head.startswith(b"\x89PNG") else b""
    return end in file.read() and bool(head.strip(b"\0"))  # zeros: left by a power failure


def check_image(body, size=None):
    """Suffix and bytes to store: `body` or, with `size` (pixels), its centre square. Raises RequestError."""
    if not is_whole(io.BytesIO(body)):
        raise RequestError("the image is broken: it is empty or has no end")
    try:
        with Image.open(io.BytesIO(body), formats=list(FORMATS)) as image:
            if min(image.size) < MIN_SIDE or image.width * image.height > MAX_PIXELS:
                raise RequestError(f"the image has {image.width} x {image.height} pixels", permanent=True)
            image.load()
            if size is None:
                return FORMATS.get(image.format, ".jpg"), body  # Pillow calls a JPEG with several images MPO
            upright = ImageOps.exif_transpose(image).convert("RGB")
        file = io.BytesIO()
        ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS).save(file, "JPEG", quality=95)
        return ".jpg", file.getvalue()
    except (Image.UnidentifiedImageError, Image.DecompressionBombError):
        raise RequestError(f"the answer is not an image of at most {MAX_PIXELS:,} pixels", True) from None
    except Exception as error:  # Pillow raises many kinds of exceptions for damaged files
        raise error if isinstance(error, RequestError) else RequestError(f"broken image: {error}") from None


# ------------------------------------------------------------------------------------------------- the folder
class Folder:
    """The images in a folder, counted by name without suffix: an image has the same name in every run."""

    def __init__(self, path, target, guess):
        """Look through `path`, to hold `target` images of about `guess` bytes. Raises OSError."""
        is_long = os.name == "nt" and len(os.path.abspath(path)) > 200  # Windows then needs a prefix
        self.path = Path("\\\\?\\" + os.path.abspath(path)) if is_long else path
        self.target = target
        self.guess = guess
        self.closed = False
        self.lock = threading.Lock()
        self.path.mkdir(parents=True, exist_ok=True)
        show(f"Looking through {self.path} ...")
        for part in self.path.glob(".*.part"):  # left by a killed run, if it is still there after a second
            with suppress(OSError):
                time.sleep(min(max(part.stat().st_mtime + 1.0 - time.time(), 0.0), 1.0))
                part.unlink()
        self.broken = self.image_files()  # files that do not count
        self.known = {}  # stem of each file: its bytes, 0 if another run wrote it
        for name, stem in sorted(self.broken.items()):
            with suppress(OSError), open(self.path / name, "rb") as file:
                if is_whole(file):
                    self.known[stem] = file.tell()
                    del self.broken[name]

    def image_files(self):
        """The stem of each image file, by its name; without hidden ones, which macOS makes beside images."""
        return {p.name: p.stem for p in self.path.iterdir()
                if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")}  # fmt: skip

    def save(self, stem, suffix, data):
        """Write `data` to stem + suffix if new and wanted; return whether. Raises RequestError, GiveUp."""
        with self.lock:
            part = self.path / f".{stem}.{os.urandom(4).hex()}.part"  # so that a kill leaves no half image
            try:
                if self.known and (self.target - len(self.known) < 100 or len(self.known) % 32 == 0):
                    self.known = {stem: self.known.get(stem, 0) for name, stem in self.image_files().items()
                                  if stem in self.known or name not in self.broken}  # fmt: skip
                    self.check_disk()
                if self.closed or stem in self.known or len(self.known) >= self.target:
                    return False
                part.write_bytes(data)
                with suppress(FileExistsError):  # on Windows: another run has just saved the same image
                    part.rename(self.path / (stem + suffix))
            except OSError as error:  # often temporary: a virus scanner, or a network disk that is away
                raise RequestError(f"the image cannot be stored: {error}", permanent=True) from None
            finally:
                with suppress(OSError):
                    part.unlink()
            self.known[stem] = len(data)
            return True

    def print_plan(self):
        """Say which files are broken, and what the run will do. Raises GiveUp if the disk is too small."""
        if self.broken:
            show(f"{len(self.broken)} broken files do not count: "
                 f"{', '.join(map(printable, sorted(self.broken)[:9]))}")  # fmt: skip
        if len(self.known) < self.target:
            rest, gigabytes, warning = self.check_disk()
            if warning:
                show(f"Warning: {warning}", sys.stderr)
            duration = f"{rest / 3600:.1f} hours" if rest > 5400 else f"{-(-rest // 60)} min"
            show(f"{self.path} holds {len(self.known):,} of {self.target:,} images wanted; the other "
                 f"{rest:,} take about {duration} at one a second, and {gigabytes:.2f} GB of disk; "
                 "the training can be started meanwhile.")  # fmt: skip

    def check_disk(self):
        """(images wanted, their GB, a warning if they do not fit). Raises GiveUp if the next 1,000 do not."""
        rest = self.target - len(self.known)
        free = shutil.disk_usage(self.path).free
        sizes = [n for n in self.known.values() if 0 < n < 4 * self.guess + 1000]  # with --size, no originals
        size = sum(sizes) / len(sizes) if sizes else self.guess
        text = (f"{self.path} has {free / 1e9:.2f} GB free, the {rest:,} images wanted need "
                f"{rest * size / 1e9:.2f} GB: free some, use --size, or --count "
                f"{len(self.known) + int(0.95 * free / size)}")  # fmt: skip
        if sizes and min(rest, 1000) * size > free:  # without sizes it is a guess
            raise GiveUp(text)
        return rest, rest * size / 1e9, text if rest * size > free else ""


# --------------------------------------------------------------------------------------------------- the pace
class Pace:
    """When the next request leaves, from the answers alone. Times are in seconds, `max_rate` is in 1/s.

    `period` is the time between two requests. A new image makes it a little shorter, a repeat longer by seven
    times as much. An image that stays, and many new ones in a row, change it faster.
    """

    def __init__(self, max_rate):
        self.shortest = 1 / max_rate if max_rate else 0.0
        self.period = max(0.1, self.shortest)
        self.last = self.next_at = self.not_before = 0.0  # latest request; next by the period; none earlier
        self.first_seen = {}  # the latest images: when the first answer with each of them arrived
        self.new_in_a_row = 1  # new images since the latest repeat
        self.trusted = float("inf")  # the period after that repeat
        self.error = None  # the latest
        self.errors = self.permanent = 0  # errors in a row; permanent ones in a row
        self.counts_from = 0.0  # failures of requests that left earlier say nothing new

    def received(self, sent, key, now):
        """The request that left at `sent` brought the image `key` (any hashable) at `now`."""
        self.errors = self.permanent = 0
        self.counts_from = max(self.counts_from, sent)
        if key not in self.first_seen:
            self.first_seen[key] = now  # not `sent`: a request that is held up brings a newer image
            if len(self.first_seen) > 64:
                del self.first_seen[next(iter(self.first_seen))]
            self.trusted = self.trusted if self.new_in_a_row else self.period
            self.new_in_a_row = min(self.new_in_a_row + 1, 20)
            shrink = 0.05 / 7 * 2 ** max(0, self.new_in_a_row - 10)  # many: the site is probably faster
            self.period = wait = max(self.period * (1 - min(0.3, shrink)), self.shortest, 0.001)
        else:
            shown = sent - self.first_seen[key]
            overdue = shown - self.period
            if overdue > 0:  # one image that stays may be a pause of the site: it can only double the period
                self.period = min(shown, 2 * self.trusted)
            self.period *= 1.05 if self.new_in_a_row else 1.0  # once for repeats in a row
            self.new_in_a_row = 0
            wait = max(self.period / 4, min(overdue / 2, 10.0), self.shortest)
        self.next_at = sent + wait if sent == self.last else self.next_at

    def failed(self, sent, error, now):
        """The request that left at `sent` failed at `now` with the RequestError `error`. Raises GiveUp."""
        self.error = error
        self.not_before = max(self.not_before, now + error.retry_after)
        if sent >= self.counts_from:
            self.errors += 1
            self.permanent = self.permanent + 1 if error.permanent else 0
            self.counts_from = now
            pause = min(0.2 * 2 ** min(self.errors - 1, 20), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            self.not_before = max(self.not_before, now + pause)
        if self.permanent >= MAX_PERMANENT_ERRORS and not self.first_seen:
            raise GiveUp(f"{error}, {self.permanent} times in a row")


# ---------------------------------------------------------------------------------------------------- the run
class Display:
    """Counts what the requests brought and shows it on standard error: a bar on a terminal, else lines."""

    def __init__(self, folder):
        self.folder = folder
        self.counts = Counter()
        self.started = self.updated_at = time.monotonic()

    def update(self, waiting="", final=False):
        """Show the counts and the text `waiting`, if it is time to or if it is `final`."""
        now = time.monotonic()
        tty = sys.stderr.isatty()
        if now - self.updated_at < (TICK if tty else LINE_EVERY) and not final:
            return
        self.updated_at = now
        done = len(self.folder.known)
        with suppress(OSError):  # NUL, which Windows calls a terminal, has no size
            line = tqdm.format_meter(
                done, max(done, self.folder.target), now - self.started, initial=done - self.counts["kept"],
                ncols=(os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1 if tty else None,
                postfix=waiting or "{seen} seen again, {refused} refused".format_map(self.counts), ascii=" #",
                unit=" images", bar_format="{n_fmt}/{total_fmt} " + "|{bar}| " * tty
                + "{rate_fmt}, {remaining} left{postfix}")  # fmt: skip
            show("\r" * tty + line, sys.stderr, end="" if tty and not final else "\n")

    def close(self):
        """Let nothing be written from now on; show the counts once more, and the summary."""
        with self.folder.lock:
            self.folder.closed = True
        self.update(final=True)
        seconds = max(time.monotonic() - self.started, TICK)  # a coarse clock may not have ticked yet
        rest = "{requests} requests: {seen} seen again, {refused} refused, {transient} transient errors"
        show(f"{self.counts['kept']} new images in {tqdm.format_interval(seconds)}, "
             f"{self.counts['kept'] / seconds:.2f} a second, from {rest.format_map(self.counts)}. "
             f"{self.folder.path} holds {len(self.folder.known)}.")  # fmt: skip


def get_image(session, folder, args):
    """Make a request; return the image's hash, and whether `folder` gained it. Raises RequestError."""
    body = fetch(session, args.url, args.timeout)
    key = hashlib.sha256(body).hexdigest()[:20]
    return key, key not in folder.known and folder.save(key, *check_image(body, args.size))


def download(folder, args, display):
    """Send requests, after an error one at a time, until the folder is full. Raises GiveUp, OSError."""
    pace = Pace(args.max_rate)
    executor = concurrent.futures.ThreadPoolExecutor(args.workers)
    in_flight = {}  # future: (time sent, session)
    fits = args.workers  # how many requests in flight the connection can answer in time
    idle = []  # sessions without a request
    while len(folder.known) < folder.target:
        now = time.monotonic()
        if not pace.errors or now - display.updated_at > LINE_EVERY + 30.0:  # or the computer was suspended
            works_at = now
            since = time.strftime("%H:%M")
        elif now - works_at > (LONGEST_OUTAGE if pace.first_seen else GIVE_UP_AFTER):
            raise GiveUp(f"{pace.errors} requests to {args.url} in {now - works_at:.0f} s brought no image, "
                         f"none came since {since}; the last error: {pace.error}")  # fmt: skip
        for sent, session in in_flight.values():
            if now - sent > args.timeout:
                session.adapter.abort()
        limit = 1 + sum(sent < pace.counts_from for sent, _ in in_flight.values()) if pace.errors else fits
        wait = max(pace.not_before, pace.last + pace.shortest, 0 if pace.errors else pace.next_at) - now
        if wait <= 0 and len(in_flight) < min(limit, args.workers, folder.target - len(folder.known)):
            session = idle.pop() if idle else new_session()
            in_flight[executor.submit(get_image, session, folder, args)] = now, session
            pace.last = now
            pace.next_at = now + pace.period
            display.counts["requests"] += 1
            continue
        display.update(f"waiting {wait:.0f} s because {pace.error}" if now < pace.not_before else "")
        awaited = in_flight or [concurrent.futures.Future()]  # wait() returns at once when it is given none
        concurrent.futures.wait(awaited, min(wait, TICK) if wait > 0 else TICK, "FIRST_COMPLETED")
        for future in [future for future in in_flight if future.done()]:
            sent, session = in_flight.pop(future)
            try:
                key, added = future.result()
                display.counts["kept" if added else "seen"] += 1
                pace.received(sent, key, time.monotonic())
                fits = 1 + int(0.4 * args.timeout * (len(in_flight) + 1) / max(time.monotonic() - sent, 0.01))
                idle += [] if session.adapter.aborted else [session]
            except RequestError as error:
                session.close()  # it is not used again
                display.counts["refused" if error.permanent else "transient"] += 1
                pace.failed(sent, error, time.monotonic())
            display.counts["requests"] += session.adapter.redirects
            pace.last += session.adapter.redirects * pace.shortest


# ------------------------------------------------------------------------------------------------ the command
def parse_args(argv):
    """The settings. Bad arguments end the program with status 2 and a sentence."""
    parser = argparse.ArgumentParser(description="Download different images until a folder holds enough.")
    settings = {  # type, default, least, most, placeholder, meaning
        "--count": (int, 50000, 1, 1e9, "N", "stop when the folder holds N good images"),
        "--out": (Path, Path(__file__).resolve().parent / "fake_face" / "faces", None, None, "DIR", "folder"),
        "--size": (int, None, 16, 4096, "PX", "store JPEGs of PX x PX pixels instead of what was served"),
        "--url": (str, "https://thispersondoesnotexist.com/", None, None, "URL", "any address with an image"),
        "--workers": (int, 16, 1, 256, "N", "the most requests in flight"),
        "--max-rate": (float, 20, 0, 1e9, "R", "the most requests a second; 0: no limit"),
        "--timeout": (float, 15, 0.01, 1e6, "S", "seconds that a request may take"),
    }
    for flag, (kind, default, *_, placeholder, meaning) in settings.items():
        parser.add_argument(flag, type=kind, default=default, metavar=placeholder,
                            help=meaning + " (default: %(default)s)" * bool(default))  # fmt: skip
    args = parser.parse_args(argv)
    for flag, (_, _, least, most, *_) in settings.items():
        value = getattr(args, flag[2:].replace("-", "_"))
        if None not in (least, value) and not least <= value <= most:
            parser.error(f"{flag} must be from {least:g} to {most:,.10g}, not {value}")
    try:
        new_session().get_adapter(requests.Request("GET", args.url).prepare().url)
    except requests.RequestException as error:
        parser.error(f"--url is not an address that starts with http:// or https://: {error}")
    if os.path.isfile(args.out):
        parser.error(f"--out {args.out} is a file; name a folder")
    return args


def main(argv):
    """Run the command with the arguments `argv`; return the exit status."""
    args = parse_args(argv)
    try:
        folder = Folder(args.out, args.count, guess=args.size**2 // 2 if args.size else 550_000)
        with closing(Display(folder)) as display:
            folder.print_plan()
            download(folder, args, display)
        return 0
    except KeyboardInterrupt:
        message = "Stopped"
    except GiveUp as error:
        message = f"Gave up: {error}"
    except OSError as error:
        message = f"Gave up: cannot write to {args.out}: {printable(error.strerror or error)}"
    words = [sys.executable, os.path.abspath(__file__), *argv]
    command = shlex.join(words) if os.name != "nt" else " ".join(  # Windows' shells know double quotes only
        w if re.fullmatch(r"[\w:./\\-]+", w) else '"' + w.rstrip("\\") + '"' for w in words)  # fmt: skip
    show(message + ". " + "PowerShell needs & before this command. " * command.startswith('"')
         + f"To go on: {command}", sys.stderr)  # fmt: skip
    return 130 if message == "Stopped" else 1


if __name__ == "__main__":
    for number in signal.Signals:  # SIGINT too, since shells ignore it for background commands
        hangup = number.name == "SIGHUP" and signal.getsignal(number) != signal.SIG_IGN  # as nohup does
        if hangup or number.name in ("SIGINT", "SIGTERM", "SIGBREAK"):
            signal.signal(number, signal.default_int_handler)
    if os.name == "nt":  # ES_CONTINUOUS | ES_SYSTEM_REQUIRED: no sleep while nobody uses the computer
        ctypes.windll.kernel32.SetThreadExecutionState(0x80000001)
    sys.stdout.reconfigure(errors="backslashreplace")  # for paths that it cannot encode, as stderr does
    os._exit(main(sys.argv[1:]))  # without waiting for threads: one that connects cannot be interrupted
