"""Break the training of scriptc.py in every way at hand and see whether it keeps its promises; print a markdown table.

    python tests/benchmarks/bench_faults.py                             # every part, over an hour on two cores
    python tests/benchmarks/bench_faults.py kills inside-save           # some
    python tests/benchmarks/bench_faults.py kills --runs 4              # small: a minute or two
    python tests/benchmarks/bench_faults.py inside-save --every 20      # small
    python tests/benchmarks/bench_faults.py mutated --files 40          # small
    python tests/benchmarks/bench_faults.py full-disk --minutes 0.5     # small
    python tests/benchmarks/bench_faults.py cost --steps 3              # small

kills        runs killed by SIGKILL at random moments, start-up included, until a restart gets through: each ends with the
             weights, the table and the last grid of an undisturbed run, to the bit, and loses no more than the interval
             between two saves
inside-save  a save killed at each of its system calls in turn, and each of them that touches a file failing with ENOSPC or
             EIO: there is always a whole checkpoint, at once, and the next save works
mutated      damaged and foreign checkpoints: the one before is used, or one sentence says no; nothing in them is
             executed, the bad file is kept, memory stays bounded
full-disk    a disk that fills in the middle of training: training goes on and saves when there is room again; where there
             never is, it ends in one sentence. The last good checkpoint is whole throughout
cost         what saving costs of the training time with default settings; a figure, not a promise

Linux only. Without strace `inside-save` is skipped, without the right to mount `full-disk` is. Exits 1 if a promise is broken.
"""

import argparse
import collections
import contextlib
import importlib.util
import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fake_face.draw_faces import fill_folder  # noqa: E402
from tests import runs  # noqa: E402
from tests.runs import PARTS, ROOT, command, digest, outcome, table, whole  # noqa: E402

SMALL = (*runs.SMALL, "--batch-size", "64")
MEMORY = 500  # MB that a bad checkpoint may cost beyond a good one


# ---------------------------------------------------------------------------------------------------------- tools ----


def draw(folder, count, size=32):
    """Fill `folder` with drawn faces."""
    with contextlib.redirect_stderr(io.StringIO()):
        fill_folder(folder, count, size)


