"""scriptc.py as a user runs it: every test is one promise about what its commands do."""

import contextlib
import csv
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

ROOT = pathlib.Path(__file__).resolve().parent.parent
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
SMALL = ["--image-size", "16", "--channels", "8", "16", "--batch-size", "16", "--sample-steps", "3", "--device", "cpu"]


def command(folder, *flags):
    """The command line of a small training in `folder`: its faces/, results/ and checkpoint.pth."""
    places = {"--dataroot": folder / "faces", "--results": folder / "results", "--checkpoint": folder / "checkpoint.pth"}
    flags = [str(flag) for flag in flags]
    own = [text for flag, path in places.items() if flag not in flags for text in (flag, str(path))]
    return [sys.executable, str(ROOT / "scriptc.py"), *own, *flags]


def run(folder, *flags):
    return subprocess.run(command(folder, *flags), capture_output=True, text=True, timeout=300)


def here(folder, *flags):
    """The same within this process, which saves the imports; the exit status."""
    return scriptc.main(command(folder, *flags)[2:])


def refused(folder, *flags):
    """The one sentence with which a command that cannot be carried out ends, and its exit status."""
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            status = here(folder, *flags)
        except SystemExit as stop:
            status = stop.code
    lines = error.getvalue().strip().splitlines()
    assert status in (1, 2) and len(lines) == status, lines  # argparse says the usage first
    return lines[-1].removeprefix("scriptc.py: ")


