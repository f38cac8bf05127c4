"""What download_images.py promises, against the local site; most tests run its command, as a user does."""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import requests
from PIL import Image

import download_images
from download_images import Pace
from tests.fake_site import FAULTS, FakeSite

SCRIPT = Path(download_images.__file__)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """The local site is reached directly, whatever the environment says about proxies."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,no-such-site.invalid")


def command(url, out, *options):
    return [sys.executable, str(SCRIPT), "--url", url, "--out", str(out), *map(str, options)]


def run(url, out, *options):
    """The finished downloader; a test that would hang fails after a minute."""
    return subprocess.run(command(url, out, *options), capture_output=True, text=True, timeout=60)


def start(url, out, *options):
    pipe = subprocess.PIPE
    return subprocess.Popen(command(url, out, *options), stdout=pipe, stderr=pipe, text=True)


def wait_for(condition):
    """Return once `condition` holds; fail after a minute."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never happened")


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def assert_good(folder, count):
    """The folder holds `count` images that decode, all different, and nothing else."""
    pictures = set()
    for path in Path(folder).iterdir():
        with Image.open(path) as image:
            pictures.add(image.convert("RGB").tobytes())
    assert len(pictures) == len(names(folder)) == count


# ------------------------------------------------------------------ once and only once


def test_fills_a_folder_with_as_many_different_images_as_wanted(tmp_path):
    with FakeSite(period=0.1, latency=0.02) as site:
        result = run(site.url, tmp_path / "a" / "b", "--count", 20)
    assert result.returncode == 0, result.stderr
    assert_good(tmp_path / "a" / "b", 20)
    assert "20 new images" in result.stdout


def test_a_file_is_what_was_served_under_a_name_made_from_it(tmp_path):
    with FakeSite(period=0) as site:
        run(site.url, tmp_path, "--count", 3)
        served = {site.body(i) for i in range(3)}
    assert {path.read_bytes() for path in tmp_path.iterdir()} == served
    assert names(tmp_path) == sorted(hashlib.sha256(body).hexdigest()[:20] + ".jpg" for body in served)


def test_a_second_run_adds_only_what_is_missing(tmp_path):
    with FakeSite(period=0) as site:
        run(site.url, tmp_path, "--count", 5)
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        run(site.url, tmp_path, "--count", 8)
    assert_good(tmp_path, 8)
    assert len(site.times) == 8
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}.items()


def test_a_full_folder_is_answered_without_a_request(tmp_path):
    with FakeSite(period=0) as site:
        run(site.url, tmp_path, "--count", 3)
        assert run(site.url, tmp_path, "--count", 3).returncode == 0
        assert run(site.url, tmp_path, "--count", 2).returncode == 0
    assert len(site.times) == len(names(tmp_path)) == 3


def test_two_runs_at_once_share_a_folder_without_a_double(tmp_path):
    with FakeSite(period=0.05, latency=0.01) as site:
        both = [start(site.url, tmp_path, "--count", 40) for _ in range(2)]
        assert [process.communicate(timeout=60) and process.returncode for process in both] == [0, 0]
    assert 40 <= len(names(tmp_path)) <= 42
    assert_good(tmp_path, len(names(tmp_path)))


def test_two_runs_at_once_stop_together(tmp_path):
    with FakeSite(period=0, latency=0.02) as site:
        both = [start(site.url, tmp_path, "--count", 60) for _ in range(2)]
        assert [process.communicate(timeout=60) and process.returncode for process in both] == [0, 0]
    assert 60 <= len(names(tmp_path)) <= 65
    assert_good(tmp_path, len(names(tmp_path)))


# ------------------------------------------------------------------ sizes and formats


def test_with_size_the_images_are_square_jpegs_under_the_name_of_the_original(tmp_path):
    with FakeSite(period=0, size=96) as site:
        assert run(site.url, tmp_path, "--count", 3, "--size", 32).returncode == 0
        assert names(tmp_path) == sorted(site.name(i) + ".jpg" for i in range(3))
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (32, 32))


@pytest.mark.parametrize("encoding", ["PNG", "WEBP", "GIF", "BMP"])
def test_the_suffix_is_that_of_the_real_format(tmp_path, encoding):
    suffix = "." + encoding.lower()
    with FakeSite(period=0, encoding=encoding) as site:
        assert run(site.url, tmp_path, "--count", 2).returncode == 0
        assert names(tmp_path) == sorted(site.name(i) + suffix for i in range(2))
        assert run(site.url, tmp_path, "--count", 2).returncode == 0
    assert len(site.times) == 2


def test_a_picture_that_is_there_in_another_format_is_not_stored_again(tmp_path):
    with FakeSite(period=0, encoding="PNG") as site:
        run(site.url, tmp_path, "--count", 2)
        site.segment = (0, 0)  # from the first image again
        assert run(site.url, tmp_path, "--count", 4, "--size", 64).returncode == 0
        assert names(tmp_path) == sorted(site.name(i) + (".png" if i < 2 else ".jpg") for i in range(4))


