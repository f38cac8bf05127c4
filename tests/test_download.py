"""What download_images.py promises, against the local site; most tests run its command, as a user does."""

import contextlib
import errno
import hashlib
import heapq
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import requests
from PIL import Image

import download_images
from download_images import Pace, RequestError
from tests.fake_site import FAULTS, FakeSite
from tests.systems import STOPS, WINDOWS, made, needs_terminals, start_to_be_stopped, stop, wait_for

SCRIPT = Path(download_images.__file__)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """The local site is reached directly, whatever the environment says about proxies."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,faces.invalid,no-such-site.invalid")


def command(url, out, *options):
    return [sys.executable, str(SCRIPT), "--url", url, "--out", str(out), *map(str, options)]


def run(url, out, *options, **constants):
    """The finished downloader, with other values for `constants` of its module; one that hangs fails after a minute."""
    wanted = command(url, out, *options)
    if constants:
        code = f"import os, sys, download_images as d; vars(d).update({constants}); os._exit(d.main(sys.argv[1:]))"
        wanted[1:2] = ["-c", code]
    return subprocess.run(wanted, capture_output=True, text=True, timeout=60, cwd=SCRIPT.parent)


def start(url, out, *options):
    pipe = subprocess.PIPE
    return subprocess.Popen(command(url, out, *options), stdout=pipe, stderr=pipe, text=True)


def main(*options):
    return download_images.main([str(option) for option in options])


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


def test_a_file_is_what_was_served_named_by_its_hash_and_another_run_adds_only_what_is_missing(tmp_path):
    with FakeSite(period=0) as site:
        run(site.url, tmp_path, "--count", 5)
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        assert [run(site.url, tmp_path, "--count", count).returncode for count in (8, 8, 2)] == [0, 0, 0]
        served = [site.body(i) for i in range(8)]
    assert names(tmp_path) == sorted(hashlib.sha256(body).hexdigest()[:20] + ".jpg" for body in served)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == set(served)
    assert len(site.times) == 8
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}.items()


@pytest.mark.parametrize("period, count", [(0.05, 40), (0, 250)])
def test_two_runs_at_once_share_a_folder_without_a_double_and_stop_together(tmp_path, period, count):
    with FakeSite(period=period, latency=0.02) as site:
        both = [start(site.url, tmp_path, "--count", count, "--max-rate", 40) for _ in range(2)]
        assert [process.communicate(timeout=60) and process.returncode for process in both] == [0, 0]
    assert count <= len(names(tmp_path)) <= count + 5
    assert_good(tmp_path, len(names(tmp_path)))


def test_an_image_that_another_run_has_just_saved_and_still_has_open_is_no_error(tmp_path, monkeypatch):
    def write_both(path, data, write=Path.write_bytes):
        write(path, data)
        file = open(path.with_name(path.name.split(".")[1] + ".jpg"), "wb")  # noqa: SIM115
        stack.callback(file.close)
        file.write(data)
        file.flush()

    def rename(path, target):  # as Windows does it
        if target.exists():
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists")
        os.rename(path, target)

    monkeypatch.setattr(Path, "write_bytes", write_both)
    monkeypatch.setattr(Path, "rename", rename)
    with FakeSite(period=0) as site, contextlib.ExitStack() as stack:
        assert main("--url", site.url, "--out", tmp_path, "--count", 3, "--workers", 1) == 0
    assert_good(tmp_path, 3)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "The process cannot access the file"),
                                   OSError(errno.EIO, "Input/output error")], ids=["virus scanner", "network disk"])
def test_a_disk_that_fails_once_does_not_end_the_run(tmp_path, monkeypatch, error):
    renamed = []

    def scanned(path, target, rename=os.rename):
        renamed.append(target)
        if len(renamed) == 2:
            raise error
        rename(path, target)

    monkeypatch.setattr(Path, "rename", scanned)
    with FakeSite(period=0) as site:
        assert main("--url", site.url, "--out", tmp_path, "--count", 3) == 0
    assert_good(tmp_path, 3)


def test_an_image_that_the_user_removes_meanwhile_is_not_counted(tmp_path):
    folder = download_images.Folder(tmp_path, 3, 1000)
    assert folder.save("a", ".jpg", b"a") and folder.save("b", ".jpg", b"b")
    (tmp_path / "a.jpg").unlink()
    assert folder.save("c", ".jpg", b"c") and folder.known.keys() == {"b", "c"}


def test_a_folder_deeper_than_260_characters_is_filled(tmp_path):
    out = tmp_path.joinpath(*["folder" * 15] * 3)
    with FakeSite(period=0) as site:
        result = run(site.url, out, "--count", 2)
    assert result.returncode == 0, result.stderr
    assert len(str(out)) > 260 and len(names(out)) == 2
    assert ("\\\\?\\" in result.stdout) == WINDOWS  # without this prefix, Windows accepts no such path


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
    with FakeSite(period=0, encoding=encoding) as site:
        assert run(site.url, tmp_path, "--count", 2).returncode == 0
        assert names(tmp_path) == sorted(f"{site.name(i)}.{encoding.lower()}" for i in range(2))


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
    "fault, reason, permanent",
    [("big", "than 25 MB", True), ("endless", "than 25 MB", True), ("pixels", "64,000,000", True),
     ("tiny", "16 x 16", True), ("html", "not an image", True), ("404", "404 Not Found", True),
     ("cut", "broken", False), ("truncated", "broke", False), ("reset", "broke", False),
     ("empty", "empty", False), ("500", "500", False), ("429", "429", False), ("stall", "no complete", False)],
)  # fmt: skip
def test_every_fault_has_its_reason_and_is_permanent_or_transient(fault, reason, permanent):
    with FakeSite(period=0) as site, pytest.raises(RequestError, match=reason) as error:
        site.script.append(fault)
        body = download_images.fetch(download_images.new_session(), site.url, 0.3 if fault == "stall" else 30)
        download_images.check_image(body)
    assert error.value.permanent == permanent


@pytest.mark.parametrize("number, permanent", [(socket.EAI_NONAME, True), (socket.EAI_AGAIN, False)])
def test_an_unknown_name_is_a_permanent_error_and_an_unreachable_name_server_is_none(monkeypatch, number, permanent):
    def unknown(*_, **__):
        raise socket.gaierror(number, "the text of the system")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(RequestError, match="name cannot be resolved") as error:
        download_images.fetch(download_images.new_session(), "http://no-such-site.invalid/", 30)
    assert error.value.permanent == permanent


def test_broken_files_from_elsewhere_are_named_and_not_counted_and_good_ones_are(tmp_path):
    with FakeSite(period=0) as site:
        run(site.url, tmp_path, "--count", 2)
        cut = tmp_path / names(tmp_path)[0]
        cut.write_bytes(cut.read_bytes()[:-100])
        (tmp_path / "empty.png").touch()
        (tmp_path / "folder.jpg").mkdir()
        (tmp_path / "me.JPEG").write_bytes(site.body(100))
        (tmp_path / "notes.txt").write_text("not an image, not counted")
        result = run(site.url, tmp_path, "--count", 4)
    assert result.returncode == 0
    assert f"3 broken files do not count: {cut.name}, empty.png, folder.jpg" in result.stdout
    assert len(names(tmp_path)) == 4 + 4
    assert len(site.times) == 2 + 2


# ------------------------------------------------------------------ kills and full disks


def test_killed_at_any_moment_it_leaves_nothing_broken(tmp_path):
    with FakeSite(period=0, size=256) as site:
        for kills in range(5):
            process = start(site.url, tmp_path, "--count", 100000, "--max-rate", 0)
            goal = len(site.times) + 3 * kills
            wait_for(lambda goal=goal: len(site.times) > goal)
            process.kill()
            process.communicate()
        saved = len([name for name in names(tmp_path) if name.endswith(".jpg")])
        leftover = tmp_path / ".abc.part"
        leftover.write_bytes(b"left by a killed run some seconds ago")
        os.utime(leftover, (time.time() - 10, time.time() - 10))
        assert run(site.url, tmp_path, "--count", saved + 30).returncode == 0
    assert_good(tmp_path, saved + 30)


def test_old_temporary_files_are_removed_at_the_start_and_those_of_other_runs_are_left_alone(tmp_path):
    old, new = tmp_path / ".old.part", tmp_path / ".new.part"
    old.touch()
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    with FakeSite(period=0) as site:
        process = start(site.url, tmp_path, "--count", 10)
        wait_for(lambda: site.times)
        assert not old.exists()
        new.touch()
        os.utime(new, (time.time() - 2, time.time() - 2))
        process.communicate(timeout=60)
    assert process.returncode == 0 and new.exists()


def test_a_temporary_file_that_another_run_is_writing_is_left_to_it(tmp_path):
    def finish():
        part.rename(tmp_path / "image.jpg")

    with FakeSite(period=0) as site:
        part = tmp_path / ".image.part"
        part.write_bytes(site.body(5))
        other = threading.Timer(0.3, finish)
        other.start()
        assert main("--url", site.url, "--out", tmp_path, "--count", 3) == 0
        other.join()
    assert "image.jpg" in names(tmp_path)
    assert_good(tmp_path, 3)


def test_a_folder_that_cannot_be_written_ends_it_after_a_few_tries(tmp_path, monkeypatch, capsys):
    def refuse(path, data):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(download_images, "LONGEST_PAUSE", 0.05)
    with FakeSite(period=0) as site:
        assert main("--url", site.url, "--out", tmp_path, "--count", 3) == 1
    assert "Gave up: the image cannot be stored: [Errno 13] Permission denied" in capsys.readouterr().err


def test_a_full_disk_ends_it_with_a_sentence_and_nothing_half_written(tmp_path, monkeypatch, capsys):
    def fill(path, data):
        with path.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
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
    assert "has 0.00 GB free, the 998 images wanted need 0.00 GB" in error
    assert 90 <= int(re.search(r"--count (\d+)\. To go on", error)[1]) <= 110
    assert len(site.times) == 2


def test_a_disk_with_room_for_some_of_the_rest_is_used_and_not_filled_to_the_end(tmp_path, monkeypatch, capsys):
    with FakeSite(period=0) as site:
        size = len(site.body(0))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(
            (3000 if len(names(tmp_path)) < 96 else 500) * size))
        assert main("--url", site.url, "--out", tmp_path, "--count", 32) == 0
        capsys.readouterr()
        assert main("--url", site.url, "--out", tmp_path, "--count", 50_000, "--max-rate", 0) == 1
    error = capsys.readouterr().err
    assert "Warning: " in error and "the 49,904 images wanted need" in error.partition("Gave up: ")[2]
    assert_good(tmp_path, 96)


def test_an_empty_folder_on_a_small_disk_is_warned_of_as_sizes_are_a_guess(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(10**6))
    with FakeSite(period=0) as site:
        assert main("--url", site.url, "--out", tmp_path, "--count", 3) == 0
    assert "Warning: " in capsys.readouterr().err


# ------------------------------------------------------------------ when to give up, and when to wait


@pytest.mark.parametrize("fault, reason", [("403", "403 Forbidden"), ("html", "not an image")])
def test_permanent_errors_before_the_first_image_end_it_after_a_few_tries_with_the_command_that_goes_on(
    tmp_path, fault, reason
):
    out = tmp_path / "it's for later & more"
    with FakeSite(period=0) as site:
        url = site.url + "?size=1024&sort=new"
        assert run(url, out, "--count", 2).returncode == 0
        site.fault_rate = 1.0
        site.faults = [fault]
        result = run(url, out, "--count", 10, LONGEST_PAUSE=0.1)
        assert result.returncode == 1
        assert len(site.times) <= 2 + 5 + 15  # those in flight together count as one
    sentence = result.stderr.strip().splitlines()[-1]
    assert reason in sentence and "holds 2" in result.stdout and "Traceback" not in result.stderr
    assert_good(out, 2)
    with FakeSite(period=0, seed=50, port=site.server.server_address[1]):  # it works again; the command goes on
        again = subprocess.run(sentence.split("To go on: ")[1], shell=True, capture_output=True, timeout=60)
    assert again.returncode == 0
    assert_good(out, 10)


@pytest.mark.parametrize("fault, reason", [(None, "refused"), ("503", "503 Service Unavailable")])
def test_a_site_that_never_sends_an_image_is_given_up_with_what_was_tried(tmp_path, fault, reason):
    with FakeSite(fault_rate=1.0, faults=[fault]) as site:
        url = site.url if fault else "http://127.0.0.1:1/"
        result = run(url, tmp_path, "--count", 3, GIVE_UP_AFTER=1.0)
    assert result.returncode == 1
    assert re.search(rf"\d+ requests to {url} in \d+ s brought no image.*{reason}", result.stderr)
    assert download_images.GIVE_UP_AFTER == 120


@pytest.mark.parametrize("fault", ["403", "404", "html", "tiny", "503"])
def test_once_an_image_was_received_no_error_ends_it_however_often_it_comes(tmp_path, fault):
    with FakeSite(period=0) as site:
        site.script.extend([None, *[fault] * 12])
        result = run(site.url, tmp_path, "--count", 3, "--workers", 1, LONGEST_PAUSE=0.05, GIVE_UP_AFTER=0.1)
    assert result.returncode == 0, result.stderr
    assert_good(tmp_path, 3)


def test_a_name_that_cannot_be_resolved_for_a_while_does_not_end_a_run_that_has_received_an_image(tmp_path, monkeypatch):
    look_ups = []

    def restarting_router(*arguments, look_up=socket.getaddrinfo, **options):
        look_ups.append(arguments)
        if 1 < len(look_ups) <= 13:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", restarting_router)
    monkeypatch.setattr(download_images, "LONGEST_PAUSE", 0.05)
    with FakeSite(period=0) as site:
        site.script.extend([None, "reset"])
        assert main("--url", site.url, "--out", tmp_path, "--count", 3, "--workers", 1) == 0
    assert len(look_ups) >= 14
    assert_good(tmp_path, 3)


@pytest.mark.parametrize("fault, reason", [("403", "403 Forbidden"), ("503", "503 Service Unavailable")])
def test_after_an_hour_without_an_image_it_gives_up_and_says_since_when(tmp_path, fault, reason):
    with FakeSite(period=0, faults=[fault]) as site:
        site.script.append(None)
        site.fault_rate = 1.0
        result = run(site.url, tmp_path, "--count", 3, "--workers", 1, LONGEST_PAUSE=0.1, LONGEST_OUTAGE=1.0)
    assert result.returncode == 1
    assert re.search(rf"brought no image, none came since \d\d:\d\d; the last error: .*{reason}", result.stderr)
    assert download_images.LONGEST_OUTAGE == 3600
    assert_good(tmp_path, 1)


def test_once_an_image_was_received_transient_errors_are_waited_out(tmp_path):
    faults = ["503", "stall", "reset", "503"]
    with FakeSite(period=0) as site:
        site.script.extend([None, *faults])
        assert run(site.url, tmp_path, "--count", 3, "--timeout", 0.3, GIVE_UP_AFTER=0.5).returncode == 0
        assert site.counts == {"good": 3, "503": 2, "stall": 1, "reset": 1}
    assert_good(tmp_path, 3)


def test_on_a_slow_connection_no_more_requests_are_in_flight_than_are_answered_in_time(tmp_path):
    with FakeSite(period=0, size=256) as site:
        site.bandwidth = 4 * len(site.body(0))  # four images a second: 16 at once take four seconds
        result = run(site.url, tmp_path, "--count", 20, "--timeout", 1)
        assert result.returncode == 0, result.stderr
    assert int(re.search(r"(\d+) transient errors", result.stdout)[1]) < 2 * 16
    assert_good(tmp_path, 20)


def test_pauses_between_tries_grow_to_half_a_minute_and_errors_of_one_moment_count_once():
    pace, now, pauses = Pace(20), 0.0, []
    for _ in range(30):
        pace.failed(now, RequestError("down"), now)
        pace.failed(now - 0.01, RequestError("down"), now)  # was in flight at the same time
        pauses.append(pace.not_before - now)
        now = pace.not_before
    assert pace.errors == 30
    assert pauses[0] <= 0.2 < pauses[3] and 15 <= pauses[-1] <= 30 and max(pauses) <= 30


@pytest.mark.parametrize("form, seconds", [("429", 2), ("429-date", 4), ("429", 36000)])
def test_retry_after_is_obeyed_up_to_a_cap_and_the_display_says_what_is_waited_for(tmp_path, form, seconds):
    with FakeSite(period=0, retry_after=seconds) as site:
        site.script.extend([None, form])
        result = run(site.url, tmp_path, "--count", 3, "--workers", 1, LONGEST_RETRY_AFTER=2.0, LINE_EVERY=0.1)
    assert result.returncode == 0
    assert site.times[2] - site.times[1] >= 2
    assert "waiting 2 s because the site answered 429 Too Many Requests and asked to wait 2 s" in result.stderr
    assert download_images.LONGEST_RETRY_AFTER == 600


@pytest.mark.parametrize("fault", ["slow-headers", "drip"])
def test_an_answer_that_comes_a_byte_at_a_time_holds_no_worker_longer_than_the_timeout(tmp_path, fault):
    with FakeSite(period=0) as site:
        site.script.extend([fault] * 4)
        result = run(site.url, tmp_path, "--count", 3, "--workers", 2, "--timeout", 0.3)
    assert result.returncode == 0, result.stderr
    assert_good(tmp_path, 3)


# ------------------------------------------------------------------ https


@pytest.fixture
def tls(tmp_path, monkeypatch):
    """The server's side of TLS, with a certificate that the downloader trusts."""
    trustme = pytest.importorskip("trustme", reason="trustme, which makes certificates, is not installed")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.mark.parametrize("fault", ["reset", "cut", "stall", "drip", "slow-headers"])