def table(folder):
    with open(folder / "results" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def same(one, other):
    """Whether two nested state dicts are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.fixture
def folder(tmp_path):
    fill_folder(tmp_path / "faces" / "some" / "depth", 40, 32)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder after two epochs of training; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("trained")
    fill_folder(folder / "faces", 40, 32)
    done = run(folder, *SMALL, "--epochs", 2)
    assert done.returncode == 0, done.stderr
    return folder


# A first run


def test_a_run_ends_with_a_grid_a_curve_a_table_and_a_checkpoint(trained):
    rows = table(trained)
    header = ["epoch", "step", "images_seen", "train_loss", "heldout_loss", "lr", "images_per_second", "seconds"]
    assert list(rows[0]) == header and [row["epoch"] for row in rows] == ["1", "2"]
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


def test_a_log_file_gets_a_line_of_progress_now_and_then(folder, monkeypatch, capsys):
    monkeypatch.setattr(scriptc, "LOG_SECONDS", 0)
    assert here(folder, *SMALL, "--max-steps", 2) == 0
    out = capsys.readouterr().out
    assert re.search(r"^reading images at 16 px: \d+ of \d+ images$", out, re.M)
    assert re.search(r"^epoch 1: \d+ of \d+ images, loss \d\.\d+, \d+\.\d minutes left in all$", out, re.M)


def test_load_model_gives_the_averaged_network_that_was_saved(trained):
    model = scriptc.load_model(trained / "checkpoint.pth")
    assert same(dict(model.state_dict()), dict(checkpoint(trained)["ema"]))
    assert model(torch.randn(2, 3, 16, 16), torch.tensor([3, 900])).shape == (2, 3, 16, 16) and not model.training


def test_the_loss_falls_on_a_tiny_set(folder):
    fill_folder(folder / "faces", 120, 32)
    assert here(folder, *SMALL, "--epochs", 20, "--lr", 0.005, "--precision", "fp32") == 0
    rows = table(folder)
    assert float(rows[-1]["train_loss"]) < 0.6 * float(rows[0]["train_loss"])
    first, last = float(rows[0]["heldout_loss"]), float(rows[-1]["heldout_loss"])
    assert last < 0.8 * first and last < 0.12  # guessing zero would give 0.8, the untrained network about 0.2


def test_every_image_is_seen_once_an_epoch_and_the_held_out_never(folder, monkeypatch):
    seen = []
    real_batch = scriptc.Faces.batch

    def batch(self, rows, flip=None):
        seen.extend(rows.tolist() if flip is not None else [])
        return real_batch(self, rows, flip)

    monkeypatch.setattr(scriptc.Faces, "batch", batch)
    assert here(folder, *SMALL, "--epochs", 2) == 0
    names, *_ = scriptc.load_images(folder / "faces", 16, folder)
    train_rows, held_out = (rows.tolist() for rows in scriptc.split(names)[:2])
    first, second = seen[: len(train_rows)], seen[len(train_rows):]
    assert sorted(first) == sorted(second) == sorted(train_rows) and first != second
    assert held_out and sorted(train_rows + held_out) == list(range(40))


def test_minutes_are_a_budget_that_ends_with_everything_on_disk(folder):
    done = run(folder, *SMALL, "--minutes", 0.4)
    assert done.returncode == 0
    last = table(folder)[-1]
    assert float(last["lr"]) < 0.04 * 8e-3  # along a straight line, so at most 4% of the time was left unused
    assert (folder / "results" / f"epoch_{last['epoch']}_step_{last['step']}.png").exists()
    assert checkpoint(folder)["step"] == int(last["step"]) and (folder / "results" / "loss.png").exists()


def test_the_demo_needs_no_images_and_keeps_everything_in_results_demo(tmp_path):
    flags = ["--demo", "--image-size", "16", "--channels", "8", "--max-steps", "2", "--results", str(tmp_path)]
    faces = set((ROOT / "fake_face").rglob("*"))
    done = subprocess.run([sys.executable, str(ROOT / "scriptc.py"), *flags], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "demo" / "model_checkpoint.pth").exists() and list((tmp_path / "demo").glob("epoch_1_step_2.png"))
    assert {path.name for path in tmp_path.iterdir()} == {"demo"}
    assert {path for path in (ROOT / "fake_face").rglob("*") if "__pycache__" not in path.parts} <= faces


# Going on


def test_a_finished_run_says_so_and_changes_nothing(trained, capsys):
    before = (trained / "checkpoint.pth").read_bytes(), (trained / "results" / "metrics.csv").read_bytes()
    assert here(trained, "--device", "cpu") == 0 and "finished" in capsys.readouterr().out
    assert before == ((trained / "checkpoint.pth").read_bytes(), (trained / "results" / "metrics.csv").read_bytes())


def test_more_epochs_go_on_with_the_settings_of_the_checkpoint(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert here(tmp_path, "--epochs", 4, "--sample-steps", 3) == 0
    rows, saved = table(tmp_path), checkpoint(tmp_path)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert (saved["epoch"], saved["config"]["channels"], saved["config"]["batch_size"]) == (4, [8, 16], 16)


@pytest.mark.parametrize("number, precision", [
    (signal.SIGINT, "bf16"), (signal.SIGTERM, "fp32"), (signal.SIGKILL, "fp32")])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(folder, number, precision):
    flags = [*SMALL, "--batch-size", "64", "--epochs", "30", "--precision", precision, "--save-minutes", "0.001"]
    whole = folder / "undisturbed"
    shutil.copytree(folder / "faces", whole / "faces")
    assert here(whole, *flags) == 0

    stopped = subprocess.Popen(command(folder, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.previous.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped.send_signal(number)
    out, error = stopped.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert stopped.returncode == -signal.SIGKILL
    else:
        assert stopped.returncode == 130 and "checkpoint saved" in out and error == ""
    steps = checkpoint(folder)["step"]
    assert 0 < steps < checkpoint(whole)["step"]

    assert here(folder, *flags) == 0
    one, other = checkpoint(folder), checkpoint(whole)
    assert all(same(one[part], other[part]) for part in ("model", "ema", "optimizer", "epoch", "step", "images_seen"))
    timeless = [{key: row[key] for key in row if key not in ("seconds", "images_per_second")} for row in table(folder)]
    assert timeless == [{key: row[key] for key in timeless[0]} for row in table(whole)]
    grid = f"results/epoch_30_step_{one['step']}.png"
    assert (folder / grid).read_bytes() == (whole / grid).read_bytes()


def test_a_broken_checkpoint_is_set_aside_and_the_one_before_is_used(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    assert here(tmp_path, "--epochs", 3, "--sample-steps", 3) == 0
    broken = (tmp_path / "checkpoint.pth").read_bytes()[:-5000]
    (tmp_path / "checkpoint.pth").write_bytes(broken)
    scriptc.load_model(tmp_path / "checkpoint.pth")  # reads the one before and changes nothing
    assert (tmp_path / "checkpoint.pth").read_bytes() == broken
    assert here(tmp_path, "--epochs", 4, "--sample-steps", 3) == 0 and "is renamed to" in capsys.readouterr().out
    assert [path.read_bytes() for path in tmp_path.glob("checkpoint.pth.broken-*")] == [broken]
    assert checkpoint(tmp_path)["epoch"] == 4


def test_a_second_run_on_the_same_checkpoint_is_refused(folder):
    first = subprocess.Popen(command(folder, *SMALL, "--epochs", 1000), stdout=subprocess.PIPE, text=True)
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
    assert here(folder, *SMALL, "--epochs", 30, "--save-minutes", 0.001) == 0
    assert capsys.readouterr().out.count("could not be saved ([Errno 28] No space left") == 3
    assert checkpoint(folder)["epoch"] == 30


def test_a_checkpoint_that_cannot_be_saved_at_the_end_keeps_the_one_before(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)

    def save(path, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scriptc, "save_checkpoint", save)
    monkeypatch.setattr(scriptc, "RETRY_SECONDS", 0.01)
    assert here(tmp_path, "--epochs", 3, "--sample-steps", 3) == 1
    assert "make room" in capsys.readouterr().err and checkpoint(tmp_path)["epoch"] == 2


def test_weights_that_are_not_finite_are_never_saved(trained, tmp_path):
    state = checkpoint(trained)
    next(iter(state["ema"].values())).view(-1)[0] = float("nan")
    with pytest.raises(scriptc.UserError, match="--lr"):
        scriptc.save_checkpoint(tmp_path / "checkpoint.pth", state)
    assert not list(tmp_path.iterdir())


def test_the_run_ends_when_a_background_save_finds_weights_that_are_not_finite(folder, monkeypatch, capsys):
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
    assert "--lr" in capsys.readouterr().err
    assert same(good["model"], checkpoint(folder)["model"])


def test_fewer_epochs_than_are_done_leave_the_run_as_it_is(folder, capsys):
    assert here(folder, *SMALL, "--max-steps", 7) == 0  # in epoch 3
    before = (folder / "checkpoint.pth").read_bytes()
    assert here(folder, "--device", "cpu", "--epochs", 2, "--batch-size", 4) == 0
    assert "finished" in capsys.readouterr().out and (folder / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("part", [0, 0.005, 0.01, 0.5, 0.99, 1])
def test_the_learning_rate_rises_then_falls_to_zero_and_is_never_negative(part):
    assert 0 <= scriptc.learning_rate(1, part) <= min(1 - part, 0.1 + 100 * part)


def test_the_learning_rate_warms_up_under_minutes_however_long_the_start_takes(folder, monkeypatch):
    parts, real_step = [], scriptc.training_step
    monkeypatch.setattr(scriptc, "training_step", lambda run, rows, part: parts.append(part) or real_step(run, rows, part))
    monkeypatch.setattr(scriptc, "START", time.time() - 20)
    assert here(folder, *SMALL, "--minutes", 0.6) == 0
    assert parts[0] == 0 and parts[-1] > 0.9 and checkpoint(folder)["seconds"] < 36


def test_a_slow_first_step_after_a_restart_does_not_end_a_run_with_minutes(monkeypatch):
    monkeypatch.setattr(scriptc, "START", time.time() - 12)
    run = scriptc.Run.__new__(scriptc.Run)
    run.args = types.SimpleNamespace(epochs=None, max_steps=None, minutes=5, sample_steps=20)
    run.at = scriptc.Progress(step=201, images_seen=201 * 64, seconds=240, first_step=10)
    run.train_rows, run.heldout_rows, run.saver = range(500), range(500), types.SimpleNamespace(cost=0)
    run.epoch_seen, run.epoch_begun = 200 * 64, time.time() - 10
    assert 0.8 < run.part_done() < 1


def test_an_epoch_sees_every_image_once_although_the_folder_grew_in_the_middle_of_it(folder, monkeypatch):
    assert here(folder, *SMALL, "--max-steps", 2) == 0
    fill_folder(folder / "faces" / "new", 30, 32)
    seen, real_batch = [], scriptc.Faces.batch

    def batch(self, rows, flip=None):
        seen.extend(rows.tolist() if flip is not None else [])
        return real_batch(self, rows, flip)

    monkeypatch.setattr(scriptc.Faces, "batch", batch)
    assert here(folder, "--epochs", 1) == 0
    train_rows = scriptc.split(scriptc.load_images(folder / "faces", 16, folder)[0], checkpoint(folder)["heldout"])[0]
    assert sorted(seen) == train_rows.tolist() and len(seen) > 55


def test_short_epochs_do_not_make_checkpoints_more_frequent_than_save_minutes(folder, monkeypatch):
    saves, real_save = [], scriptc.save_checkpoint
    monkeypatch.setattr(scriptc, "save_checkpoint", lambda *arguments: saves.append(1) or real_save(*arguments))
    assert here(folder, *SMALL, "--epochs", 20) == 0
    assert len(saves) == 1  # the one at the end


def test_advice_under_demo_can_be_followed(tmp_path, capsys):
    demo = ["--demo", "--device", "cpu", "--results", str(tmp_path)]
    assert scriptc.main([*demo, "--image-size", "16", "--channels", "8", "--max-steps", "1"]) == 0
    capsys.readouterr()
    assert scriptc.main(demo) == 0 and scriptc.main([*demo, "--image-size", "32"]) == 1
    for advice in capsys.readouterr():
        assert "--results NEW_FOLDER" in advice and "--checkpoint" not in advice


def test_a_run_can_be_resumed_in_another_precision(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    for epochs, precision in ((3, "fp16"), (4, "bf16"), (5, "fp16"), (6, "fp32")):
        assert here(tmp_path, "--epochs", epochs, "--precision", precision) == 0
    assert checkpoint(tmp_path)["epoch"] == 6


# Micro-batches and processes


def test_a_step_in_micro_batches_learns_the_same(folder, monkeypatch):
    flags = [*SMALL, "--max-steps", 6, "--precision", "fp32"]
    assert here(folder, *flags) == 0
    monkeypatch.setattr(scriptc, "CORE_PIXELS", 3 * 16**2)
    parts = folder / "parts.pth"
    assert here(folder, *flags, "--checkpoint", parts) == 0
    for one, other in zip(checkpoint(folder)["history"], torch.load(parts, weights_only=True)["history"], strict=True):
        assert one[:3] == other[:3] and one[3:5] == pytest.approx(other[3:5], abs=1e-4)


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
                 RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
                 RuntimeError("Unable to find an engine to execute this computation"),
                 RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_when_memory_runs_out_a_step_and_a_drawing_are_repeated_with_half_the_images(folder, monkeypatch, error):
    flags, real_forward = [*SMALL, "--max-steps", 3, "--precision", "fp32"], scriptc.SimpleUnet.forward
    assert here(folder, *flags) == 0
    expected, grid = checkpoint(folder)["history"], next((folder / "results").glob("epoch*.png")).read_bytes()

    def forward(self, x, t):
        if len(x) > 5:
            raise error
        return real_forward(self, x, t)

    monkeypatch.setattr(scriptc.SimpleUnet, "forward", forward)
    parts = folder / "parts.pth"
    assert here(folder, *flags, "--checkpoint", parts, "--results", folder / "parts") == 0
    for one, other in zip(expected, torch.load(parts, weights_only=True)["history"], strict=True):
        assert one[:3] == other[:3] and one[3:5] == pytest.approx(other[3:5], abs=1e-4)
    assert len(grid) == pytest.approx(len(next((folder / "parts").glob("epoch*.png")).read_bytes()), rel=0.02)
    assert here(folder, "--checkpoint", parts, "--sample", 9, "--sample-steps", 2) == 0
    assert len(list((folder / "results" / "samples").iterdir())) == 9


def test_with_several_processes_a_drawing_too_is_repeated_with_half_the_images(monkeypatch):
    def sample(model, count, **settings):
        if count > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.zeros(count, 3, 16, 16)

    monkeypatch.setattr(scriptc, "PROCESSES", 2)
    monkeypatch.setattr(scriptc, "sample", sample)
    assert scriptc.draw(None, 12).shape == (12, 3, 16, 16)


def test_too_little_memory_for_one_image_ends_with_a_clear_message(folder, monkeypatch, capsys):
    def forward(self, x, t):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(scriptc.SimpleUnet, "forward", forward)
    assert here(folder, *SMALL, "--max-steps", 3) == 1
    assert "--image-size" in capsys.readouterr().err


def test_two_processes_learn_what_one_does(folder):
    flags = [*SMALL, "--max-steps", 20, "--precision", "fp32"]
    alone, both = folder / "alone", folder / "both"
    for place, launcher in ((alone, []), (both, TWO_PROCESSES)):
        flags_there = [*flags, "--results", place / "results", "--checkpoint", place / "checkpoint.pth"]
        done = subprocess.run(launcher + command(folder, *flags_there)[bool(launcher):], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert [row["images_seen"] for row in table(alone)] == [row["images_seen"] for row in table(both)]
    for one, other in zip(table(alone), table(both)):
        assert float(one["train_loss"]) == pytest.approx(float(other["train_loss"]), abs=1e-4)
        assert float(one["heldout_loss"]) == pytest.approx(float(other["heldout_loss"]), abs=1e-4)

    flags = ["--sample", "70", "--sample-steps", "2", "--results", both / "results", "--checkpoint", both / "checkpoint.pth"]
    done = subprocess.run(TWO_PROCESSES + command(folder, *flags)[1:], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    drawn = [np.asarray(Image.open(path)).astype(int) for path in sorted((both / "results" / "samples").iterdir())]
    alone = scriptc.sample(scriptc.load_model(both / "checkpoint.pth"), 1, 2, first=69)
    assert len(drawn) == 70 and np.abs(drawn[69] - np.asarray(scriptc.to_image(alone[0]))).max() <= 1


def test_a_process_without_an_image_of_a_small_batch_takes_part(folder):
    flags = [*SMALL, "--batch-size", 1, "--max-steps", 3]
    done = subprocess.run([*TWO_PROCESSES, *command(folder, *flags)[1:]], capture_output=True, text=True)
    assert done.returncode == 0 and [row["step"] for row in table(folder)] == ["3"], done.stderr


def test_a_killed_process_is_started_again_and_the_run_finishes(folder):
    flags = [*SMALL, "--epochs", 60, "--save-minutes", "0.001"]
    group = subprocess.Popen([*TWO_PROCESSES, "--max-restarts=3", *command(folder, *flags)[1:]], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.previous.pth").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = pathlib.Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, error = group.communicate(timeout=300)
    assert group.returncode == 0, error
    assert [int(row["epoch"]) for row in table(folder)] == list(range(1, 61))


def test_processes_that_do_not_see_the_same_checkpoint_end_with_a_clear_message(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "checkpoint.pth", tmp_path / "0.pth")
    script = tmp_path / "start.py"
    script.write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport scriptc\n"
                      f"sys.exit(scriptc.main([*sys.argv[1:], '--checkpoint', {str(tmp_path)!r} + f'/{{scriptc.RANK}}.pth']))")
    flags = [*SMALL, "--epochs", "9", "--dataroot", str(tmp_path / "faces"), "--results", str(tmp_path / "results")]
    done = subprocess.run([*TWO_PROCESSES, str(script), *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "process 1 reads another checkpoint or other images than process 0" in done.stderr


# Drawing


def test_sample_into_a_new_folder_makes_no_page_of_a_run_that_is_not_there(trained, tmp_path):
    assert here(trained, "--sample", 2, "--sample-steps", 2, "--results", tmp_path / "new") == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"samples", "samples.png", "nearest.png"}


def test_sample_draws_single_images_and_a_grid_that_repeat(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    samples = tmp_path / "results" / "samples"
    pictures = []
    for flags in ([5], [3], [3, "--seed", 1]):
        assert here(tmp_path, "--sample-steps", 3, "--sample", *flags) == 0
        pictures.append([np.asarray(Image.open(path)) for path in sorted(samples.glob("*.png"))])
        with Image.open(tmp_path / "results" / "samples.png") as grid:
            assert grid.size == (flags[0] * 18 + 2, 20)
    assert [len(drawn) for drawn in pictures] == [5, 3, 3] and pictures[0][0].shape == (16, 16, 3)
    assert all(np.abs(one.astype(int) - other).max() <= 1 for one, other in zip(pictures[0], pictures[1]))
    assert (pictures[1][0] != pictures[2][0]).any()
    assert Image.open(tmp_path / "results" / "nearest.png").width == 960


def test_the_nearest_training_image_is_found_also_mirrored():
    pixels = np.random.default_rng(0).integers(0, 256, (1500, 16, 16, 3), np.uint8)
    images = torch.from_numpy(pixels[[3, 1400]]).permute(0, 3, 1, 2) / 127.5 - 1
    images[1] = images[1].flip(2)
    least, closest = scriptc.distances(images, pixels).min(dim=1)
    assert closest.tolist() == [3, 1400] and least.max() < 0.1


def test_a_drawing_has_distance_0_to_a_copy_and_1_to_what_is_as_far_as_training_images_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 16, 16, 3), np.uint8)
    new = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (4, 16, 16, 3), np.uint8))
    copies = torch.from_numpy(pixels[:5])
    ratios = scriptc.save_nearest(scriptc.to_x_0(torch.cat((copies, new))), pixels, tmp_path / "nearest.png")
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
        pixels, reason = scriptc.decode(str(path), 16)
        assert reason == "" and pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8, path.name
        expected = small if path.stem not in ("gray", "deep") else np.asarray(gray.resize((16, 16)).convert("RGB"))
        assert np.abs(pixels.astype(int) - expected).mean() < 6, path.name


def test_transparency_is_laid_over_white(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (scriptc.decode(str(tmp_path / "clear.png"), 16)[0] == 255).all()
    half = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    half.paste((0, 0, 0, 128), (0, 0, 16, 32))
    half.save(tmp_path / "half.png")
    half.convert("LA").save(tmp_path / "gray.png")
    pixels, gray = (scriptc.decode(str(tmp_path / name), 16)[0].astype(int) for name in ("half.png", "gray.png"))
    assert np.abs(pixels[:, :6] - 127).max() < 3 and np.abs(pixels[:, 10:] - [255, 0, 0]).max() < 3
    assert np.abs(gray[:, :6] - 127).max() < 3 and np.abs(gray[:, 10:] - 76).max() < 3


def test_sixteen_bits_a_channel_are_read_as_eight(tmp_path):
    gray = draw_face(1, 16).convert("L")
    deep = np.asarray(gray).astype(np.uint16) << 8
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert (scriptc.decode(str(tmp_path / "deep.png"), 16)[0] == np.asarray(gray)[..., None]).all()


def test_the_middle_of_a_wide_image_is_kept(tmp_path):
    picture = Image.new("RGB", (96, 32), "black")
    picture.paste("white", (26, 0, 70, 32))
    picture.save(tmp_path / "wide.png")
    assert (scriptc.decode(str(tmp_path / "wide.png"), 16)[0] > 250).all()


def test_files_that_are_not_images_are_skipped_counted_and_listed(folder, capsys):
    faces = folder / "faces"
    (faces / "empty.jpg").touch()
    (faces / "page.jpg").write_text("<html>busy</html>")
    (faces / "cut.jpg").write_bytes(b"")
    draw_face(0, 256).save(faces / "cut.jpg", quality=95)
    os.truncate(faces / "cut.jpg", 3000)
    Image.new("CMYK", (32, 32)).save(faces / "other.tiff")
    (faces / "nowhere.png").symlink_to(faces / "gone.png")
    (faces / "notes.txt").write_text("not meant as an image")
    (faces / ".hidden.jpg").write_text("nor this")
    assert here(folder, *SMALL, "--max-steps", 1) == 0
    said = capsys.readouterr().out
    assert "40 below" in said and "4 files" in said
    listed = (folder / "results" / "skipped_images.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in listed] == ["cut.jpg", "empty.jpg", "nowhere.png", "page.jpg"]


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


def test_links_are_followed_but_a_cycle_ends(tmp_path):
    fill_folder(tmp_path / "elsewhere", 3, 32)
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "faces")
    (tmp_path / "faces" / "itself.png").symlink_to("itself.png")
    names, _, skipped = scriptc.load_images(tmp_path / "faces", 16, tmp_path)
    assert len(names) == 3 and list(skipped) == ["itself.png"]


def test_a_folder_that_cannot_be_written_keeps_its_cache_in_results(folder, monkeypatch):
    real_access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder / "faces" and real_access(path, mode))
    first = scriptc.load_images(folder / "faces", 16, folder)
    monkeypatch.setattr(scriptc, "decode", None)
    second = scriptc.load_images(folder / "faces", 16, folder)
    assert (folder / ".faces_16px.cache").exists() and not list((folder / "faces").glob(".*"))
    assert first[0] == second[0] and (first[1] == second[1]).all()


def test_the_cache_follows_the_folder(tmp_path, monkeypatch):
    faces, decoded = tmp_path / "faces", []
    real_decode = scriptc.decode
    monkeypatch.setattr(scriptc, "decode", lambda path, size: decoded.append(path) or real_decode(path, size))

    def names():
        decoded.clear()
        found, pixels, _ = scriptc.load_images(faces, 16, tmp_path)
        assert (faces / ".faces_16px.cache").exists() and len(pixels) == len(found)
        for name, image in zip(found, pixels):
            assert (image == real_decode(str(faces / name), 16)[0]).all()
        return found

    fill_folder(faces, 6, 32)
    first = names()
    assert len(decoded) == 6 and names() == first and not decoded
    (faces / first[0]).unlink()
    draw_face(77, 32).save(faces / first[1])
    draw_face(78, 32).save(faces / "a_new_one.png")
    assert names() == ["a_new_one.png", *first[1:]] and len(decoded) == 2
    assert scriptc.load_images(faces, 32, tmp_path)[1].shape == (6, 32, 32, 3)


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty", "index cut", "index foreign", "index of another"])
def test_a_damaged_cache_is_rebuilt(tmp_path, damage):
    fill_folder(tmp_path, 5, 32)
    scriptc.load_images(tmp_path, 16, tmp_path)
    pixels = tmp_path / ".faces_16px.cache"
    index = tmp_path / ".faces_16px.cache.json"
    path, sound = (index if "index" in damage else pixels), pixels.read_bytes()
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-400], "foreign": b"PK" + bytes(5000), "empty": b"", "index cut": content[:-9],
                      "index foreign": b'{"files": 3}', "index of another": content.replace(b"token", b"taken")}[damage])
    assert len(scriptc.load_images(tmp_path, 16, tmp_path)[0]) == 5
    assert pixels.read_bytes()[:-16] == sound[:-16]


def test_the_index_of_the_cache_is_not_read_if_it_is_larger_than_the_folder_explains(tmp_path, monkeypatch):
    fill_folder(tmp_path, 5, 32)
    (tmp_path / ".faces_16px.cache").write_bytes(bytes(100))
    with open(tmp_path / ".faces_16px.cache.json", "wb") as index:
        index.truncate(10**8)
    monkeypatch.setattr(scriptc.json, "loads", None)
    assert scriptc.open_cache(tmp_path / ".faces_16px.cache", 16, scriptc.list_files(tmp_path)) == ({}, None)


def test_links_in_the_data_folder_are_never_written_through(folder):
    precious = folder / "precious"
    precious.write_text("precious")
    for name in (".faces_16px.cache", ".faces_16px.cache.json", f"..faces_16px.cache.{os.getpid()}.tmp"):
        (folder / "faces" / name).symlink_to(precious)
    scriptc.load_images(folder / "faces", 16, folder)
    assert precious.read_text() == "precious" and not (folder / "faces" / ".faces_16px.cache").is_symlink()


def test_control_characters_in_names_reach_neither_the_terminal_nor_the_list_of_skipped_images(folder, capsys):
    (folder / "faces" / "forged.png: fine\nanother\x1b[2J.png").write_text("no image")
    assert here(folder, *SMALL, "--max-steps", 1) == 0
    assert "\x1b" not in "".join(capsys.readouterr())
    lines = (folder / "results" / "skipped_images.txt").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(r"forged.png: fine\nanother\x1b[2J.png: ")


def held_out(names, *compared):
    return {names[row] for row in scriptc.split(names, *compared)[1].tolist()}


def test_held_out_images_stay_held_out_as_the_folder_grows():
    names = [f"{number:04d}.jpg" for number in range(1000)]
    few, many = held_out(names[:400]), held_out(names)
    assert few == many & set(names[:400]) and 20 < len(many) < 90


def test_the_held_out_error_is_measured_on_the_same_images_as_the_folder_grows():
    names = [f"{number:04d}.jpg" for number in range(1000)]
    first = scriptc.split(names[500:700])
    grown = scriptc.split(names, first[2])
    assert held_out(names[500:700]) == {names[row] for row in grown[1].tolist()} and grown[2] == first[2]
    assert not {names[row] for row in grown[0].tolist()} & held_out(names)  # all others of their kind stay held out, too


NUMBERED = [f"{number}.png" for number in range(400)]


@pytest.mark.parametrize("names", [[f"{number}/38.png" for number in range(400)], NUMBERED[:2], sorted(held_out(NUMBERED))])
def test_neither_side_of_the_split_is_ever_empty(names):
    train, held, *_ = scriptc.split(names)
    assert len(train) and len(held) and len(train) + len(held) == len(names)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
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