# ------------------------------------------------------------------ only good images


def test_every_kind_of_fault_is_survived_and_none_is_kept(tmp_path):
    with FakeSite(period=0, retry_after=0) as site:
        for fault in FAULTS:
            site.script.extend([fault, None])
        result = run(site.url, tmp_path, "--count", len(FAULTS) + 4, "--timeout", 0.5)
        assert result.returncode == 0, result.stderr
        assert set(site.counts) == {"good", *FAULTS}
    assert_good(tmp_path, len(FAULTS) + 4)


@pytest.mark.parametrize(
    "fault, reason, lasting",
    [("big", "than 25 MB", True), ("endless", "than 25 MB", True), ("pixels", "64,000,000", True),
     ("tiny", "16 x 16", True), ("html", "not an image", True), ("404", "404 Not Found", True),
     ("cut", "broken", False), ("truncated", "broke", False), ("reset", "broke", False),
     ("empty", "empty", False),
     ("500", "500", False), ("429", "429", False), ("stall", "silent", False), ("drip", "longer", False)],
)  # fmt: skip
def test_every_fault_has_its_reason_and_is_told_lasting_or_passing(fault, reason, lasting):
    session = requests.Session()
    session.headers.update(download_images.HEADERS)
    with FakeSite(period=0) as site, pytest.raises(download_images.Trouble, match=reason) as trouble:
        site.script.append(fault)
        body, _ = download_images.fetch(session, site.url, 0.3 if fault in ("stall", "drip") else 30)
        download_images.check_image(body)
    assert trouble.value.lasting == lasting


def test_a_body_that_drips_is_left_when_the_time_is_over(tmp_path):
    with FakeSite(period=0) as site:
        site.script.append("drip")
        assert run(site.url, tmp_path, "--count", 1, "--timeout", 0.3).returncode == 0


def test_broken_files_from_elsewhere_are_named_and_not_counted(tmp_path):
    with FakeSite(period=0) as site:
        run(site.url, tmp_path, "--count", 3)
        cut = tmp_path / names(tmp_path)[0]
        cut.write_bytes(cut.read_bytes()[:-100])
        (tmp_path / "empty.png").touch()
        (tmp_path / "folder.jpg").mkdir()
        (tmp_path / "notes.txt").write_text("not an image, not counted")
        result = run(site.url, tmp_path, "--count", 4)
    assert result.returncode == 0
    assert f"3 broken files do not count: {cut.name}, empty.png, folder.jpg" in result.stdout
    assert len(names(tmp_path)) == 4 + 4
    assert len(site.times) == 5


def test_images_from_elsewhere_are_counted(tmp_path):
    with FakeSite(period=0) as site:
        (tmp_path / "me.JPEG").write_bytes(site.body(100))
        assert run(site.url, tmp_path, "--count", 2).returncode == 0
    assert len(site.times) == 1


def test_killed_at_any_moment_it_leaves_nothing_broken_and_the_next_run_cleans_up(tmp_path):
    with FakeSite(period=0, size=256) as site:
        for kills in range(8):
            process = start(site.url, tmp_path, "--count", 100000, "--max-rate", 0)
            goal = len(site.times) + 3 * kills
            wait_for(lambda goal=goal: len(site.times) > goal)
            process.kill()
            process.communicate()
        saved = len([name for name in names(tmp_path) if name.endswith(".jpg")])
        (tmp_path / ".abc.part").write_bytes(b"left by a killed run")
        assert run(site.url, tmp_path, "--count", saved + 5).returncode == 0
    assert_good(tmp_path, saved + 5)


def test_a_file_that_another_run_is_writing_is_not_cleaned_up(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    part = tmp_path / ".abc.part"
    with part.open("wb") as file, FakeSite(period=0) as site:
        fcntl.flock(file, fcntl.LOCK_EX)
        run(site.url, tmp_path, "--count", 2)
        assert part.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_full_disk_ends_it_with_a_sentence_and_nothing_half_written(tmp_path, monkeypatch, capsys):
    def open_full(path, mode="r", *args):
        file = open(path, mode, *args)  # noqa: SIM115
        if mode == "xb":
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, file.fileno())
            os.close(full)  # a copy left open would keep the lock, and block another suite on this machine
        return file

    monkeypatch.setattr(download_images, "open", open_full, raising=False)
    with FakeSite(period=0) as site:
        assert main("--url", site.url, "--out", tmp_path, "--count", 3) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_a_disk_too_small_for_the_rest_ends_it_before_the_first_request(tmp_path, monkeypatch, capsys):
    with FakeSite(period=0) as site:
        run(site.url, tmp_path, "--count", 2)
        free = 100 * len(site.body(0))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(free))
        assert main("--url", site.url, "--out", tmp_path, "--count", 1000) == 1
    error = capsys.readouterr().err
    assert "998 images still wanted need about 0.00 GB" in error and "0.00 GB free" in error
    assert 90 <= int(re.search(r"--count (\d+)\. To go on", error)[1]) <= 110
    assert len(site.times) == 2


