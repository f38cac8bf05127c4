"""scriptc.py as a user runs it: every test is one promise about what its commands do."""

import contextlib
import copy
import errno
import io
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import scriptc
from fake_face.draw_faces import draw_face, fill_folder
from tests.runs import ROOT, SMALL, checkpoint, command, digest, outcome, table
from tests.systems import ON_WINE, STOPS, WINDOWS, made, needs_terminals, start_to_be_stopped, stop, wait_for

DEMO = ["--channels", "8", "--max-steps", "1", "--sample-steps", "2", "--device", "cpu"]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]


def run(folder, *flags):
    done = subprocess.run(command(folder, *flags), capture_output=True, text=True, timeout=300)
    if ON_WINE:  # PyTorch complains there, not this program
        done.stderr = re.sub(r"Error in cpuinfo: .*\n", "", done.stderr)
    return done


def here(folder, *flags):
    """The same within this process, which saves the imports; the exit status."""
    return scriptc.main(command(folder, *flags)[2:])


def load(root, size=16, results=None):
    """load_images() of a folder: names, Faces, skipped."""
    results = results or root.parent
    args = types.SimpleNamespace(dataroot=root, image_size=size, results=results / "results", checkpoint=results / "c.pth")
    return scriptc.load_images(args, scriptc.list_files(args), torch.device("cpu"))


def pixels_of(faces):
    return faces.pixels[faces.rows].numpy()


def no_save(path, state):
    raise OSError(28, "No space left on device")


def refused(folder, *flags):
    """The one sentence with which a command that cannot be carried out ends, and its exit status."""
    with contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO(), "utf-8")) as error:
        try:
            status = here(folder, *flags)
        except SystemExit as stop:
            status = stop.code
    error.seek(0)
    lines = error.read().strip().splitlines()
    assert status in (1, 2) and len(lines) == status, lines  # argparse says the usage first
    return lines[-1].removeprefix("scriptc.py: ")


def build_run(*flags):
    """A Run of a small network without images."""
    args = scriptc.read_settings([*SMALL, *map(str, flags)])
    return scriptc.Run(args, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    fill_folder(tmp_path / "faces" / "some" / "depth", 40, 32)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder after two epochs of training; tests that change it use `copied`."""
    folder = tmp_path_factory.mktemp("trained")
    fill_folder(folder / "faces", 40, 32)
    done = run(folder, *SMALL, "--epochs", 2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only in training steps, `step` seconds in each and `first_step` in the first one, and one second in
    each drawing and save. `done`: what part of the run was done before each step. `start()`: the program starts anew."""
    clock = types.SimpleNamespace(now=1000.0, step=0.5, first_step=0.5, done=[])
    real_step, real_drawing, real_save = scriptc.training_step, scriptc.draw_pictures, scriptc.save_checkpoint

    def training_step(run, numbers, done):
        clock.now += clock.first_step if clock.is_first else clock.step
        clock.is_first = False
        clock.done.append(done)
        real_step(run, numbers, done)

    def draw_pictures(run, stop):
        clock.now += 1
        real_drawing(run, stop)

    def save_checkpoint(path, state):
        clock.now += 1
        real_save(path, state)

    def start(seconds=0):
        """Start the program, which takes `seconds` before it trains."""
        clock.is_first = True
        monkeypatch.setattr(scriptc, "START", clock.now)
        clock.now += seconds

    clock.start = start
    monkeypatch.setattr(scriptc, "training_step", training_step)
    monkeypatch.setattr(scriptc, "draw_pictures", draw_pictures)
    monkeypatch.setattr(scriptc, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(scriptc.time, "monotonic", lambda: clock.now)
    start()
    return clock


# A first run


def test_a_run_ends_with_a_grid_a_curve_a_table_and_a_checkpoint(trained):
    rows = table(trained)
    header = "epoch,step,images_seen,train_loss,heldout_loss,sample_distance,lr,images_per_second,seconds"
    assert ",".join(rows[0]) == header and [row["epoch"] for row in rows] == ["1", "2"]
    assert int(rows[1]["images_seen"]) == 2 * int(rows[0]["images_seen"])
    with Image.open(trained / "results" / f"epoch_2_step_{rows[1]['step']}.png") as grid:
        assert grid.size == (8 * (16 + 2) + 2,) * 2
    assert Image.open(trained / "results" / "loss.png").width > 400
    with Image.open(trained / "results" / "denoising.png") as strip:  # four samples: a row of x_t, below it one of x_0
        assert strip.size == (10 * (16 + 2) + 2, 8 * (16 + 2) + 2)
    assert Image.open(trained / "results" / "progress.webp").format == "WEBP"
    page = (trained / "results" / "run.js").read_text()
    told = json.loads(page.removeprefix("show(").removesuffix(");\n"))
    assert told["state"] == "finished" and len(told["history"]) == 2 and told["grids"][-1][0] == 2
    assert told["pictures"] == ["denoising.png", "loss.png", "progress.webp", "metrics.csv"]
    assert (trained / "results" / "index.html").exists() == (ROOT / "results" / "index.html").exists()
    saved = checkpoint(trained)
    assert {"model", "ema", "optimizer", "epoch", "step", "config"} <= saved.keys()
    assert (saved["epoch"], saved["step"]) == (2, int(rows[1]["step"])) and saved["config"]["image_size"] == 16
    assert not list(trained.rglob("*.tmp"))


def test_output_to_a_file_is_lines_without_control_characters(folder):
    done = run(folder, *SMALL, "--max-steps", 2)
    assert done.stdout.count("\n") > 5 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout + done.stderr)
    assert done.stderr == ""
    assert not re.search(r"^epoch 1: \d+ of", done.stdout, re.M)  # not before LOG_SECONDS


def test_a_log_file_gets_a_line_of_progress_now_and_then(folder, monkeypatch, capsys):
    monkeypatch.setattr(scriptc, "LOG_SECONDS", 0)
    assert here(folder, *SMALL, "--max-steps", 2) == 0
    out = capsys.readouterr().out
    assert re.search(r"^reading images at 16 px: \d+ of \d+ images$", out, re.M)
    assert re.search(r"^epoch 1: \d+ of \d+ images, loss \d\.\d+, \d+\.\d minutes left in all$", out, re.M)


def test_load_model_gives_the_averaged_network_that_was_saved(trained):
    model = scriptc.load_model(trained / "checkpoint.pth")
    assert digest(model.state_dict()) == digest(checkpoint(trained)["ema"])
    assert model(torch.randn(2, 3, 16, 16), torch.tensor([3, 900])).shape == (2, 3, 16, 16) and not model.training


def test_the_loss_falls_on_a_tiny_set(folder):
    fill_folder(folder / "faces", 120, 32)
    assert here(folder, *SMALL, "--epochs", 20, "--lr", 0.005, "--precision", "fp32") == 0
    rows = table(folder)
    assert float(rows[-1]["train_loss"]) < 0.65 * float(rows[0]["train_loss"])
    first, last = float(rows[0]["heldout_loss"]), float(rows[-1]["heldout_loss"])
    assert last < 0.65 * first and last < 0.38  # guessing zero would give 0.8


def test_every_image_is_seen_once_an_epoch_and_the_held_out_never(folder, monkeypatch):
    seen = []
    real_batch = scriptc.Faces.batch

    def batch(self, rows, flip=None):
        seen.extend(rows.tolist() if flip is not None else [])
        return real_batch(self, rows, flip)

    monkeypatch.setattr(scriptc.Faces, "batch", batch)
    assert here(folder, *SMALL, "--epochs", 2) == 0
    training = scriptc.split(load(folder / "faces")[0])[0].tolist()
    first, second = seen[: len(training)], seen[len(training):]
    assert sorted(first) == sorted(second) == sorted(training) and first != second
    assert 0 < len(training) < 40


def test_the_averaged_network_is_the_power_function_average_of_the_weights(folder, monkeypatch):
    averages, real_step = [], scriptc.training_step

    def step(run, numbers, done):
        before = averages or [weight.detach().clone() for weight in run.weights]
        real_step(run, numbers, done)
        kept = (1 - 1 / run.progress.step) ** 12
        averages[:] = [kept * average + (1 - kept) * weight.detach() for average, weight in zip(before, run.weights)]

    monkeypatch.setattr(scriptc, "training_step", step)
    assert here(folder, *SMALL, "--max-steps", 6) == 0
    found = scriptc.load_model(folder / "checkpoint.pth").parameters()
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, averages, strict=True))