def start(args, folder, *flags, faces=None, threads=1, log=None):
    """Start scriptc.py as a user does, on the images `faces`; its output goes into `log`, else into `folder`/output."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = command(folder, "--dataroot", faces or folder / "faces", *flags)[2:]
    with open(log or folder / "output", "ab") as output:
        return subprocess.Popen([sys.executable, str(args.scriptc), *arguments], stdout=output, stderr=output,
                                env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def forked(action, output, seconds=60):
    """Call `action` in a forked child: (exit status, negative for a signal, None if it hung; highest MB of memory)."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 70
        try:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            status = action()
        except SystemExit as error:
            status = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    deadline, hung = time.monotonic() + seconds, False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return None if hung else os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024
        if time.monotonic() > deadline and not hung:
            hung = True
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def spread(function, items, jobs):
    """[function(item), ...] in any order, worked off by `jobs` forked processes."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def work(share):
        for item in share:
            try:
                results.put((function(item), None))
            except BaseException:
                results.put((None, traceback.format_exc()))

    workers = [context.Process(target=work, args=(items[first::jobs],)) for first in range(jobs)]
    for worker in workers:
        worker.start()
    answers = [results.get() for _ in items]
    for worker in workers:
        worker.join()
    for _, error in answers:
        if error:
            raise RuntimeError(error)
    return [answer for answer, _ in answers]


def parts(state):
    return digest({name: state[name] for name in PARTS})


def last_line(path):
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"


# ---------------------------------------------------------------------------------------------------------- kills ----


def lost(folder):
    """What a kill has cost: (seconds of training, steps) of the table's rows that the checkpoint does not hold.

    The table has one row an epoch, so up to one epoch more may be gone; raises where there is a checkpoint, but no whole one.
    """
    path = folder / "checkpoint.pth"
    state = whole(path) if path.exists() else {"images_seen": 0, "step": 0}
    seconds, seen, step = 0.0, state["images_seen"], state["step"]
    for row in table(folder):
        if int(row["images_seen"]) > seen:
            seconds += (int(row["images_seen"]) - seen) / float(row["images_per_second"])
            seen, step = int(row["images_seen"]), int(row["step"])
    return seconds, step - state["step"]


def kills(args, folder):
    flags = (*SMALL, "--epochs", args.epochs, "--save-minutes", args.save_minutes, "--precision")
    draw(folder / "faces", 40)

    def undisturbed(precision):
        begun = time.monotonic()
        shutil.copytree(folder / "faces", folder / precision / "faces")
        if start(args, folder / precision, *flags, precision).wait():
            raise RuntimeError(f"the undisturbed run failed: {last_line(folder / precision / 'output')}")
        return outcome(folder / precision), time.monotonic() - begun

    def disturbed(number):
        """(kills, most seconds lost, most steps lost, what went wrong) of one run."""
        precision, moment, own = ("fp32", "bf16")[number % 2], random.Random(f"{args.seed} {number}"), folder / str(number)
        expected, duration = references[precision]
        shutil.copytree(folder / "faces", own / "faces")
        losses, wrong = [], []
        while True:
            process = start(args, own, *flags, precision)
            try:
                status = process.wait(moment.uniform(0, duration))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                try:
                    losses.append(lost(own))
                except Exception as error:  # a checkpoint that is not whole can make the readers raise anything
                    wrong.append(f"run {number}: no whole checkpoint after kill {len(losses) + 1}: {error!r}")
                    losses.append((0, 0))
                continue
            if losses or status:
                break
            shutil.rmtree(own / "results")  # it got through before the first kill: once more
            (own / "checkpoint.pth").unlink()
        if status:
            wrong.append(f"run {number}: a restart ended with {status}: {last_line(own / 'output')}")
        else:
            found = outcome(own)
            wrong += [f"run {number}: another {name} than undisturbed" for name in expected if found[name] != expected[name]]
        for seconds, steps in losses:
            if seconds > 60 * args.save_minutes + seconds / max(steps, 1):  # it can only be saved after a step
                wrong.append(f"run {number}: {seconds:.2f} s of training lost, {60 * args.save_minutes:.2f} s allowed")
        shutil.rmtree(own)
        print(f"run {number}: {len(losses)} kills, {'; '.join(wrong) or 'bit-identical'}", file=sys.stderr, flush=True)
        return losses, wrong

    with ThreadPool(args.jobs) as pool:
        references = dict(zip(("fp32", "bf16"), pool.map(undisturbed, ("fp32", "bf16"), chunksize=1)))
        results = pool.map(disturbed, range(args.runs), chunksize=1)
    losses = [one for losses, _ in results for one in losses]
    wrong = [line for _, lines in results for line in lines]
    bad = sum(bool(lines) for _, lines in results)
    return (f"{args.runs} runs, {len(losses)} kills: {args.runs - bad} end bit-identical to an undisturbed run; most lost "
            f"{max(losses)[0]:.2f} s of training, {max(steps for _, steps in losses)} steps, with a save every "
            f"{60 * args.save_minutes:.2f} s"), wrong


# ---------------------------------------------------------------------------------------------------- inside-save ----

NAMES = {"open", "openat", "creat", "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat"}
WRITES = {"write", "writev", "pwrite64", "fsync", "fdatasync", "ftruncate", "fallocate", "copy_file_range", "sendfile"}
READS = {"read", "pread64", "readv", "lseek", "close", "stat", "fstat", "newfstatat", "statx", "mmap"}


def traced_save(module, folder, state, *options):
    """save_checkpoint in a forked child under strace: (exit status, trace).

    0 is saved, 3 an OSError or RuntimeError, 4 any other (its text is then in `folder`/error), -9 killed. The child sleeps
    until the first line of the trace is there, so every call of the save is seen.
    """
    go = mmap.mmap(-1, 1)
    log = folder / "trace"
    pid = os.fork()
    if not pid:
        status = 4
        try:
            while not go[0]:
                time.sleep(0.002)
            module.save_checkpoint(folder / "checkpoint.pth", state)
            status = 0
        except (OSError, RuntimeError):
            status = 3
        except BaseException as error:
            (folder / "error").write_text(repr(error))
        finally:
            os._exit(status)
    command = ["strace", "-f", "-qq", "-o", str(log), "-p", str(pid), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as strace:
        while not (log.exists() and log.stat().st_size):
            if strace.poll() is not None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise PermissionError(strace.stderr.read().strip())
            time.sleep(0.002)
        go[0] = 1
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, log.read_text(errors="replace")


def inside_save(args, folder):
    if not shutil.which("strace"):
        return "skipped: there is no strace", []
    module, checkpoints = args.module, train_checkpoints(args, folder)
    states = [torch.load(io.BytesIO(blob), weights_only=True) for blob in checkpoints]

    def prepared(name, earlier):
        """A folder as `earlier` saves leave it, 0 to 2, and the texts of what may be read after the next one."""
        own = folder / name
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        for state in states[2 - earlier:2]:
            module.save_checkpoint(own / "checkpoint.pth", state)
        return own, parts(states[1]) if earlier else None, parts(states[2])

    def calls(earlier):
        """{name of a system call: how often one thread makes it during a save}."""
        status, trace = traced_save(module, prepared("count", earlier)[0], states[2])
        if status:
            raise RuntimeError(f"an undisturbed save ended with {status}")
        per_thread = collections.Counter(re.findall(r"^(\d+) +(\w+)\(", trace, re.MULTILINE))
        most = {}
        for (_, name), count in per_thread.items():
            most[name] = max(most.get(name, 0), count)
        return {name: most[name] for name in most if name not in ("clock_nanosleep", "restart_syscall", "exit_group")}

    def attempt(case):
        """(what was done, ended as, what went wrong) of one disturbed save."""
        number, earlier, injection = case
        own, old, new = prepared(f"case {number}", earlier)
        traced = f"trace=clock_nanosleep,{injection.partition(':')[0]}"
        status, _ = traced_save(module, own, states[2], "-e", traced, "-e", f"inject={injection}")
        what = f"{injection}, {earlier} saves before"
        wrong = []
        if status not in (0, 3, -signal.SIGKILL):
            wrong.append(f"{what}: the save raised what it does not promise, {(own / 'error').read_text()}")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            try:
                found = module.read_checkpoint(own / "checkpoint.pth")
                found = found and parts(found)
                if found not in (old, new) or status == 0 and found != new:
                    wrong.append(f"{what}: ended with {status}, then neither the old nor the new state is read"
                                 if found else f"{what}: ended with {status}, then no checkpoint is found")
                if said.getvalue() or list(own.glob("*broken*")):
                    wrong.append(f"{what}: {said.getvalue().strip()}")
                module.save_checkpoint(own / "checkpoint.pth", states[2])
                if parts(module.read_checkpoint(own / "checkpoint.pth")) != new:
                    wrong.append(f"{what}: the next save is not what is read")
            except Exception as error:  # whatever it is, it must not happen
                wrong.append(f"{what}: {error!r}")
        left = sum(path.stat().st_size for path in own.iterdir() if path.name.endswith(".tmp"))
        shutil.rmtree(own)
        return status, left, wrong

    try:
        prepared("warm-up", 2)
        everything = calls(2)
    except PermissionError as error:
        return f"skipped: {error}", []
    cases = []
    for earlier, names in ((2, set(everything)), (0, NAMES), (1, NAMES)):
        cases += [(earlier, f"{name}:signal=KILL:when={n + 1}")
                  for name, count in calls(earlier).items() if name in names
                  for n in range(0, count, args.every if count > 20 else 1)]
    kill_cases = len(cases)
    cases += [(2, f"{name}:error={error}:when={n + 1}") for name, count in everything.items()
              for error in ("ENOSPC", "EIO") if name in NAMES | WRITES or name in READS and error == "EIO"
              for n in range(0, count, args.every if count > 20 else 1)]
    results = spread(attempt, [(number, *case) for number, case in enumerate(cases)], args.jobs)
    ended = collections.Counter(status for status, *_ in results)
    wrong = [line for *_, lines in results for line in lines]
    return (f"{sum(everything.values())} calls in a save; {kill_cases} saves to be killed, {ended[-signal.SIGKILL]} were; "
            f"{len(cases) - kill_cases} errors met, {ended[3]} reported by the save; left over at most "
            f"{max(left for _, left, _ in results) / 1e6:.1f} MB; {sum(bool(lines) for *_, lines in results)} broke a promise"
            ), wrong


# -------------------------------------------------------------------------------------------------------- mutated ----


def train_checkpoints(args, folder, steps=(2, 4, 6)):
    """The bytes of a small run's checkpoint after each number of steps; leaves faces/ with its cache in `folder`."""
    draw(folder / "faces", 40)
    blobs = []
    for number in steps:
        first = (*SMALL, "--precision", "fp32") if not blobs else ("--sample-steps", "3")
        if start(args, folder / "trained", *first, "--max-steps", number, faces=folder / "faces").wait():
            raise RuntimeError(last_line(folder / "trained" / "output"))
        blobs.append((folder / "trained" / "checkpoint.pth").read_bytes())
    return blobs


