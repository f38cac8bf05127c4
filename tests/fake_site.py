"""A local web server that behaves like thispersondoesnotexist.com, and misbehaves on demand.

    python tests/fake_site.py --period 1 --latency 0.1                    # a new face every second
    python tests/fake_site.py --period 0 --size 1024                      # a new face at every request
    python tests/fake_site.py --fault-rate 0.15 --faults reset stall 503  # trouble

In tests, where `url` is its address, `times` has the moment of every request and `name(i)` names image i:

    with FakeSite(period=0.1, latency=0.02) as site:
        ...
"""

import argparse
import email.utils
import hashlib
import io
import itertools
import os
import random
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import Counter, deque
from pathlib import Path

from PIL import Image, ImageChops

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fake_face.draw_faces import draw_face  # noqa: E402  (found by the line above, when this runs as a command)

FAULTS = {
    "429": "429 with Retry-After in seconds",
    "429-date": "429 with Retry-After as a date",
    "500": "an error of the server",
    "503": "the server is overloaded",
    "403": "refused",
    "404": "not there",
    "truncated": "half of the announced body",
    "cut": "half of a body of unannounced length",
    "reset": "the connection breaks in the middle",
    "stall": "nothing more comes after half of the body",
    "drip": "a byte of the body now and then, for ever",
    "slow-headers": "a byte of the headers now and then, for ever",
    "redirect": "302 to `location`, and a byte of a body now and then, for ever",
    "control": "403 with control characters in its reason",
    "html": "a page with status 200",
    "empty": "no body",
    "endless": "a body that never ends",
    "big": "a body of 30 MB",
    "pixels": "a header that claims 65,000 x 65,000 pixels",
    "tiny": "an image of 16 x 16 pixels",
}