def test_an_empty_folder_on_a_small_disk_is_warned_of_as_sizes_are_a_guess(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(10**6))
    with FakeSite(period=0) as site:
        assert main("--url", site.url, "--out", tmp_path, "--count", 3) == 0
    assert "Warning: the 3 images" in capsys.readouterr().err


# ------------------------------------------------------------------ failure told apart


@pytest.mark.parametrize("fault, reason", [("403", "403 Forbidden"), ("html", "not an image")])
def test_lasting_trouble_ends_it_after_a_few_tries_with_what_to_do(tmp_path, fault, reason):
    out = tmp_path / "it's here"
    with FakeSite(period=0) as site:
        site.script.extend([None, None])
        site.fault_rate, site.faults = 1.0, [fault]
        result = run(site.url, out, "--count", 10)
        assert result.returncode == 1
        assert len(site.times) <= 2 + 5
    sentence = result.stderr.strip().splitlines()[-1]
    assert reason in sentence and "holds 2" in result.stdout and "Traceback" not in result.stderr
    assert_good(out, 2)
    with FakeSite(period=0, seed=50, port=site.server.server_address[1]):  # well again; the command goes on
        again = subprocess.run(sentence.split("To go on: ")[1], shell=True, capture_output=True, timeout=60)
    assert again.returncode == 0
    assert_good(out, 10)