def saved(state, **options):
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


# Damage to the bytes: (random, bytes) to bytes. Some of it leaves the content as it was.


def flip(chance, blob, bits, first=0):
    changed = bytearray(blob)
    for _ in range(bits):
        changed[chance.randrange(int(first * len(blob)), len(blob))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(chance, blob, where):
    one, other = sorted(chance.randrange(len(blob) + 1) for _ in range(2))
    return {"start": blob[other:], "end": blob[:one], "middle": blob[:one] + blob[other + 1:]}[where]


def zeroed(chance, blob):
    size = chance.choice((512, 4096, 65536))
    first = chance.randrange(len(blob) // 512) * 512
    return blob[:first] + bytes(len(blob[first:first + size])) + blob[first + size:]


DAMAGE = {
    "one bit flipped": lambda chance, blob: flip(chance, blob, 1),
    "many bits flipped": lambda chance, blob: flip(chance, blob, chance.choice((2, 10, 100, 10_000))),
    "zip directory flipped": lambda chance, blob: flip(chance, blob, chance.choice((1, 3)), 0.94),
    "start cut off": lambda chance, blob: cut(chance, blob, "start"),
    "end cut off": lambda chance, blob: cut(chance, blob, "end"),
    "middle cut out": lambda chance, blob: cut(chance, blob, "middle"),
    "block of zeros": zeroed,
    "bytes put in": lambda chance, blob: (lambda at: blob[:at] + chance.randbytes(chance.choice((1, 64, 5000))) + blob[at:])(
        chance.randrange(len(blob))),
    "random bytes": lambda chance, blob: chance.choice((b"", b"PK\x03\x04", b"\x80\x02")) + chance.randbytes(
        chance.choice((0, 1, 1000, 100_000))),
}


# Other content in a file that is whole: (random, state, canary) to bytes. It is refused, and nothing in it is executed.


def foreign(chance, state, _):
    return saved(chance.choice((
        dict(state["model"]), {"state_dict": state["model"]}, [], {}, "text", 7, torch.zeros(3), [state],
        {name: None for name in state}, dict.fromkeys(state, {}), {"epoch": 3, "model_state_dict": state["model"]})))


class Code:
    """Unpickled by a careless reader, it makes the canary."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def code(chance, state, canary):
    trap = chance.choice((Code(os.system, f"touch '{canary}'"), Code(open, str(canary), "w"), Code(os.mkdir, str(canary)),
                          Code(eval, f"open({str(canary)!r}, 'w')"), Code(Path.touch, Path(canary))))
    state[chance.choice((*state, "extra"))] = trap
    return chance.choice((lambda: saved(state), lambda: saved(trap), lambda: pickle.dumps(trap),
                          lambda: saved(state, _use_new_zipfile_serialization=False)))()


def bomb(chance, state, _, size=2 * 10**9):
    """A few MB that unpack to two GB: one entry of the archive is long, and compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(state))) as archive, zipfile.ZipFile(out, "w") as copy:
        big = chance.choice([name for name in archive.namelist() if "/data/" in name or name.endswith("/data.pkl")])
        for name in archive.namelist():
            if name != big:
                copy.writestr(name, archive.read(name))
        info = zipfile.ZipInfo(big)
        info.compress_type = zipfile.ZIP_DEFLATED
        with copy.open(info, "w", force_zip64=True) as file:
            for _ in range(size // 10**7):
                file.write(bytes(10**7))
    return out.getvalue()


FOREIGN = {"foreign": foreign, "code": code, "zip bomb": bomb}


def mutated(args, folder):
    _, older, good = train_checkpoints(args, folder)

    def go_on(own, checkpoint, previous):
        """One more step with these files in `own`: (exit status or None, MB)."""
        own.mkdir()
        for name, blob in (("checkpoint.pth", checkpoint), ("checkpoint.previous.pth", previous)):
            if blob is not None:
                (own / name).write_bytes(blob)
        flags = ["--sample-steps", "3", "--max-steps", "7"]
        return forked(lambda: limited(lambda: args.module.main(command(own, "--dataroot", folder / "faces", *flags)[2:])), own)

    def limited(action):
        """Call it with 8 GB of address space more than there are now: a bomb shall not take the machine with it."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 8 * 10**9,) * 2)
        return action()

    references = {}
    for name, blob in (("from itself", good), ("from the one before", older)):
        status, usual = go_on(folder / name, blob, None)
        if status:
            raise RuntimeError(last_line(folder / name / "stderr"))
        references[name] = outcome(folder / name)

    def judge(own, bad, status, megabytes, allowed):
        """(what came of it, what went wrong)."""
        texts = [(own / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        kept = any(path.read_bytes() == bad for path in own.iterdir() if path.is_file())
        wrong = ["executed"] * (own / "canary").exists() + ["too much memory"] * (megabytes > usual + MEMORY)
        if status is None or status < 0:
            return "hung" if status is None else "crashed", [*wrong, "hung" if status is None else f"signal {-status}"]
        if any("Traceback" in text for text in texts):
            return "traceback", [*wrong, f"traceback: {texts[1].strip().splitlines()[-1]}"]
        if status == 0:
            try:
                found = outcome(own)
                came = next((name for name, expected in references.items() if found == expected), "from something else")
            except Exception as error:  # what it left can make the readers raise anything
                came, wrong = "from something else", [*wrong, f"left no whole checkpoint: {error!r}"]
        else:
            lines = texts[1].strip().splitlines()
            came = "refused"
            wrong += [f"status {status}, {len(lines)} lines"] * (status != 1 or len(lines) != 1)
        wrong += [f"went on {came}" if status == 0 else came] * (came not in allowed)
        wrong += ["the bad file is gone"] * (came != "from itself" and not kept)
        return came, wrong

    def attempt(number):
        """[(kind, with a previous one or not, what came of it, what went wrong)] of one bad file."""
        chance, own = random.Random(f"{args.seed} {number}"), folder / str(number)
        kind = list(itertools.chain(DAMAGE, FOREIGN))[number % (len(DAMAGE) + len(FOREIGN))]
        found = []
        if kind in DAMAGE:
            bad = DAMAGE[kind](chance, good)
        else:
            bad = FOREIGN[kind](chance, torch.load(io.BytesIO(good), weights_only=True), own / "canary")
        for previous, allowed in ((older, "from the one before"), (None, "refused")):
            status, megabytes = go_on(own, bad, previous)
            sound = {"from itself"} if kind in DAMAGE else set()
            came, wrong = judge(own, bad, status, megabytes, {allowed} | sound)
            found.append((kind, previous is not None, came,
                          [f"file {number}, {kind}, {'with' if previous else 'without'} one before: {line}" for line in wrong]))
            shutil.rmtree(own)
        return found

    results = [one for found in spread(attempt, list(range(args.files)), args.jobs) for one in found]
    counts = collections.Counter(came for _, _, came, _ in results)
    wrong = [line for *_, lines in results for line in lines]
    executed = sum(line.endswith("executed") for line in wrong)
    return (f"{args.files} files, each with and without a good one before: {counts['from the one before']} times the one "
            f"before was used, {counts['refused']} refused, {counts['from itself']} accepted as they were, "
            f"{counts['from something else']} accepted wrongly, {counts['traceback']} tracebacks, {executed} executed, "
            f"{counts['hung']} hung, {counts['crashed']} crashed; {sum(bool(lines) for *_, lines in results)} broke a promise"
            ), wrong


# ------------------------------------------------------------------------------------------------------ full-disk ----


def full_disk(args, folder):
    draw(folder / "faces", 40)
    disk = folder / "disk"
    disk.mkdir()
    found, wrong = [], []
    for freed in (True, False):
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk], capture_output=True, text=True)
        if mounted.returncode:
            return f"skipped: {mounted.stderr.strip()}", []
        try:
            text, lines = fill_disk(args, disk, folder / "faces", freed)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
        found.append(text)
        wrong += [f"{'freed' if freed else 'never freed'}: {line}" for line in lines]
    return "; ".join(found), wrong


def fill_disk(args, disk, faces, freed):
    """Train onto `disk`, fill it after the first checkpoint, and free it again or not: (result, what went wrong)."""
    log, path, wrong = disk.parent / f"freed {freed}", disk / "checkpoint.pth", []
    flags = (*SMALL, "--channels", "24", "48", "72", "--save-minutes", "0.02", "--minutes", args.minutes)
    process = start(args, disk, *flags, faces=faces, log=log)
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    usual = len(log.read_text().splitlines())
    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
        while ballast.write(bytes(4096)):
            pass
    filled, reads, steps = time.monotonic(), 0, set()
    while process.poll() is None:
        if time.monotonic() - filled > 180 * args.minutes + 60:
            process.kill()
            wrong.append("hung")
        try:
            steps.add(whole(path)["step"])
            reads += 1
        except Exception as error:  # a checkpoint that is not whole can make the readers raise anything
            wrong.append(f"no whole checkpoint while the disk is full: {error!r}")
            break
        if freed and time.monotonic() - filled > 20 * args.minutes:  # a third of the run
            (disk / "ballast").unlink(missing_ok=True)
        time.sleep(0.05)
    status = process.wait()
    (disk / "ballast").unlink(missing_ok=True)
    lines = log.read_text().splitlines()
    said = [line for line in lines[usual:] if "space" in line.lower() or "full" in line.lower()]
    if "Traceback (most recent call last):" in lines:
        wrong.append(f"traceback: {lines[-1]}")
    if status != (0 if freed else 1):
        wrong.append(f"ended with {status}: {lines[-1]}")
    if not said:
        wrong.append("nothing was said of the full disk")
    if not freed and not lines[-1].startswith("scriptc.py: "):
        wrong.append(f"the last line is not the sentence that says why: {lines[-1]}")
    state = whole(path)
    if freed and not state.get("finished", True):
        wrong.append("the last checkpoint is not that of the end")
    return (f"{'freed after a while' if freed else 'never freed'}: ended with {status}, {path.stat().st_size / 1e6:.1f} MB "
            f"checkpoint whole in {reads} of {reads + ('no whole' in ' '.join(wrong))} looks at {len(steps)} states, "
            f"{len(said)} lines about the disk"), wrong


# ----------------------------------------------------------------------------------------------------------- cost ----


def cost(args, folder):
    draw(folder / "few", 3)
    draw(folder / "faces", 120, 64)  # fewer than a batch, as the three: a step is an epoch, with a row of its own

    def measured(name, faces, *flags):
        """(seconds of each step, saves seen) of a run with the default network."""
        own, times = folder / name, set()
        process = start(args, own, *flags, "--sample-steps", "1", faces=folder / faces,
                        threads=os.cpu_count())
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                times.add((own / "checkpoint.pth").stat().st_mtime_ns)
            time.sleep(0.01)
        if process.returncode:
            raise RuntimeError(last_line(own / "output"))
        seen = [0, *(int(row["images_seen"]) for row in table(own))]
        speeds = [float(row["images_per_second"]) for row in table(own)]
        return [(now - earlier) / speed for earlier, now, speed in zip(seen, seen[1:], speeds)], len(times)

    steps, saves = {"never": [], "always": []}, 0
    for turn, when in enumerate(("never", "always", "never", "always")):
        interval = {"never": "1000", "always": "0.00001"}[when]
        seconds, count = measured(f"{when} {turn}", "few", "--image-size", "16", "--max-steps", 4 * args.steps,
                                  "--save-minutes", interval)
        steps[when] += seconds
        saves += count * (when == "always")
    plain, saving = (statistics.median(steps[when]) for when in ("never", "always"))
    held_up = (saving - plain) * len(steps["always"]) / saves
    seconds, count = measured("defaults", "faces", "--max-steps", args.steps)
    size = (folder / "defaults" / "checkpoint.pth").stat().st_size / 1e6
    return (f"a save of {size:.0f} MB holds training up for {held_up:.2f} s (default network at 16 px, where steps are short: "
            f"{plain:.2f} s without a save, {saving:.2f} s with one): {held_up / 600:.3%} of the time at one in ten minutes. "
            f"With default settings and epochs of one step of {statistics.median(seconds):.1f} s {count - 1} saves before that "
            f"at the end, {(count - 1) * held_up / sum(seconds):.2%} of {sum(seconds):.0f} s"), []


# ----------------------------------------------------------------------------------------------------------- main ----

ROWS = {"kills": kills, "inside-save": inside_save, "mutated": mutated, "full-disk": full_disk, "cost": cost}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("rows", nargs="*", metavar="PART", help=f"of {', '.join(ROWS)}; default all")
    add("--scriptc", type=Path, default=ROOT / "scriptc.py", help="the script to test (the repository's)")
    add("--seed", type=int, default=0, help="of every random choice (0)")
    add("--jobs", type=int, default=2, help="runs at a time (2)")
    add("--runs", type=int, default=100, help="kills: runs to disturb (100)")
    add("--epochs", type=int, default=30, help="kills: length of a run (30)")
    add("--save-minutes", type=float, default=0.01, help="kills: time between two saves (0.01)")
    add("--every", type=int, default=1, help="inside-save: only every N-th of the calls that come more than 20 times (1)")
    add("--files", type=int, default=500, help="mutated: bad checkpoints (500)")
    add("--minutes", type=float, default=1, help="full-disk: length of each of the two runs (1)")
    add("--steps", type=int, default=8, help="cost: steps with default settings, four times as many short ones (8)")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(ROWS)}")

    torch.set_num_threads(1)  # in what is forked from here
    spec = importlib.util.spec_from_file_location("scriptc", args.scriptc)
    args.module = sys.modules["scriptc"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(args.module)
    import matplotlib.figure  # noqa: F401  (so that no forked run has to)

    broken = {}
    print("| part | result | minutes |\n| --- | --- | --- |", flush=True)
    for row in args.rows or ROWS:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            result, broken[row] = ROWS[row](args, Path(folder))
        print(f"| {row} | {result} | {(time.monotonic() - begun) / 60:.1f} |", flush=True)
    for row, lines in broken.items():
        print("".join(f"\n{row}: {line}" for line in lines), end="\n" * bool(lines))
    return 1 if any(broken.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