def test_images_are_mirrored_left_to_right_where_the_step_says_so(folder):
    faces = load(folder / "faces")[1]
    numbers = torch.arange(3)
    plain, mirrored = faces.batch(numbers), faces.batch(numbers, torch.tensor([True, False, True]))
    assert torch.equal(mirrored[[0, 2]], plain[[0, 2]].flip(3)) and torch.equal(mirrored[1], plain[1])


def test_another_number_of_timesteps_trains_and_draws(folder):
    assert here(folder, *SMALL, "--max-steps", 2, "--timesteps", 50) == 0
    assert here(folder, "--sample", 2) == 0
    assert scriptc.load_model(folder / "checkpoint.pth").timesteps == 50


def test_minutes_are_a_budget_that_ends_with_everything_on_disk(folder, clock):
    assert here(folder, *SMALL, "--minutes", 1) == 0
    last = table(folder)[-1]
    assert 50 < clock.now - scriptc.START <= 60
    assert float(last["lr"]) < 0.02 * 8e-3  # it falls to zero along a straight line
    assert (folder / "results" / f"epoch_{last['epoch']}_step_{last['step']}.png").exists()
    assert checkpoint(folder)["step"] == int(last["step"]) and (folder / "results" / "loss.png").exists()


def test_the_demo_needs_no_images_and_keeps_everything_in_results_demo(tmp_path):
    flags = ["--demo", *DEMO, "--image-size", "16", "--results", str(tmp_path)]
    faces = set((ROOT / "fake_face").rglob("*"))
    fewer_faces = "import sys, scriptc; scriptc.DEMO_IMAGES = 200; sys.exit(scriptc.main())"
    done = subprocess.run([sys.executable, "-c", fewer_faces, *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (tmp_path / "demo" / "model_checkpoint.pth").exists() and list((tmp_path / "demo").glob("epoch_1_step_1.png"))
    assert {path.name for path in tmp_path.iterdir()} == {"demo"}
    assert {path for path in (ROOT / "fake_face").rglob("*") if "__pycache__" not in path.parts} <= faces


# Resuming


def test_a_finished_run_says_so_and_changes_nothing(trained, capsys):
    before = (trained / "checkpoint.pth").read_bytes(), (trained / "results" / "metrics.csv").read_bytes()
    assert here(trained) == 0 and "finished" in capsys.readouterr().out
    assert before == ((trained / "checkpoint.pth").read_bytes(), (trained / "results" / "metrics.csv").read_bytes())


def test_more_epochs_go_on_with_the_settings_of_the_checkpoint(copied):
    assert here(copied, "--epochs", 4, "--sample-steps", 3) == 0
    rows, saved = table(copied), checkpoint(copied)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert (saved["epoch"], saved["config"]["channels"], saved["config"]["batch_size"]) == (4, [8, 16], 16)


def start(folder, *flags, **options):
    return subprocess.Popen(command(folder, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_checkpoints(folder, process):
    """Return when `process` has saved two checkpoints."""
    wait_for(lambda: (folder / "checkpoint.previous.pth").exists() or process.poll() is not None)
    assert process.returncode is None, process.communicate()


@pytest.mark.parametrize("how", [*STOPS, "kill"])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(folder, how):
    precision = "bf16" if how == "kill" else "fp32"
    flags = [*SMALL, "--batch-size", "64", "--epochs", "40", "--precision", precision, "--save-minutes", "0.001"]
    whole = folder / "undisturbed"
    shutil.copytree(folder / "faces", whole / "faces")
    assert here(whole, *flags) == 0

    if how == "kill":
        stopped = start(folder, *flags)
        wait_for_checkpoints(folder, stopped)
        stopped.kill()
        stopped.communicate(timeout=60)
    else:
        stopped = start_to_be_stopped(command(folder, *flags))
        wait_for_checkpoints(folder, stopped)
        if how == "SIGINT":
            stopped.send_signal(signal.SIGINT)  # notebooks send it twice
        out, error = stop(stopped, how)
        assert stopped.returncode == 130 and "checkpoint saved" in out and "Traceback" not in error
    steps = checkpoint(folder)["step"]
    assert 0 < steps < checkpoint(whole)["step"]

    assert here(folder, *flags) == 0
    assert outcome(folder) == outcome(whole) and outcome(whole)["grid"]
    assert table(folder)[-1]["sample_distance"] == table(whole)[-1]["sample_distance"]


@pytest.mark.parametrize("rest", [slice(None, -5000), slice(5000, None)], ids=["its end", "its start"])
def test_a_checkpoint_without_a_part_is_set_aside_and_the_one_before_is_used(copied, capsys, rest):
    assert here(copied, "--epochs", 3, "--sample-steps", 3) == 0
    broken = (copied / "checkpoint.pth").read_bytes()[rest]
    (copied / "checkpoint.pth").write_bytes(broken)
    scriptc.load_model(copied / "checkpoint.pth")  # reads the one before and changes nothing
    assert (copied / "checkpoint.pth").read_bytes() == broken
    assert here(copied, "--epochs", 4, "--sample-steps", 3) == 0 and "is renamed to" in capsys.readouterr().out
    assert [path.read_bytes() for path in copied.glob("checkpoint.pth.broken-*")] == [broken]
    assert checkpoint(copied)["epoch"] == 4


SLOW_STEP = """
import sys, time, scriptc
def step(run, *rest):
    print("in a step", flush=True)
    time.sleep(100)
scriptc.training_step = step
sys.exit(scriptc.main(sys.argv[1:]))
"""


@pytest.mark.skipif(WINDOWS, reason="Windows sends Ctrl-C to all programs of a console")
def test_a_second_ctrl_c_ends_the_program_at_once(folder):
    stopped = subprocess.Popen([sys.executable, "-c", SLOW_STEP, *command(folder, *SMALL)[2:]], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert any("in a step" in line for line in stopped.stdout)
        stopped.send_signal(signal.SIGINT)
        assert any("Ctrl-C again stops without saving" in line for line in stopped.stderr)
        time.sleep(1.5)
        assert stopped.poll() is None
        stopped.send_signal(signal.SIGINT)
        assert stopped.wait(timeout=60) == 130
    finally:
        stopped.kill()
        stopped.communicate()


def test_a_checkpoint_that_a_killed_run_left_unfinished_is_removed(folder):
    left_over = folder / ".checkpoint.pth.12345.tmp"
    left_over.write_bytes(bytes(100))
    assert here(folder, *SMALL, "--max-steps", 1) == 0 and not left_over.exists()


def test_a_second_run_on_the_same_checkpoint_is_refused(folder):
    first = start(folder, *SMALL, "--epochs", 1000)
    try:
        assert "images" in first.stdout.readline()
        assert "another run" in refused(folder, *SMALL, "--epochs", 1000)
    finally:
        first.kill()
        first.communicate()
    assert here(folder, *SMALL, "--max-steps", 1) == 0  # a killed run leaves no lock behind


def test_a_disk_that_is_full_for_a_while_causes_only_a_warning(folder, monkeypatch, capsys):
    real_save, failures = scriptc.save_checkpoint, iter([OSError(28, "No space left on device")] * 3)

    def save(path, state):
        for failure in failures:
            raise failure
        real_save(path, state)

    monkeypatch.setattr(scriptc, "save_checkpoint", save)
    monkeypatch.setattr(scriptc, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(scriptc, "LAST_TRIES", (0, 0))
    assert here(folder, *SMALL, "--epochs", 30, "--save-minutes", 0.001) == 0
    assert capsys.readouterr().out.count("could not be saved ([Errno 28] No space left") == 3
    assert checkpoint(folder)["epoch"] == 30


def test_pictures_that_cannot_be_written_cost_no_other_file(folder, capsys):
    for name in ("loss.png", "epoch_1_step_1.png"):  # cannot be replaced, as files that are open on Windows
        (folder / "results" / name).mkdir(parents=True)
    assert here(folder, *SMALL, "--max-steps", 1) == 0
    warnings = re.findall(r"warning: .*(loss|epoch_1_step_1)\.png could not be written", capsys.readouterr().out)
    assert sorted(warnings) == ["epoch_1_step_1", "loss"]
    for name in ("denoising.png", "metrics.csv", "run.js"):
        assert (folder / "results" / name).is_file()


def test_a_file_that_another_program_has_open_for_a_moment_is_replaced(tmp_path, monkeypatch):
    real_replace, failures = os.replace, iter([PermissionError(13, "Access is denied")] * 2)

    def replace(*paths):
        for failure in failures:
            raise failure
        real_replace(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with scriptc.replacing(tmp_path / "new") as file:
        file.write(b"whole")
    assert (tmp_path / "new").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_that_cannot_be_saved_at_the_end_keeps_the_one_before(copied, monkeypatch, capsys):
    monkeypatch.setattr(scriptc, "save_checkpoint", no_save)
    monkeypatch.setattr(scriptc, "LAST_TRIES", (0, 0))
    assert here(copied, "--epochs", 3, "--sample-steps", 3) == 1
    assert "make room" in capsys.readouterr().err and checkpoint(copied)["epoch"] == 2


def test_weights_that_are_not_finite_are_never_saved(trained, tmp_path):
    state = checkpoint(trained)
    next(iter(state["ema"].values())).view(-1)[0] = float("nan")
    with pytest.raises(scriptc.UserError, match="--lr"):
        scriptc.save_checkpoint(tmp_path / "checkpoint.pth", state)
    assert not list(tmp_path.iterdir())


def test_the_run_ends_when_a_save_finds_weights_that_are_not_finite(folder, monkeypatch, capsys):
    def save(path, state):
        raise scriptc.UserError("the weights are not finite any more")

    monkeypatch.setattr(scriptc, "save_checkpoint", save)
    assert here(folder, *SMALL, "--epochs", 10**6, "--save-minutes", 0.001) == 1
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize("most", [1, 20])  # 20 steps are several epochs here
def test_steps_without_a_finite_loss_change_nothing_and_end_the_run(folder, monkeypatch, capsys, most):
    real_batch = scriptc.Faces.batch
    assert here(folder, *SMALL, "--max-steps", 4) == 0
    good = checkpoint(folder)
    monkeypatch.setattr(scriptc.Faces, "batch", lambda self, rows, flip=None: real_batch(self, rows, flip) * (
        math.nan if flip is not None else 1))
    monkeypatch.setattr(scriptc, "BAD_STEPS", most)
    monkeypatch.setattr(scriptc, "LOOK_SECONDS", 0)
    assert here(folder, "--max-steps", 4000, "--lr", 1) == 1
    assert f"{most} steps in a row had no finite gradient" in capsys.readouterr().err
    after = checkpoint(folder)
    assert after["step"] == 5 and digest(good["model"]) == digest(after["model"])
    for name in ("muon", "adam"):
        assert digest(good["optimizer"][name]["state"]) == digest(after["optimizer"][name]["state"])


def test_fewer_epochs_than_are_done_leave_the_run_as_it_is(folder, capsys):
    assert here(folder, *SMALL, "--max-steps", 7) == 0  # in epoch 3
    before = (folder / "checkpoint.pth").read_bytes()
    assert here(folder, "--epochs", 2, "--batch-size", 4) == 0
    assert "finished" in capsys.readouterr().out and (folder / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("part, expected", [(0, 0.1), (0.005, 0.6), (0.01, 0.99), (0.5, 0.5), (0.99, 0.01), (1, 0)])
def test_the_learning_rate_rises_for_a_hundredth_of_the_run_then_falls_to_zero(part, expected):
    assert scriptc.learning_rate(1, part) == pytest.approx(expected, rel=0.01)


def test_the_learning_rate_warms_up_under_minutes_however_long_the_start_takes(folder, clock):
    clock.start(seconds=20)
    assert here(folder, *SMALL, "--minutes", 1) == 0
    assert clock.done[0] == 0 and clock.done[-1] > 0.9


def test_a_slow_first_step_after_a_restart_does_not_end_a_run_with_minutes(folder, clock, monkeypatch):
    real_training = scriptc.training_step

    def interrupted(run, numbers, done):
        real_training(run, numbers, done)
        if run.progress.step == 80:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(scriptc, "training_step", interrupted)
        assert here(folder, *SMALL, "--minutes", 1) == 130 and checkpoint(folder)["step"] == 80
    clock.first_step = 5
    clock.start()
    assert here(folder, *SMALL) == 0
    assert clock.done[-1] > 0.9 and checkpoint(folder)["step"] > 85 and checkpoint(folder)["seconds"] < 60


def test_a_first_step_longer_than_half_of_the_minutes_does_not_end_the_run(folder, clock):
    clock.first_step = 20  # it compiles for 20 of 30 seconds
    assert here(folder, *SMALL, "--minutes", 0.5) == 0
    assert len(clock.done) > 5


def test_a_loss_that_is_not_finite_at_the_end_is_said_in_a_sentence(folder, capsys, monkeypatch):
    monkeypatch.setattr(scriptc, "compared_loss", lambda run, numbers: math.nan)
    assert here(folder, *SMALL, "--max-steps", 3) == 1
    assert "not finite" in capsys.readouterr().err


def test_an_epoch_sees_every_image_once_although_the_folder_grew_in_the_middle_of_it(folder, monkeypatch):
    assert here(folder, *SMALL, "--max-steps", 2) == 0
    fill_folder(folder / "faces" / "new", 30, 32)
    seen, real_batch = [], scriptc.Faces.batch

    def batch(self, rows, flip=None):
        seen.extend(rows.tolist() if flip is not None else [])
        return real_batch(self, rows, flip)

    monkeypatch.setattr(scriptc.Faces, "batch", batch)
    assert here(folder, "--epochs", 1) == 0
    training = scriptc.split(load(folder / "faces")[0])[0]
    assert sorted(seen) == training.tolist() and len(seen) > 55


def test_short_epochs_do_not_make_checkpoints_more_frequent_than_save_minutes(folder, monkeypatch):
    saves, real_save = [], scriptc.save_checkpoint
    monkeypatch.setattr(scriptc, "save_checkpoint", lambda *arguments: saves.append(1) or real_save(*arguments))
    assert here(folder, *SMALL, "--epochs", 20) == 0
    assert len(saves) == 2  # after the first step, which shows that it can be saved, and at the end


def test_advice_under_demo_can_be_followed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scriptc, "DEMO_IMAGES", 20)
    demo = ["--demo", "--device", "cpu", "--results", str(tmp_path)]
    assert scriptc.main([*demo, *DEMO, "--image-size", "16"]) == 0
    capsys.readouterr()
    assert scriptc.main(demo) == 0 and scriptc.main([*demo, "--image-size", "32"]) == 1
    for advice in capsys.readouterr():
        assert "--results NEW_FOLDER" in advice and "--checkpoint" not in advice


def test_a_run_can_be_resumed_in_another_precision(copied):
    for epochs, precision in ((3, "fp16"), (4, "bf16"), (5, "fp16"), (6, "fp32")):
        assert here(copied, "--epochs", epochs, "--precision", precision) == 0
        saved = checkpoint(copied)
        assert (saved["epoch"], saved["config"]["precision"]) == (epochs, precision)


# Second starts that must not mislead


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_neither_renamed_nor_left_out(copied, monkeypatch, capsys):
    assert here(copied, "--epochs", 3) == 0
    before = {path.name: path.read_bytes() for path in copied.glob("checkpoint*")}

    def fail(path, *rest, **options):
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZipFile", fail)
        assert here(copied, "--epochs", 4) == 1
    assert "Input/output error" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in copied.glob("checkpoint*")} == before


def test_every_resume_says_which_file_at_which_epoch_and_step(copied, capsys):
    assert here(copied, "--epochs", 3, "--sample-steps", 3) == 0
    assert f"resumed     {copied / 'checkpoint.pth'}, epoch 3, after step" in capsys.readouterr().out
    (copied / "checkpoint.pth").unlink()
    assert here(copied, "--epochs", 4, "--sample-steps", 3) == 0
    assert f"resumed     {copied / 'checkpoint.previous.pth'}, epoch" in capsys.readouterr().out


def test_to_start_over_all_files_that_must_go_are_named(copied):
    sentence = refused(copied, "--image-size", 32)
    assert "move away" in sentence and "checkpoint.pth and " in sentence and "checkpoint.previous.pth" in sentence
    (copied / "checkpoint.pth").unlink()
    sentence = refused(copied, "--image-size", 32)
    assert sentence.startswith(str(copied / "checkpoint.previous.pth")) and "checkpoint.pth and" not in sentence


def test_a_new_run_in_the_results_of_an_old_one_does_not_show_the_old_grids(folder):
    assert here(folder, *SMALL, "--epochs", 3) == 0
    before = {path.name for path in (folder / "results").glob("epoch*.png")}
    flags = [*SMALL, "--batch-size", 8, "--epochs", 1, "--checkpoint", folder / "new.pth"]
    for path in before:  # the old run has a grid for each moment of the new one
        shutil.copy(folder / "results" / path, folder / "results" / "epoch_1_step_2.png")
    assert here(folder, *flags) == 0
    told = json.loads((folder / "results" / "run.js").read_text().removeprefix("show(").removesuffix(");\n"))
    assert [name for *_, name in told["grids"]] == [f"epoch_1_step_{checkpoint(folder, 'new.pth')['step']}.png"]


def test_duplicates_among_the_images_do_not_spoil_the_usual_distance(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    twice = np.concatenate((pixels, pixels))
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), np.uint8))
    faces = scriptc.Faces(twice, range(80), torch.device("cpu"))
    ratios = scriptc.save_nearest(images.permute(0, 3, 1, 2) / 127.5 - 1, faces, tmp_path / "nearest.png")
    assert ratios.tolist() == pytest.approx([1] * 4, abs=0.2)


def test_output_that_cannot_encode_a_path_does_not_end_the_run(folder):
    results = made(folder / "Bilder f\u00fcr sp\u00e4ter \u4eba")
    done = subprocess.run(command(folder, *SMALL, "--max-steps", 1, "--results", results), capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and b"Traceback" not in done.stderr and rb"f\xfcr sp\xe4ter" in done.stdout
    assert list(results.glob("epoch_1_step_1.png"))


def test_it_runs_where_the_output_is_a_window_of_an_editor(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # without reconfigure(), as in IDLE
    assert here(folder, *SMALL, "--max-steps", 1) == 0


def test_epochs_of_one_step_do_not_write_the_whole_table_each_time(folder, monkeypatch):
    written, real_result = [], scriptc.result
    monkeypatch.setattr(scriptc, "result", lambda path: written.append(path.name) or real_result(path))
    monkeypatch.setattr(scriptc, "LINE_SECONDS", 1000)
    assert here(folder, *SMALL, "--batch-size", 64, "--epochs", 40) == 0
    assert written.count("metrics.csv") == 2 and len(table(folder)) == 40


def test_a_run_that_diverged_in_its_last_moments_does_not_say_done(folder, monkeypatch, capsys):
    real_batch = scriptc.Faces.batch
    monkeypatch.setattr(scriptc.Faces, "batch", lambda self, rows, flip=None: real_batch(self, rows, flip) * (
        math.nan if flip is not None else 1))
    monkeypatch.setattr(scriptc, "BAD_STEPS", 2)
    monkeypatch.setattr(scriptc, "LOOK_SECONDS", 1000)
    assert here(folder, *SMALL, "--max-steps", 5) == 1
    assert "2 steps in a row had no finite gradient" in capsys.readouterr().err


@pytest.mark.skipif(WINDOWS, reason="Windows has no pipes that end so")
def test_a_run_whose_output_nobody_reads_any_more_goes_on(folder):
    reading, writing = os.pipe()
    run = subprocess.Popen(command(folder, *SMALL, "--epochs", 30), stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)  # as head does
    _, error = run.communicate(timeout=120)
    assert (run.returncode, error) == (0, b"") and checkpoint(folder)["epoch"] == 30


@needs_terminals
def test_a_closed_terminal_ends_the_run_with_a_checkpoint_and_nohup_keeps_it(folder):
    import pty

    leader, follower = pty.openpty()
    code = ("import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "os.execv(sys.argv[1], sys.argv[1:])")
    flags = command(folder, *SMALL, "--epochs", 10**6, "--save-minutes", 1000)
    run = subprocess.Popen([sys.executable, "-c", code, *flags], stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    while not (folder / "checkpoint.pth").exists():  # after the first step
        os.read(leader, 1000)
    first = checkpoint(folder)["step"]
    time.sleep(1)
    os.close(leader)
    assert run.wait(timeout=60) == 130 and checkpoint(folder)["step"] > first
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    kept = start(folder, *SMALL, "--max-steps", checkpoint(folder)["step"] + 200, **ignoring)
    kept.stdout.readline()
    kept.send_signal(signal.SIGHUP)
    kept.communicate(timeout=120)
    assert kept.returncode == 0


def plant(folder, trained, change):
    """A checkpoint in `folder` with one thing changed by the function `change`."""
    state = checkpoint(trained)
    change(state)
    torch.save(state, folder / "checkpoint.pth")


PLANTED = {
    "only a version": lambda state: [state.pop(name) for name in [*state] if name != "version"],
    "a channel too wide": lambda state: state["config"].update(channels=[10**9]),
    "an image too large": lambda state: state["config"].update(image_size=10**6),
    "too many timesteps": lambda state: state["config"].update(timesteps=10**9),
    "channels of other weights": lambda state: state["config"].update(channels=[4096] * 4),
    "a setting of another kind": lambda state: state["config"].update(lr="fast"),
    "a flag as a setting": lambda state: state["config"].update(lr="--demo"),
    "the flag that ends a command": lambda state: state["config"].update(lr="--help"),
    "a flag as a channel": lambda state: state["config"].update(channels=["--help"]),
    "a number as text": lambda state: state["config"].update(lr="0.008"),
    "two numbers for one": lambda state: state["config"].update(epochs=[1, 2]),
    "no setting": lambda state: state["config"].pop("seed"),
    "an epoch that is a word": lambda state: state.update(epoch="two"),
    "rows of another length": lambda state: state.update(history=[[1, 2]]),
    "a history as long as memory": lambda state: state.update(history=[[k] * 9 for k in range(10**6)]),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_checkpoint_is_refused_in_a_sentence(folder, trained, planted):
    plant(folder, trained, PLANTED[planted])
    assert "not a checkpoint" in refused(folder, "--epochs", 9)


@pytest.mark.parametrize("missing", ["adam", "muon"])
def test_a_checkpoint_without_an_optimizer_is_refused_in_a_sentence(folder, trained, missing):
    plant(folder, trained, lambda state: state["optimizer"].pop(missing))
    assert "do not fit together" in refused(folder, "--epochs", 9)


def test_a_damaged_page_does_not_end_sampling(copied):
    (copied / "results" / "run.js").write_text("show({")
    assert here(copied, "--sample", 2, "--sample-steps", 2) == 0


def test_nothing_is_called_good_that_was_never_saved(folder, tmp_path, monkeypatch, capsys, trained):
    state = checkpoint(trained)
    next(iter(state["ema"].values())).view(-1)[0] = float("nan")
    with pytest.raises(scriptc.UserError, match="run the command again with a lower --lr"):
        scriptc.save_checkpoint(tmp_path / "none.pth", state)
    monkeypatch.setattr(scriptc, "save_checkpoint", no_save)
    monkeypatch.setattr(scriptc, "LAST_TRIES", (0, 0))
    assert here(folder, *SMALL, "--max-steps", 1) == 1
    assert "there is none yet" in capsys.readouterr().err


def test_demo_and_sample_without_a_run_give_advice_that_can_be_followed(tmp_path, capsys):
    assert scriptc.main(["--demo", "--sample", "4", "--results", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "train first" in error and "--checkpoint" not in error


def test_the_page_is_told_when_pictures_are_drawn(folder, monkeypatch):
    states, real_page = [], scriptc.write_page
    monkeypatch.setattr(scriptc, "write_page", lambda *arguments: states.append(arguments[-1]) or real_page(*arguments))
    assert here(folder, *SMALL, "--max-steps", 1) == 0
    assert states[-2:] == ["drawing", "finished"]


def test_the_demo_draws_new_faces_for_another_size(tmp_path, monkeypatch):
    monkeypatch.setattr(scriptc, "DEMO_IMAGES", 20)
    flags = ["--demo", *DEMO, "--results", str(tmp_path)]
    for size in ("16", "32"):
        (tmp_path / "demo" / "model_checkpoint.pth").unlink(missing_ok=True)
        (tmp_path / "demo" / "model_checkpoint.previous.pth").unlink(missing_ok=True)
        assert scriptc.main([*flags, "--image-size", size]) == 0
        with Image.open(next((tmp_path / "demo" / f"faces_{size}px").glob("*.png"))) as face:
            assert face.size == (int(size), int(size))


def test_a_clock_that_has_not_ticked_divides_nothing_by_zero(folder, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(scriptc.time, "monotonic", lambda: now)
    assert here(folder, *SMALL, "--max-steps", 2) == 0


def test_a_clock_that_is_set_does_not_change_a_run_with_minutes(folder, clock, monkeypatch):
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(scriptc.time, "time", lambda: next(hours))
    assert here(folder, *SMALL, "--minutes", 0.5) == 0
    assert checkpoint(folder)["step"] > 40


def test_moments_in_another_layout_are_brought_into_that_of_the_weights(trained):
    saved = scriptc.read_checkpoint(trained / "checkpoint.pth")
    layouts = {torch.channels_last, torch.contiguous_format}
    other, = layouts - {scriptc.memory_format(torch.device("cpu"))}  # as another device saves them
    moments = saved["optimizer"]["adam"]["state"].values()
    for moment in moments:
        for name in ("exp_avg", "exp_avg_sq"):
            moment[name] = moment[name].contiguous(memory_format=other if moment[name].ndim == 4 else torch.contiguous_format)
    run = build_run()
    run.restore(copy.deepcopy(saved))
    for (weight, restored), moment in zip(run.optimizers["adam"].state.items(), moments, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            assert restored[name].stride() == weight.stride() and torch.equal(restored[name], moment[name])


def test_several_processes_on_a_mac_use_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert scriptc.choose_device(None).type == "mps"
    monkeypatch.setattr(scriptc, "PROCESSES", 2)
    assert scriptc.choose_device(None).type == "cpu"


def test_a_failure_of_cudnn_that_is_not_lack_of_memory_is_still_named():
    error = RuntimeError("Unable to find an engine to execute this computation: bad driver")
    with pytest.raises(scriptc.UserError, match="bad driver"):
        scriptc.halve_or_raise(1, error)


def test_an_nvidia_gpu_that_this_pytorch_cannot_use_is_named_in_the_device_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # such as a driver that is too old
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert here(folder, *SMALL, "--max-steps", 1) == 0
    assert re.search(r"^device +cpu.*cannot use the NVIDIA GPU", capsys.readouterr().out, re.M)


def test_where_torch_compile_fails_a_sentence_says_so(folder, monkeypatch):
    monkeypatch.setenv("CXX", "no_such_compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "compiled"))
    done = run(folder, *SMALL, "--max-steps", 1, "--compile")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "torch.compile fails here" in done.stderr and "leave out --compile" in done.stderr


# Micro-batches and processes


def test_a_step_in_micro_batches_learns_the_same(folder, monkeypatch):
    flags = [*SMALL, "--max-steps", 6, "--precision", "fp32"]
    assert here(folder, *flags) == 0
    monkeypatch.setattr(scriptc, "CORE_PIXELS", 3 * 16**2 // torch.get_num_threads())
    parts = folder / "parts.pth"
    assert here(folder, *flags, "--checkpoint", parts) == 0
    for one, other in zip(checkpoint(folder)["history"], torch.load(parts, weights_only=True)["history"], strict=True):
        assert one[:3] == other[:3] and one[3:6] == pytest.approx(other[3:6], rel=1e-3)


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
                 RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                 RuntimeError("Unable to find an engine to execute this computation"),
                 RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_every_way_to_say_that_memory_ran_out_is_understood(error):
    assert scriptc.halve_or_raise(9, error) == 5
    with pytest.raises(RuntimeError, match="shapes"):
        scriptc.halve_or_raise(9, RuntimeError("shapes do not match"))


def test_when_memory_runs_out_a_step_and_a_drawing_are_repeated_with_half_the_images(folder, monkeypatch):
    flags, real_forward = [*SMALL, "--max-steps", 3, "--precision", "fp32"], scriptc.SimpleUnet.forward
    assert here(folder, *flags) == 0
    expected, grid = checkpoint(folder)["history"], next((folder / "results").glob("epoch*.png")).read_bytes()

    def forward(self, x, t):
        if len(x) > 5:
            raise OUT_OF_MEMORY[0]
        return real_forward(self, x, t)

    monkeypatch.setattr(scriptc.SimpleUnet, "forward", forward)
    parts = folder / "parts.pth"
    assert here(folder, *flags, "--checkpoint", parts, "--results", folder / "parts") == 0
    for one, other in zip(expected, torch.load(parts, weights_only=True)["history"], strict=True):
        assert one[:3] == other[:3] and one[3:6] == pytest.approx(other[3:6], rel=1e-3)
    assert len(grid) == pytest.approx(len(next((folder / "parts").glob("epoch*.png")).read_bytes()), rel=0.02)
    assert here(folder, "--checkpoint", parts, "--sample", 9, "--sample-steps", 2) == 0
    assert len(list((folder / "results" / "samples").iterdir())) == 9


def test_with_several_processes_a_drawing_too_is_repeated_with_half_the_images(monkeypatch):
    def sample(model, count, noise=None, **settings):
        if count > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(count, 3, 16, 16)

    monkeypatch.setattr(scriptc, "PROCESSES", 2)
    monkeypatch.setattr(scriptc, "sample", sample)
    model = types.SimpleNamespace(image_size=16, parameters=lambda: iter([torch.zeros(1)]))
    assert torch.stack([*scriptc.draw(model, 12)]).shape == (12, 3, 16, 16)


def test_too_little_memory_for_one_image_ends_with_a_clear_message(folder, monkeypatch, capsys):
    def forward(self, x, t):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(scriptc.SimpleUnet, "forward", forward)
    assert here(folder, *SMALL, "--max-steps", 3) == 1
    assert "--image-size" in capsys.readouterr().err


def test_too_little_memory_for_the_network_ends_with_a_clear_message(trained, monkeypatch, capsys):
    def build_network(*_):
        raise OUT_OF_MEMORY[0]

    monkeypatch.setattr(scriptc, "build_network", build_network)
    assert here(trained, "--sample", 2) == 1
    assert "not enough memory (CUDA out of memory.): end other programs" in capsys.readouterr().err


def test_on_a_cpu_no_more_images_are_computed_together_than_its_caches_hold():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert scriptc.images_at_once(64, 256, cpu) == max(1, min(64, torch.get_num_threads()))
    assert scriptc.images_at_once(64, 2048, cpu) == 1 and scriptc.images_at_once(3, 16, cpu) == 3
    assert scriptc.images_at_once(64, 2048, cuda) == 64


several_processes = pytest.mark.skipif(WINDOWS, reason="PyTorch for Windows is built without what torchrun needs (libuv)")


def run_in_two_processes(code, folder, *flags):
    """The end of the Python program `code`, run by torchrun with the arguments of a training in `folder`."""
    script = folder / "program.py"
    script.write_text(code)
    return subprocess.run([*TWO_PROCESSES, script, *command(folder, *flags)[2:]], capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})


@several_processes
def test_two_processes_learn_what_one_does(folder):
    flags = [*SMALL, "--max-steps", 20, "--precision", "fp32"]
    alone, both = folder / "alone", folder / "both"
    for place, launcher in ((alone, []), (both, TWO_PROCESSES)):
        flags_there = [*flags, "--results", place / "results", "--checkpoint", place / "checkpoint.pth"]
        done = subprocess.run(launcher + command(folder, *flags_there)[bool(launcher):], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert [row["images_seen"] for row in table(alone)] == [row["images_seen"] for row in table(both)]
    for one, other in zip(table(alone), table(both)):
        assert float(one["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-3)
        assert float(one["heldout_loss"]) == pytest.approx(float(other["heldout_loss"]), rel=1e-3)

    flags = ["--sample", "70", "--sample-steps", "2", "--results", both / "results", "--checkpoint", both / "checkpoint.pth"]
    done = subprocess.run(TWO_PROCESSES + command(folder, *flags)[1:], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = [np.asarray(Image.open(path)).astype(int) for path in sorted((both / "results" / "samples").iterdir())]
    alone = scriptc.sample(scriptc.load_model(both / "checkpoint.pth"), 1, 2, seed=1, first=69)
    assert len(drawn) == 70 and np.abs(drawn[69] - np.asarray(scriptc.to_image(alone[0]))).max() <= 1


@several_processes
def test_a_process_without_an_image_of_a_small_batch_takes_part(folder):
    flags = [*SMALL, "--batch-size", 1, "--max-steps", 3]
    done = subprocess.run([*TWO_PROCESSES, *command(folder, *flags)[1:]], capture_output=True, text=True)
    assert done.returncode == 0 and [row["step"] for row in table(folder)] == ["3"], done.stderr


DRIFT = """
import os, pathlib, sys, torch, scriptc
scriptc.join_processes()
def run_with(layout):
    scriptc.memory_format = lambda device: layout
    args = scriptc.read_settings(["--image-size", "16", "--channels", "8", "--batch-size", "8"])
    return scriptc.Run(args, torch.device("cpu"))
run = run_with(torch.contiguous_format)
scriptc.keep_weights_equal(run)
scriptc.say("drifting now")
if scriptc.RANK:  # another kind of device, with another layout
    run = run_with(torch.channels_last)
with torch.no_grad():
    run.weights[0].add_(scriptc.RANK)
scriptc.keep_weights_equal(run)
sums = [(weight.double() * torch.arange(weight.numel()).view(weight.shape)).sum().item()
        for weight in (*run.weights, *run.averages)]
pathlib.Path(__file__).with_name(f"sums_{scriptc.RANK}").write_text(repr(sums))
sys.stdout.flush()
os._exit(0)  # as main() does: at a normal exit, a thread of the process group may abort the process
"""


@several_processes
def test_weights_that_drift_apart_between_processes_become_those_of_the_first_with_a_warning(tmp_path):
    done = run_in_two_processes(DRIFT, tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("drifting now")
    assert "differ" not in before and after.count("the weights of the processes differ") == 1
    assert (tmp_path / "sums_0").read_text() == (tmp_path / "sums_1").read_text()


FAILING = """
import sys, scriptc
real = scriptc.training_step
def step(run, *rest):
    if scriptc.RANK == 1 and run.progress.step == 2:
        raise scriptc.UserError("this process has had enough")
    real(run, *rest)
scriptc.training_step = step
sys.exit(scriptc.main(sys.argv[1:]))
"""


ARRIVING = """
import sys, scriptc
real = scriptc.list_files
def list_files(args):  # when the first process looks, ten images have not arrived yet
    files = real(args)
    return dict([*files.items()][10:]) if scriptc.RANK == 0 else files
scriptc.list_files = list_files
sys.exit(scriptc.main(sys.argv[1:]))
"""


@several_processes
def test_images_that_arrive_while_several_processes_start_are_left_to_the_next_start(folder):
    done = run_in_two_processes(ARRIVING, folder, *SMALL, "--max-steps", 2)
    assert done.returncode == 0 and "30 below" in done.stdout, done.stderr


@several_processes
def test_an_error_in_one_process_ends_all_at_once(folder):
    done = run_in_two_processes(FAILING, folder, *SMALL, "--epochs", 1000)
    assert done.returncode != 0 and "scriptc.py: this process has had enough" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not list the processes that a process has started")
def test_a_killed_process_is_started_again_and_the_run_finishes(folder):
    flags = [*SMALL, "--epochs", 60, "--save-minutes", "0.001"]
    group = subprocess.Popen([*TWO_PROCESSES, "--max-restarts=3", *command(folder, *flags)[1:]], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    wait_for(lambda: (folder / "checkpoint.previous.pth").exists() or group.poll() is not None)
    children = pathlib.Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, error = group.communicate(timeout=300)
    assert group.returncode == 0 and b"resumed" in output, error
    assert [int(row["epoch"]) for row in table(folder)] == list(range(1, 61))


@several_processes
def test_ctrl_c_ends_several_processes_with_a_checkpoint(folder):
    flags = [*SMALL, "--epochs", 10**6, "--save-minutes", 100]
    group = subprocess.Popen([*TWO_PROCESSES, *command(folder, *flags)[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, start_new_session=True)
    try:
        wait_for(lambda: len(table(folder)) >= 2 or group.poll() is not None)
    finally:
        os.killpg(group.pid, signal.SIGINT)  # as a terminal does
    output, error = group.communicate(timeout=120)
    stopped = re.search(r"Stopped after (\d+) steps, checkpoint saved", output)
    assert stopped and checkpoint(folder)["step"] == int(stopped[1]) > 1, error


UNLIKE_GPUS = """
import sys, scriptc
scriptc.choose_precision = lambda name, device: ("bf16", "fp16")[scriptc.RANK]
sys.exit(scriptc.main(sys.argv[1:]))
"""


@several_processes
def test_processes_that_compute_in_unlike_precisions_end_with_a_clear_message(folder):
    done = run_in_two_processes(UNLIKE_GPUS, folder, *SMALL, "--max-steps", 2)
    assert done.returncode != 0 and "GPUs of different kinds need --precision" in done.stderr


EACH_ITS_OWN = """
import pathlib, sys, scriptc
own = pathlib.Path(__file__).with_name(f"{scriptc.RANK}.pth")
sys.exit(scriptc.main([*sys.argv[1:], "--checkpoint", str(own)]))
"""


@several_processes
def test_processes_that_do_not_see_the_same_checkpoint_end_with_a_clear_message(copied):
    shutil.copy(copied / "checkpoint.pth", copied / "0.pth")
    done = run_in_two_processes(EACH_ITS_OWN, copied, *SMALL, "--epochs", 9)
    assert done.returncode != 0
    assert "process 1 has another checkpoint, other images or another precision than process 0" in done.stderr


# Drawing


def test_sample_into_a_new_folder_makes_no_page_of_a_run_that_is_not_there(trained, tmp_path):
    assert here(trained, "--sample", 2, "--sample-steps", 2, "--results", tmp_path / "new") == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"samples", "samples.png", "nearest.png", "morph.webp"}


def test_sample_needs_no_images(trained, tmp_path, capsys):
    assert here(trained, "--sample", 2, "--results", tmp_path / "new", "--dataroot", tmp_path / "none") == 0
    assert "no nearest.png: " in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "new").glob("[!.]*")} == {"samples", "samples.png", "morph.webp"}


def test_sample_draws_other_faces_than_the_grids_of_training(copied):
    last = max((copied / "results").glob("epoch*.png"), key=lambda path: int(path.stem.split("_")[1]))
    assert here(copied, "--sample", 64) == 0
    grid, samples = (np.asarray(Image.open(path)).astype(int) for path in (last, copied / "results" / "samples.png"))
    cells = [picture[2:, 2:].reshape(8, 18, 8, 18, 3).swapaxes(1, 2).reshape(64, -1) for picture in (grid, samples)]
    assert np.abs(cells[0][:, None] - cells[1][None]).mean(2).min() > 2


def test_sample_draws_single_images_and_a_grid_that_repeat(copied):
    samples = copied / "results" / "samples"
    pictures = []
    for flags in ([5], [3], [3, "--seed", 1]):
        assert here(copied, "--sample-steps", 3, "--sample", *flags) == 0
        pictures.append([np.asarray(Image.open(path)) for path in sorted(samples.glob("*.png"))])
        with Image.open(copied / "results" / "samples.png") as grid:
            assert grid.size == (flags[0] * 18 + 2, 20)
    assert [len(drawn) for drawn in pictures] == [5, 3, 3] and pictures[0][0].shape == (16, 16, 3)
    assert all(np.abs(one.astype(int) - other).max() <= 1 for one, other in zip(pictures[0], pictures[1]))
    assert (pictures[1][0] != pictures[2][0]).any()
    assert Image.open(copied / "results" / "nearest.png").width == 960


def test_the_nearest_training_image_is_found_also_mirrored():
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 16, 16, 3), np.uint8)
    images = torch.from_numpy(pixels[[3, 1400]]).permute(0, 3, 1, 2) / 127.5 - 1
    images[1] = images[1].flip(2)
    faces = scriptc.Faces(pixels, range(1500), torch.device("cpu"))
    least, closest = scriptc.distances(images, faces).min(dim=1)
    assert closest.tolist() == [3, 1400] and least.max() < 0.1


def test_a_drawing_has_distance_0_to_a_copy_and_1_to_what_is_as_far_as_training_images_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), np.uint8)
    new = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), np.uint8))
    images = torch.cat((torch.from_numpy(pixels[:5]), new)).permute(0, 3, 1, 2) / 127.5 - 1
    faces = scriptc.Faces(pixels, range(300), torch.device("cpu"))
    ratios = scriptc.save_nearest(images, faces, tmp_path / "nearest.png")
    assert ratios[:5].max() < 0.01 and ratios[5:].tolist() == pytest.approx([1] * 4, abs=0.1)
    assert Image.open(tmp_path / "nearest.png").width == 960


# The folder of images


def test_all_kinds_of_image_files_are_read_as_they_look(tmp_path):
    face = draw_face(1, 64)
    gray, small = face.convert("L"), np.asarray(face.resize((16, 16), Image.Resampling.LANCZOS)).astype(int)
    turned, exif = face.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise before it is shown
    deep = Image.fromarray((np.asarray(gray).astype(np.uint16) << 8) + 128)
    face.save(tmp_path / "plain.jpg", quality=95)
    face.save(tmp_path / "progressive.jpeg", quality=95, progressive=True)
    turned.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    face.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    gray.save(tmp_path / "gray.jpg", quality=95)
    deep.save(tmp_path / "deep.png")
    face.quantize(256).save(tmp_path / "palette.png")
    for suffix in ("png", "webp", "bmp", "gif", "PNG"):
        face.save(tmp_path / f"format.{suffix}")
    face.save(tmp_path / "a_png_called.jpg", "PNG")
    for path in tmp_path.iterdir():
        pixels = scriptc.decode(str(path), 16)
        assert not isinstance(pixels, str) and pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8, path.name
        expected = small if path.stem not in ("gray", "deep") else np.asarray(gray.resize((16, 16)).convert("RGB"))
        assert np.abs(pixels.astype(int) - expected).mean() < 6, path.name


def test_transparency_is_laid_over_white(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (scriptc.decode(str(tmp_path / "clear.png"), 16) == 255).all()
    half = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    half.paste((0, 0, 0, 128), (0, 0, 16, 32))
    half.save(tmp_path / "half.png")
    half.convert("LA").save(tmp_path / "gray.png")
    pixels, gray = (scriptc.decode(str(tmp_path / name), 16).astype(int) for name in ("half.png", "gray.png"))
    assert np.abs(pixels[:, :6] - 127).max() < 3 and np.abs(pixels[:, 10:] - [255, 0, 0]).max() < 3
    assert np.abs(gray[:, :6] - 127).max() < 3 and np.abs(gray[:, 10:] - 76).max() < 3


def test_sixteen_bits_a_channel_are_read_as_eight(tmp_path):
    gray = draw_face(1, 16).convert("L")
    deep = np.asarray(gray).astype(np.uint16) << 8
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert (scriptc.decode(str(tmp_path / "deep.png"), 16) == np.asarray(gray)[..., None]).all()


def test_the_middle_of_a_wide_image_is_kept(tmp_path):
    picture = Image.new("RGB", (96, 32), "black")
    picture.paste("white", (26, 0, 70, 32))
    picture.save(tmp_path / "wide.png")
    assert (scriptc.decode(str(tmp_path / "wide.png"), 16) > 250).all()


def test_files_that_are_not_images_are_skipped_counted_and_listed(folder, capsys):
    faces = folder / "faces"
    (faces / "empty.jpg").touch()
    (faces / "page.jpg").write_text("<html>busy</html>")
    (faces / "cut.jpg").write_bytes(b"")
    draw_face(0, 256).save(faces / "cut.jpg", quality=95)
    os.truncate(faces / "cut.jpg", 3000)
    Image.new("CMYK", (32, 32)).save(faces / "other.tiff")
    if not WINDOWS:
        (faces / "nowhere.png").symlink_to(faces / "gone.png")
    (faces / "notes.txt").write_text("not meant as an image")
    (faces / ".hidden.jpg").write_text("nor this")
    assert here(folder, *SMALL, "--max-steps", 1) == 0
    said = capsys.readouterr().out
    expected = ["cut.jpg", "empty.jpg", *([] if WINDOWS else ["nowhere.png"]), "page.jpg"]
    assert "40 below" in said and f"{len(expected)} files" in said
    listed = (folder / "results" / "skipped_images.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in listed] == expected


def test_broken_images_leave_the_terminal_clean_and_are_used_or_listed(folder):
    faces, chance = folder / "faces", random.Random(0)
    for number in range(60):
        kind = chance.choice(["JPEG", "PNG", "WEBP", "GIF", "BMP"])
        path = faces / f"{number:02d}.{kind.lower()}"
        draw_face(number, 64).save(path, kind)
        content = bytearray(path.read_bytes())
        for _ in range(20):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content[: chance.randrange(len(content)) if number % 3 == 0 else None])
    done = run(folder, *SMALL, "--max-steps", 1)
    assert (done.returncode, done.stderr) == (0, "")
    listed = (folder / "results" / "skipped_images.txt").read_text().splitlines()
    assert len(listed) >= 20 and all(re.fullmatch(r"\d\d\.\w+: .+", line) for line in listed)
    used = int(re.search(r"images +(\d+) below", done.stdout)[1])
    assert used + len(listed) == 40 + 60


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_name_that_is_not_valid_text_is_accepted(folder):
    for name in (b"\xff good.png", b"\xff bad.png"):
        with open(os.path.join(os.fsencode(folder / "faces"), name), "wb") as file:
            draw_face(1, 32).save(file, "PNG")
            file.truncate(None if b"good" in name else 100)
    done = run(folder, *SMALL, "--max-steps", 1)
    assert (done.returncode, done.stderr) == (0, "") and "41 below" in done.stdout
    assert "bad.png" in (folder / "results" / "skipped_images.txt").read_text()


no_links = pytest.mark.skipif(WINDOWS, reason="Windows lets only administrators make links")


@no_links
def test_links_are_followed_but_a_cycle_ends(tmp_path):
    fill_folder(tmp_path / "elsewhere", 3, 32)
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "faces")
    (tmp_path / "faces" / "itself.png").symlink_to("itself.png")
    names, _, skipped = load(tmp_path / "faces")
    assert len(names) == 3 and list(skipped) == ["itself.png"]


def test_a_folder_that_cannot_be_written_keeps_its_cache_in_results(folder, monkeypatch):
    (folder / "faces" / "..faces_16px.cache.lock").mkdir()  # cannot be opened, as in another user's folder
    (folder / "results").mkdir()
    first = load(folder / "faces")
    monkeypatch.setattr(scriptc, "decode", None)
    second = load(folder / "faces")
    assert (folder / "results" / ".faces_16px.cache").exists() and not (folder / "faces" / ".faces_16px.cache").exists()
    assert first[0] == second[0] and (pixels_of(first[1]) == pixels_of(second[1])).all()


@pytest.mark.parametrize("name", ["scandir", "stat"])
def test_a_disk_that_is_away_for_a_moment_costs_no_cache(folder, monkeypatch, capsys, name):
    load(folder / "faces")
    cache = (folder / "faces" / ".faces_16px.cache").read_bytes()
    real = getattr(os, name)

    def fail(path, **options):
        if "faces" in str(path):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        assert here(folder, *SMALL, "--max-steps", 1) == 1
    assert "the same command then resumes" in capsys.readouterr().err.lower()
    assert (folder / "faces" / ".faces_16px.cache").read_bytes() == cache


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded from now on."""
    names, real_decode = [], scriptc.decode

    def decode(path, size):
        names.append(os.path.basename(path))
        return real_decode(path, size)

    monkeypatch.setattr(scriptc, "decode", decode)
    return names


def assert_right(root, names, faces):
    """The pixels are those of the files of these names."""
    assert len(faces.rows) == len(names)
    for name, image in zip(names, pixels_of(faces)):
        assert (image == scriptc.read_image(root / name, image.shape[0])).all()


def test_the_cache_follows_the_folder(tmp_path, decoded):
    faces = tmp_path / "faces"

    def names():
        decoded.clear()
        found, pixels, _ = load(faces)
        assert_right(faces, found, pixels)
        return found

    fill_folder(faces, 6, 32)
    first = names()
    assert len(decoded) == 6 and names() == first and not decoded
    (faces / first[0]).unlink()
    draw_face(77, 32).save(faces / first[1])
    draw_face(78, 32).save(faces / "a_new_one.png")
    assert names() == ["a_new_one.png", *first[1:]] and sorted(decoded) == ["a_new_one.png", first[1]]
    assert load(faces, 32)[1].pixels.shape == (6, 32, 32, 3)


def test_images_that_arrive_while_another_run_uses_the_cache_are_added(tmp_path, decoded):
    faces = tmp_path / "faces"
    fill_folder(faces, 6, 32)
    names, training, _ = load(faces)  # keeps the cache mapped into memory, as a training does
    before = pixels_of(training)
    draw_face(78, 32).save(faces / "a_new_one.png")
    assert_right(faces, *load(faces)[:2])
    assert (pixels_of(training) == before).all() and len(decoded) == 7


def test_when_most_of_the_cache_is_of_images_that_are_gone_it_is_made_anew(tmp_path):
    faces = tmp_path / "faces"
    fill_folder(faces, 30, 32)
    load(faces)
    long = (faces / ".faces_16px.cache").stat().st_size
    for path in sorted(faces.glob("*.png"))[:25]:
        path.unlink()
    assert len(load(faces)[0]) == 5 and (faces / ".faces_16px.cache").stat().st_size < long / 5


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_a_damaged_cache_is_repaired(tmp_path, damage):
    fill_folder(tmp_path / "faces", 5, 32)
    load(tmp_path / "faces")
    path = tmp_path / "faces" / ".faces_16px.cache"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-400], "foreign": b"PK" + bytes(5000), "empty": b""}[damage])
    assert_right(tmp_path / "faces", *load(tmp_path / "faces")[:2])
    assert path.read_bytes() == content


@no_links
def test_a_link_in_place_of_the_cache_is_not_written_through(folder):
    precious = folder / "precious"
    precious.write_text("precious")
    (folder / "faces" / ".faces_16px.cache").symlink_to(precious)
    load(folder / "faces")
    assert precious.read_text() == "precious" and not (folder / "faces" / ".faces_16px.cache").is_symlink()


def test_an_interrupted_reading_of_images_keeps_what_was_read_before_and_then(tmp_path, decoded, monkeypatch):
    faces = tmp_path / "faces"
    fill_folder(faces / "old", 20, 32)
    load(faces)
    fill_folder(faces / "a", 300, 32, seed=100)
    counted, real_decode = iter(range(280)), scriptc.decode

    def decode(path, size):
        if next(counted, None) is None:
            raise KeyboardInterrupt
        return real_decode(path, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scriptc, "decode", decode)
        load(faces)
    decoded.clear()
    names, *_ = load(faces)
    assert len(names) == 320 and len(decoded) < 60


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "Permission denied"), MemoryError()])
def test_an_image_that_could_not_be_read_for_a_passing_reason_is_read_at_the_next_start(tmp_path, monkeypatch, error):
    fill_folder(tmp_path / "faces", 5, 32)
    real_open = Image.open

    def fail(path, **options):
        if "000003" in str(path):
            raise error
        return real_open(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        names, _, skipped = load(tmp_path / "faces")
        assert len(names) == 4 and list(skipped) == ["face_000003.png"] and skipped["face_000003.png"]
    assert len(load(tmp_path / "faces")[0]) == 5


def test_two_starts_at_once_on_one_folder_read_the_right_images(tmp_path):
    fill_folder(tmp_path / "faces", 200, 32)
    starts = [subprocess.Popen(command(tmp_path, *SMALL, "--max-steps", 1, "--results", tmp_path / number, "--checkpoint",
                                       tmp_path / f"{number}.pth"), stdout=subprocess.DEVNULL) for number in "12"]
    assert [start.wait(timeout=300) for start in starts] == [0, 0]
    assert_right(tmp_path / "faces", *load(tmp_path / "faces")[:2])


def test_pictures_below_the_data_folder_do_not_become_training_images(folder, capsys):
    places = ["--results", folder / "faces" / "run" / "results", "--checkpoint", folder / "faces" / "run" / "c.pth"]
    for steps in (1, 2):
        assert here(folder, *SMALL, "--max-steps", steps, *places) == 0
        assert "40 below" in capsys.readouterr().out
    assert "name another folder" in refused(folder, *SMALL, "--results", folder / "faces")


@pytest.mark.skipif(WINDOWS, reason="Windows has no file names with control characters")
def test_control_characters_in_names_reach_neither_the_terminal_nor_the_list_of_skipped_images(folder, capsys):
    (folder / "faces" / "forged.png: fine\nanother\x1b[2J.png").write_text("no image")
    assert here(folder, *SMALL, "--max-steps", 1) == 0
    assert "\x1b" not in "".join(capsys.readouterr())
    lines = (folder / "results" / "skipped_images.txt").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(r"forged.png: fine\nanother\x1b[2J.png: ")


def held_out(names):
    return {*names} - {names[number] for number in scriptc.split(names)[0].tolist()}


def compared(names):
    """Names of the held-out and of the training images whose losses are compared."""
    _, trained, heldout = scriptc.split(names)
    return [{names[number] for number in side.tolist()} for side in (heldout, trained)]


NUMBERED = [f"{number:04d}.jpg" for number in range(1000)]


def test_held_out_images_stay_held_out_as_the_folder_grows():
    few, many = held_out(NUMBERED[:400]), held_out(NUMBERED)
    assert few == many & set(NUMBERED[:400]) and 20 < len(many) < 90


def test_the_losses_are_measured_on_more_images_as_the_folder_grows_and_mostly_on_the_same():
    names = [f"{number:05d}.jpg" for number in range(20_000)]
    few, many, most = (compared(names[:count]) for count in (100, 18_000, 20_000))
    assert few[0] == held_out(names[:100]) and most[0] <= held_out(names) and not most[1] & held_out(names)
    assert len(few[0]) == len(few[1]) and {len(side) for side in (*many, *most)} == {scriptc.COMPARED_MOST}
    assert all(len(before & after) > 0.8 * len(after) for before, after in zip(many, most))


@pytest.mark.parametrize("names", [[f"{number}/38.png" for number in range(400)], NUMBERED[:2], sorted(held_out(NUMBERED))])
def test_neither_side_of_the_split_is_ever_empty(names):
    assert 0 < len(held_out(names)) < len(names) and all(compared(names))


# Mistakes


def test_a_missing_or_empty_dataroot_names_the_ways_to_get_images(tmp_path):
    (tmp_path / "faces").mkdir()
    for root in ("faces", "missing"):
        sentence = refused(tmp_path, *SMALL, "--dataroot", tmp_path / root)
        assert "download_images.py" in sentence and "--dataroot" in sentence and "--demo" in sentence


@pytest.mark.parametrize("flags", [
    ["--image-size", "50"], ["--image-size", "0"], ["--image-size", "512"], ["--epochs", "0"], ["--minutes", "-1"],
    ["--timesteps", "5"], ["--channels", "12"], ["--lr", "nan"], ["--lr", "0"], ["--seed", "x"], ["--precision", "int8"],
    ["--image-size", "16", "--channels", "8", "8", "8", "8", "8", "8"],
])
def test_settings_that_are_not_allowed_are_refused(folder, flags):
    assert flags[0] in refused(folder, *flags)
    assert not (folder / "checkpoint.pth").exists()


def test_a_checkpoint_of_another_network_is_refused_with_the_difference_and_both_ways_out(trained):
    sentence = refused(trained, "--image-size", 32, "--channels", 8, 16, "--epochs", 9)
    assert "16 there, 32 here" in sentence and "--channels" not in sentence and "--checkpoint NEW.pth" in sentence


def test_a_device_that_is_not_there_is_refused(folder):
    assert "cuda" in refused(folder, "--device", "cuda")


def test_folders_that_cannot_be_written_are_found_at_the_start(folder):
    (folder / "file").touch()
    assert "--results" in refused(folder, *SMALL, "--results", folder / "file")
    assert "--checkpoint" in refused(folder, *SMALL, "--checkpoint", folder / "file" / "model.pth")


def test_sampling_without_a_checkpoint_says_to_train_first(folder):
    assert "train first" in refused(folder, "--sample", 4)


@pytest.mark.parametrize("content", [b"", b"random bytes", "foreign", "code", "bomb", "flipped", "old"])
def test_a_file_that_is_not_a_checkpoint_is_refused_and_left_alone(folder, trained, content):
    path = folder / "checkpoint.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("archive/data.pkl", bytes(10**8))
    elif content == "flipped":
        damaged = bytearray((trained / "checkpoint.pth").read_bytes())
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
    elif content == "old":
        torch.save({key: value for key, value in checkpoint(trained).items() if key != "version"}, path)
    else:
        torch.save({"foreign": {"weights": torch.zeros(3)}, "code": pathlib.PurePosixPath("/")}[content], path)
    before = path.read_bytes()
    assert "not a checkpoint" in refused(folder, *SMALL) and path.read_bytes() == before


def test_importing_the_script_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {json.dumps(str(ROOT))}); import scriptc"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])