def test_an_unknown_name_is_lasting_trouble(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(download_images.Trouble, match="name cannot be resolved") as trouble:
        download_images.fetch(requests.Session(), "http://no-such-site.invalid/", 30)
    assert trouble.value.lasting


def test_passing_trouble_is_waited_out(tmp_path):
    troubles = ["503", "stall", "reset"]
    with FakeSite(period=0) as site:
        site.script.extend([None, *troubles])
        assert run(site.url, tmp_path, "--count", 3, "--timeout", 0.3).returncode == 0
        assert site.counts == {"good": 3, **dict.fromkeys(troubles, 1)}
    assert_good(tmp_path, 3)
    pauses = [b - a for a, b in zip(site.times[1:], site.times[2:], strict=False)]
    assert pauses[2] > pauses[0]  # they grow


@pytest.mark.parametrize("form", ["429", "429-date"])
def test_retry_after_is_obeyed(tmp_path, form):
    with FakeSite(period=0, retry_after=2) as site:
        site.script.extend([None, form])
        assert run(site.url, tmp_path, "--count", 3).returncode == 0
    gap = site.times[2] - site.times[1]
    assert gap >= (2 if form == "429" else 1)  # a date counts whole seconds


def test_it_looks_like_a_browser(tmp_path):
    with FakeSite(period=0) as site:
        run(site.url, tmp_path, "--count", 1)
        assert site.counts == {"good": 1}


# ------------------------------------------------------------------ the pace, on a clock of its own


def simulate(pace, change, seconds, latency=0.02):
    """Run `pace` against a site whose image at time t is change(t); returns (images seen, request times)."""
    now, seen, asked, pending = 0.0, [], [], []
    while now < seconds:
        due = max(pace.next_at, pace.last + pace.shortest, now)
        if len(pending) < pace.limit and not (pending and pending[0] <= due - latency):
            starved, now = due > pace.next_at, due
            pace.asked(now, starved)
            asked.append(now)
            pending.append(now)
        else:
            sent = pending.pop(0)
            now = max(now, sent + latency)
            seen.append(change(sent + latency / 2))
            pace.answered(sent, seen[-1], now)
    return seen, asked


@pytest.mark.parametrize("period", [0.07, 0.1, 0.3, 1.0, 7.0])
def test_it_finds_the_period_by_itself(period):
    seen, asked = simulate(Pace(20, 16), lambda t: int(t / period), 200 * period)
    shown = set(range(20, max(seen)))
    late = [t for t, image in zip(asked, seen, strict=False) if image >= 20]
    assert len(shown & set(seen)) >= 0.98 * len(shown)
    assert len(late) <= 1.25 * len(shown)


@pytest.mark.parametrize("before, after", [(0.2, 0.4), (0.3, 3.0), (0.4, 0.2), (1.0, 0.3)])
def test_it_follows_when_the_site_changes_its_pace(before, after):
    def change(t):
        return int(t / before) if t < 100 * before else 100 + int((t - 100 * before) / after)

    seen, asked = simulate(Pace(20, 16), change, 100 * before + 200 * after)
    shown = set(range(180, max(seen)))  # it had 80 images to get used to it
    late = [t for t, image in zip(asked, seen, strict=False) if image >= 180]
    assert len(shown & set(seen)) >= 0.98 * len(shown)
    assert len(late) <= 1.25 * len(shown)


def test_it_is_back_in_step_soon_after_the_site_stood_still():
    def change(t):  # a second each, but the one of second 100 stays for ten minutes
        return int(t) if t < 100 else 100 + max(0, int(t - 700))

    seen, asked = simulate(Pace(20, 16), change, 900)
    assert len({i for i in seen if i >= 150}) >= 0.98 * (max(seen) - 150)
    assert sum(100 < t < 700 for t in asked) <= 100
    assert min(i for i in seen if i > 100) < 100 + 10


def test_it_asks_side_by_side_where_every_answer_is_new():
    pace = Pace(0, 16)
    seen, asked = simulate(pace, lambda t: t, 20, latency=0.2)
    assert pace.limit == 16
    assert len(set(seen)) > 6 * 20 / 0.2


def test_it_asks_for_few_at_once_where_more_bring_nothing():
    pace, free = Pace(0, 16), 0.0
    for i in range(3000):  # a site that serves one request after the other, 0.05 s each
        sent = max(free - 0.05 * (pace.limit - 1), pace.next_at)
        pace.asked(sent, starved=True)
        free = max(free, sent) + 0.05
        pace.answered(sent, i, free)
        assert pace.limit <= 4


def test_it_never_asks_more_often_than_max_rate():
    for rate in (0.5, 5, 20):
        _, asked = simulate(Pace(rate, 16), lambda t: t, 100, latency=0.3)
        assert min(b - a for a, b in zip(asked, asked[1:], strict=False)) >= 1 / rate - 1e-9


def test_the_site_sees_no_more_than_max_rate(tmp_path):
    with FakeSite(period=0, fault_rate=0.3, faults=["500", "404", "reset"]) as site:
        assert run(site.url, tmp_path, "--count", 20, "--max-rate", 10).returncode == 0
    assert (len(site.times) - 1) / (site.times[-1] - site.times[0]) <= 10.5


# ------------------------------------------------------------------ the end, and what is seen


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("fault", [None, "stall", "429"])
def test_a_signal_ends_it_with_130_and_a_clean_folder(tmp_path, what, fault):
    with FakeSite(period=0, retry_after=600) as site:
        site.script.extend([None] * 5)
        site.fault_rate, site.faults = (1.0 if fault else 0.0), [fault]
        process = start(site.url, tmp_path, "--count", 100000)
        wait_for(lambda: len(site.times) > 5)
        process.send_signal(what)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "To go on: " in err and f"holds {len(names(tmp_path))}." in out and "Traceback" not in err
    assert_good(tmp_path, len(names(tmp_path)))


def test_without_a_terminal_the_output_is_plain_lines(tmp_path):
    with FakeSite(period=0) as site:
        result = run(site.url, tmp_path, "--count", 5)
    assert re.fullmatch(r"[ -~\n]*", result.stdout + result.stderr)
    assert result.stdout.count("\n") == 1


def test_on_a_terminal_there_is_a_bar(tmp_path):
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    with FakeSite(period=0) as site:
        site.script.extend([None, "503", "503", "html"])
        wanted = command(site.url, tmp_path, "--count", 5)
        process = subprocess.Popen(wanted, stderr=theirs, stdout=subprocess.DEVNULL)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # which is how Linux says that the other side is closed
            while piece := os.read(ours, 1 << 16):
                shown += piece
        assert process.wait(timeout=60) == 0
    os.close(ours)
    for part in (b"5/5", b"0 seen again, 1 refused", b"because the site answered 503", b"left"):
        assert part in shown


# ------------------------------------------------------------------ a user's mistakes


def main(*options):
    return download_images.main([str(option) for option in options])


@pytest.mark.parametrize(
    "options",
    [("--count", "0"), ("--count", "many"), ("--url", "thispersondoesnotexist.com"), ("--url", "http://"),
     ("--workers", "0"), ("--max-rate", "-1"), ("--size", "5"), ("--timeout", "0"), ("--max-rate", "nan"),
     ("--out", str(SCRIPT)), ("--url", "http://a:b/"), ("--faces", "5")],
)  # fmt: skip
def test_bad_arguments_end_it_with_2_and_a_sentence(options, capsys):
    with pytest.raises(SystemExit) as end:
        main(*options)
    assert end.value.code == 2
    assert options[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_cannot_be_made_ends_it_with_1_and_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    result = run("http://127.0.0.1:1/", tmp_path / "file" / "faces", "--count", 1)
    assert result.returncode == 1
    assert "cannot write" in result.stderr and "Traceback" not in result.stderr