def jpeg(image, **options):
    """The bytes of a PIL image as JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


class FakeSite:
    """A server on a free port of 127.0.0.1, running between `with` and its end.

    Image i is on show from i * period to (i + 1) * period seconds after the first request, or for one request
    if `period` is 0.  `latency`: seconds that an answer takes.  `size`: pixels.  A request meets one of
    `faults` (names in FAULTS) with probability `fault_rate`; those put into the deque `script` come first,
    None for none.  `bandwidth`: bytes a second that all answers share.  `retry_after`: seconds that a 429 asks
    for.  `location`: where a redirect leads, the same page if not changed.  `encoding`: JPEG, or what else
    Pillow writes.  `tls`: an ssl.SSLContext for https.
    """

    def __init__(
        self, period=1.0, latency=0.0, size=64, faults=tuple(FAULTS), fault_rate=0.0, retry_after=1, seed=0,
        encoding="JPEG", port=0, tls=None, bandwidth=float("inf"),
    ):  # fmt: skip
        self.period = period
        self.latency = latency
        self.retry_after = retry_after
        self.faults = list(faults)
        self.fault_rate = fault_rate
        self.script = deque()
        self.location = "/"
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.counts = Counter()  # requests by what they met: "good" or the name of a fault
        self.times = []  # time.monotonic() of every request
        self.segment = None  # (time, index) since which the period is what it is
        self.stopping = threading.Event()
        self.encoding = encoding
        self.tls = tls
        self.bandwidth = bandwidth
        self.senders = set()  # the connections with an answer on its way
        self.photographs = [self.photograph(seed + i, size) for i in range(8)]
        handler = type("Handler", (Handler,), {"site": self})
        self.server = Server(("127.0.0.1", port), handler)
        self.url = f"http{'s' * bool(tls)}://127.0.0.1:{self.server.server_address[1]}/"

    # ------------------------------------------------------------------ the images

    @staticmethod
    def photograph(seed, size):
        """A drawn face with film grain, as JPEG bytes in two parts, around the first quantisation table."""
        grain = Image.merge("RGB", [Image.effect_noise((size, size), 25)] * 3)
        body = jpeg(ImageChops.soft_light(draw_face(seed, size), grain), quality=93, subsampling=0)
        table = body.index(b"\xff\xdb") + 5  # behind the marker, the length and the number of the table
        return body[:table], body[table : table + 64], body[table + 64 :]

    def body(self, index):
        """The bytes of image `index`.

        Encoding thousands of large images would make the server the slowest part, so the binary digits of the
        index are added to entries of the quantisation table: other bytes, other pixels, still the same face.
        """
        head, table, tail = self.photographs[index % 8]
        table = bytearray(table)
        for digit in range(20):
            table[1 + digit] += index // 8 >> digit & 1
        body = head + bytes(table) + tail
        if self.encoding != "JPEG":
            file = io.BytesIO()
            Image.open(io.BytesIO(body)).save(file, self.encoding)
            return file.getvalue()
        return body

    def name(self, index):
        """The name without suffix that the downloader gives image `index`."""
        return hashlib.sha256(self.body(index)).hexdigest()[:20]

    def index(self, now):
        """The number of the image on show at `now`; with period 0 a new one every call.  Needs the lock."""
        if self.segment is None:
            self.segment = (now, 0)
        start, first = self.segment
        if self.period:
            return first + int((now - start) / self.period)
        self.segment = (start, first + 1)
        return first

    def shown(self):
        """How many images were shown so far, the current one included if it has a period."""
        with self.lock:
            if self.segment is None:
                return 0
            return self.index(time.monotonic()) + 1 if self.period else self.segment[1]

    def set_period(self, period):
        """Change the period from the next moment on."""
        with self.lock:
            now = time.monotonic()
            self.segment = (now, self.index(now) + 1)
            self.period = period

    # ------------------------------------------------------------------ the life of the server

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def next_answer(self):
        """What the request that arrives now meets: a fault (its name) or None, and the image on show."""
        now = time.monotonic()
        with self.lock:
            self.times.append(now)
            if self.script:
                fault = self.script.popleft()
            else:
                fault = self.random.choice(self.faults) if self.random.random() < self.fault_rate else None
            index = None if fault and not self.period else self.index(now)
            self.counts[fault or "good"] += 1
        return fault, self.body(index or 0)


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = os.name != "nt"  # where it would let two servers share a port
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """A client that goes away in the middle is no error here."""


class Handler(socketserver.StreamRequestHandler):
    """One connection: requests and answers in turn; only what clients of the site need, to be quick."""

    disable_nagle_algorithm = True

    def setup(self):
        if self.site.tls:
            self.request = self.site.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def handle(self):
        while line := self.rfile.readline(65536):
            path, _, _ = line.split()[1].partition(b"?")
            browser = False
            while (header := self.rfile.readline(65536)) not in (b"\r\n", b""):
                name, _, value = header.partition(b":")
                browser |= name.lower() == b"user-agent" and b"Mozilla/" in value
            if not browser:
                self.site.counts["no browser"] += 1
                self.answer("403 Forbidden", b"browsers only", "text/plain")
            elif path != b"/":
                self.answer("404 Not Found", b"no such page", "text/plain")
            else:
                time.sleep(self.site.latency / 2)
                fault, body = self.site.next_answer()
                time.sleep(self.site.latency / 2)
                if not (self.fault(fault, body) if fault else self.answer("200 OK", body)):
                    return

    def answer(self, status, body, kind="image/jpeg", length=None, headers=""):
        """Send an answer and return True; `length`: the Content-Length to announce, the real one if None."""
        length = len(body) if length is None else length
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{headers}\r\n"
        data = head.encode() + body
        size = 4096 if self.site.bandwidth < float("inf") else len(data)  # of the pieces
        self.site.senders.add(self)
        try:
            for start in range(0, len(data), size):
                self.connection.sendall(data[start : start + size])
                time.sleep(size * len(self.site.senders) / self.site.bandwidth)
        finally:
            self.site.senders.discard(self)
        return True

    def fault(self, name, body):
        """Answer with the fault `name`; return whether the connection goes on."""
        half = body[: len(body) // 2]
        if name.startswith("429"):
            wait = self.site.retry_after
            wait = email.utils.formatdate(time.time() + wait, usegmt=True) if name == "429-date" else wait
            header = f"Retry-After: {wait}\r\n"
            return self.answer("429 Too Many Requests", b"slow down", "text/plain", headers=header)
        if name in ("403", "404", "500", "503"):
            reason = {"403": "Forbidden", "404": "Not Found"}.get(name, "Service Unavailable")
            return self.answer(f"{name} {reason}", b"sorry", "text/plain")
        if name == "control":
            return self.answer("403 \x1b]0;forged\x07 Forbidden", b"sorry", "text/plain")
        if name == "html":
            return self.answer("200 OK", b"<!DOCTYPE html><title>Sorry</title><p>Please wait", "text/html")
        if name == "empty":
            return self.answer("200 OK", b"")
        if name == "tiny":
            return self.answer("200 OK", jpeg(Image.new("RGB", (16, 16))))
        if name == "pixels":
            size = body.index(b"\xff\xc0") + 5  # of the frame header: behind marker, length and precision
            return self.answer("200 OK", body[:size] + struct.pack(">HH", 65000, 65000) + body[size + 4 :])
        if name == "big":
            return self.answer("200 OK", body + bytes(30_000_000 - len(body)))
        if name in ("endless", "drip", "slow-headers", "redirect"):
            status = f"302 Found\r\nLocation: {self.site.location}" if name == "redirect" else "200 OK"
            end = b"\r\nX-Header: " if name == "slow-headers" else b"\r\n\r\n" + half
            self.connection.sendall(f"HTTP/1.1 {status}\r\nContent-Type: image/jpeg".encode() + end)
            while not self.site.stopping.wait(0 if name == "endless" else 0.05):
                self.connection.sendall(bytes(65536) if name == "endless" else b"x")
            return False
        if name == "cut":
            self.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + half)
            return False
        self.answer("200 OK", half, length=len(body))
        if name == "stall":
            self.site.stopping.wait(60)
        if name == "reset":
            at_once = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"faults: {FAULTS}")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--period", type=float, default=1.0, help="seconds between images; 0: one a request")
    parser.add_argument("--latency", type=float, default=0.1, help="seconds that an answer takes")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--fault-rate", type=float, default=0.0, help="share of requests that meet a fault")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    args = parser.parse_args()
    with FakeSite(**vars(args)) as site:
        print(f"{site.url} shows a new face every {args.period:g} s; Ctrl-C ends it", flush=True)
        try:
            for _ in itertools.count():
                time.sleep(10)
                met = dict(site.counts)
                print(f"{len(site.times)} requests, {site.shown()} images shown, {met}", flush=True)
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