def test_over_https_too_answers_that_break_or_stall_are_waited_out(tmp_path, tls, fault):
    with FakeSite(period=0, tls=tls) as site:
        site.script.extend([None, fault, fault])
        result = run(site.url, tmp_path / "faces", "--count", 3, "--timeout", 0.5)
        assert result.returncode == 0 and site.counts[fault] == 2, result.stderr
    assert_good(tmp_path / "faces", 3)


@pytest.mark.skipif(requests.__version__ in ("2.32.2", "2.32.3", "2.32.4"), reason="these have a context of their own")
def test_certificates_of_the_system_are_trusted_too(tmp_path, tls, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", os.environ["REQUESTS_CA_BUNDLE"])
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    with FakeSite(period=0, tls=tls) as site:
        result = run(site.url, tmp_path / "faces", "--count", 3)
    assert result.returncode == 0, result.stderr


def test_a_certificate_that_nobody_vouches_for_is_named(tmp_path, tls, monkeypatch):
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    with FakeSite(period=0, tls=tls) as site:
        result = run(site.url, tmp_path / "faces", "--count", 3, GIVE_UP_AFTER=10.0, LONGEST_PAUSE=0.1)
        assert not site.times
    assert result.returncode == 1 and "certificate verify failed" in result.stderr


# ------------------------------------------------------------------ redirects


def test_a_redirect_is_followed_without_waiting_for_its_body(tmp_path):
    with FakeSite(period=0) as site:
        site.script.extend(["redirect"] * 4)
        result = run(site.url, tmp_path, "--count", 2, "--timeout", 5)
        assert site.counts == {"redirect": 4, "good": 2}
    assert result.returncode == 0, result.stderr
    assert "from 6 requests: 0 seen again, 0 refused, 0 transient errors" in result.stdout


def test_no_more_than_five_redirects_of_a_request_are_followed(tmp_path):
    with FakeSite(fault_rate=1.0, faults=["redirect"]) as site:
        result = run(site.url, tmp_path, "--count", 1, "--timeout", 5, LONGEST_PAUSE=0.1, GIVE_UP_AFTER=10.0)
    assert result.returncode == 1
    assert "the site redirects more than 5 times, 5 times in a row" in result.stderr
    assert len(site.times) % (1 + 5) == 0


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/", "data:image/png;base64,AAAA"])
def test_a_redirect_to_anything_but_http_and_https_is_not_followed(tmp_path, location):
    with FakeSite(fault_rate=1.0, faults=["redirect"]) as site:
        site.location = location
        result = run(site.url, tmp_path, "--count", 1, "--timeout", 5, LONGEST_PAUSE=0.1, GIVE_UP_AFTER=10.0)
    assert result.returncode == 1
    assert f"No connection adapters were found for '{location}'" in result.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1", "192.168.0.1", "169.254.169.254", "[::1]", "[fe80::1]"])
def test_a_redirect_to_an_internal_address_on_another_host_is_not_followed(tmp_path, monkeypatch, capsys, host):
    def look_up(host, *arguments, real=socket.getaddrinfo, **options):
        return real("127.0.0.1" if host == "faces.invalid" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(download_images, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(download_images, "GIVE_UP_AFTER", 10.0)
    with FakeSite(fault_rate=1.0, faults=["redirect"]) as site:
        port = site.server.server_address[1]
        site.location = f"http://{host}:{port}/"
        assert main("--url", f"http://faces.invalid:{port}/", "--out", tmp_path, "--count", 1, "--timeout", 5) == 1
        assert 5 <= len(site.times) <= 5 + 15  # only those that were redirected
    assert f"a redirect leads to the internal {host.strip('[]')}, 5 times in a row" in capsys.readouterr().err


def test_a_redirect_may_lead_to_another_page_of_the_same_host_wherever_that_is(tmp_path):
    with FakeSite(period=0) as site, FakeSite(period=0, seed=50) as other:
        site.script.extend(["redirect"] * 2)
        site.location = other.url
        assert run(site.url, tmp_path, "--count", 4).returncode == 0
        assert other.counts == {"good": 2}


def test_redirects_count_as_requests_in_the_pace_whatever_follows_them(tmp_path):
    with FakeSite(period=0) as site:
        site.script.extend([None, *["redirect", "404"] * 4, *["redirect", None] * 4])
        result = run(site.url, tmp_path, "--count", 6, "--max-rate", 10, LONGEST_PAUSE=0.0)
    assert result.returncode == 0, result.stderr
    assert "from 18 requests" in result.stdout
    assert (len(site.times) - 1) / (site.times[-1] - site.times[0]) <= 10.5


# ------------------------------------------------------------------ the pace, on a clock of its own


def simulate(pace, change, seconds, latency=0.02, workers=16, held_up=lambda request: 0.0):
    """Run `pace` against a site whose image at time t is change(t); returns (images seen, request times). Request i is
    held up on its way for held_up(i) seconds."""
    now, seen, asked, pending = 0.0, [], [], []
    while now < seconds:
        due = max(pace.next_at, now)
        if len(pending) < workers and not (pending and pending[0][0] <= due):
            now = due
            pace.last, pace.next_at = now, now + pace.period
            asked.append(now)
            heapq.heappush(pending, (now + held_up(len(asked)) + latency, now))
        else:
            arrives, sent = heapq.heappop(pending)
            now = max(now, arrives)
            seen.append(change(arrives - latency / 2))
            pace.received(sent, seen[-1], now)
    return seen, asked


def assert_in_step(seen, first):
    """From image `first` on, at least 98% were seen, with at most 1.25 requests each."""
    shown = set(range(first, max(seen)))
    assert len(shown & set(seen)) >= 0.98 * len(shown)
    assert sum(image >= first for image in seen) <= 1.25 * len(shown)


@pytest.mark.parametrize("period", [0.07, 0.1, 0.3, 1.0, 7.0])
def test_it_finds_the_period_by_itself(period):
    seen, _ = simulate(Pace(20), lambda t: int(t / period), 200 * period)
    assert_in_step(seen, 20)


@pytest.mark.parametrize("before, after", [(0.2, 0.4), (0.3, 3.0), (0.4, 0.2), (1.0, 0.3)])
def test_it_follows_when_the_site_changes_its_pace(before, after):
    def change(t):
        return int(t / before) if t < 100 * before else 100 + int((t - 100 * before) / after)

    seen, _ = simulate(Pace(20), change, 100 * before + 200 * after)
    assert_in_step(seen, 180)  # it had 80 images to get used to it


def test_it_is_back_in_step_soon_after_the_site_stood_still():
    def change(t):  # a second each, but the one of second 100 stays for ten minutes
        return int(t) if t < 100 else 100 + max(0, int(t - 700))

    seen, asked = simulate(Pace(20), change, 900)
    assert len({i for i in seen if i >= 150}) >= 0.98 * (max(seen) - 150)
    assert sum(100 < t < 700 for t in asked) <= 100
    assert min(i for i in seen if i > 100) < 100 + 10


def test_requests_that_are_held_up_cost_few_images():
    seen, asked = simulate(Pace(20), lambda t: int(t), 2000, latency=0.2, held_up=lambda request: 3.0 * (request % 100 == 0))
    assert len({image for image in seen if image >= 20}) >= 0.98 * 1980 and len(asked) <= 1.25 * 2000


def test_it_asks_side_by_side_where_every_answer_is_new():
    seen, _ = simulate(Pace(0), lambda t: t, 20, latency=0.2)
    assert len(set(seen)) > 8 * 20 / 0.2


def test_it_never_asks_more_often_than_max_rate():
    for rate in (0.5, 5, 20):
        _, asked = simulate(Pace(rate), lambda t: t, 100, latency=0.3)
        assert min(b - a for a, b in zip(asked, asked[1:], strict=False)) >= 1 / rate - 1e-9


def test_the_site_sees_no_more_than_max_rate(tmp_path):
    with FakeSite(period=0, fault_rate=0.3, faults=["500", "404", "reset"]) as site:
        assert run(site.url, tmp_path, "--count", 12, "--max-rate", 10).returncode == 0
    assert (len(site.times) - 1) / (site.times[-1] - site.times[0]) <= 10.5


# ------------------------------------------------------------------ the end, and what is seen


@pytest.mark.parametrize("what", STOPS)
@pytest.mark.parametrize("fault", [None, "slow-headers", "429"])
def test_a_signal_ends_it_with_130_and_a_clean_folder(tmp_path, what, fault):
    with FakeSite(period=0, retry_after=600) as site:
        site.script.extend([None] * 5)
        site.fault_rate, site.faults = (1.0 if fault else 0.0), [fault]
        process = start_to_be_stopped(command(site.url, tmp_path, "--count", 100000))
        wait_for(lambda: len(site.times) > 5)
        out, err = stop(process, what)
    assert process.returncode == 130
    assert "To go on: " in err and f"holds {len(names(tmp_path))}." in out and "Traceback" not in err
    assert_good(tmp_path, len(names(tmp_path)))


@needs_terminals
def test_a_terminal_that_is_closed_ends_it_with_130_and_a_clean_folder(tmp_path):
    ours, theirs = os.openpty()
    with FakeSite(period=0) as site:
        wanted = command(site.url, tmp_path, "--count", 100000)
        code = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *wanted], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        wait_for(lambda: len(site.times) > 5)
        os.close(ours)
        assert process.wait(timeout=60) == 130
    assert_good(tmp_path, len(names(tmp_path)))


@pytest.mark.skipif(WINDOWS, reason="Windows has no nohup, and no SIGHUP")
def test_under_nohup_a_terminal_that_is_closed_does_not_end_it(tmp_path):
    with FakeSite(period=0) as site:
        wanted = command(site.url, tmp_path, "--count", 100000)
        process = subprocess.Popen(["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *wanted], stderr=subprocess.PIPE)
        wait_for(lambda: len(site.times) > 5)
        process.send_signal(signal.SIGHUP)
        seen = len(site.times)
        wait_for(lambda: len(site.times) > seen + 5)
        stop(process, "SIGTERM")
    assert process.returncode == 130


def test_an_output_that_is_closed_does_not_end_it(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with FakeSite(period=0) as site:
        process = subprocess.Popen(command(site.url, tmp_path, "--count", 5), stdout=writer, stderr=writer)
        os.close(writer)
        assert process.wait(timeout=60) == 0
    assert_good(tmp_path, 5)


def test_without_any_output_a_folder_is_filled(tmp_path):
    with FakeSite(period=0) as site:  # Windows calls the null device a terminal
        null = subprocess.DEVNULL
        subprocess.run(command(site.url, tmp_path, "--count", 2), stdout=null, stderr=null, timeout=60, check=True)
    assert_good(tmp_path, 2)


def test_files_of_zeros_and_hidden_ones_do_not_count(tmp_path):
    (tmp_path / "zeros.jpg").write_bytes(bytes(5000))  # as a power failure leaves them
    (tmp_path / "._face.jpg").write_bytes(b"attributes of a file on macOS")
    with FakeSite(period=0) as site:
        result = run(site.url, tmp_path, "--count", 3)
    assert "1 broken files do not count: zeros.jpg" in result.stdout
    assert len(list(tmp_path.glob("[!.z]*.jpg"))) == 3


def test_a_path_that_the_output_cannot_encode_is_written_with_backslashes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    out = made(tmp_path / "Bilder für später")
    (out / "kaputt ä.png").mkdir()
    with FakeSite(period=0) as site:
        result = run(site.url, out, "--count", 2)
    assert result.returncode == 0, result.stderr
    assert "Bilder f\\xfcr sp\\xe4ter holds 2." in result.stdout and "kaputt \\xe4.png" in result.stdout


def test_with_the_output_in_a_file_a_folder_is_filled_whatever_its_name(tmp_path):
    out = made(tmp_path / "Bilder für später 顔")  # Windows writes files in an encoding of 256 characters
    with FakeSite(period=0) as site, open(tmp_path / "log.txt", "wb") as log:
        subprocess.run(command(site.url, out, "--count", 2), stdout=log, stderr=log, timeout=60, check=True)
    assert_good(out, 2)
    assert b"holds 2." in (tmp_path / "log.txt").read_bytes()


def test_a_full_folder_has_its_summary_even_before_the_clock_ticks(tmp_path, monkeypatch, capsys):
    with FakeSite(period=0) as site:
        assert run(site.url, tmp_path, "--count", 2).returncode == 0
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)  # on Windows it moves in steps of 16 ms
    assert main("--url", site.url, "--out", tmp_path, "--count", 2) == 0
    assert "0 new images" in capsys.readouterr().out


def test_it_says_first_what_will_happen_and_without_a_terminal_in_plain_lines(tmp_path):
    with FakeSite(period=0) as site:
        run(site.url, tmp_path, "--count", 2)
        result = run(site.url, tmp_path, "--count", 6000, LONGEST_PAUSE=0.0, MAX_BODY=0)  # and gives up
        size = sum(path.stat().st_size for path in tmp_path.iterdir()) / 2
    start, plan, summary = result.stdout.splitlines()
    cost = f"the other 5,998 take about 1.7 hours at one a second, and {5998 * size / 1e9:.2f} GB of disk"
    assert start == f"Looking through {tmp_path} ..."
    assert "holds 2 of 6,000 images wanted" in plan and cost in plan and "training" in plan
    assert "holds 2." in summary
    assert re.fullmatch(r"[ -~\n]*", result.stdout + result.stderr)


@needs_terminals
def test_on_a_terminal_there_is_a_bar(tmp_path):
    import fcntl
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    with FakeSite(period=0) as site:
        site.script.extend([None, "503", "503", "503", "html"])
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


def test_control_characters_of_the_site_and_of_file_names_are_not_shown(tmp_path):
    name = "a\x1b[31m\nb.png"
    if WINDOWS:  # which has no such names
        name = "a?[31m?b.png".replace("?", "")
    (tmp_path / name).touch()
    with FakeSite(fault_rate=1.0, faults=["control"]) as site:
        result = run(site.url, tmp_path, "--count", 2, LINE_EVERY=0.0, LONGEST_PAUSE=0.1)
    assert "a?[31m?b.png" in result.stdout or WINDOWS
    assert "the site answered 403 ?]0;forged? Forbidden, 5 times in a row" in result.stderr
    assert re.fullmatch(r"[ -~\n]*", result.stdout + result.stderr)


# ------------------------------------------------------------------ a user's mistakes


@pytest.mark.parametrize(
    "options",
    [("--count", "0"), ("--count", "many"), ("--url", "thispersondoesnotexist.com"), ("--url", "http://"),
     ("--workers", "0"), ("--max-rate", "-1"), ("--size", "5"), ("--timeout", "0"), ("--max-rate", "nan"),
     ("--out", str(SCRIPT)), ("--url", "http://a:b/"), ("--url", "ftp://a/"), ("--faces", "5")],
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
