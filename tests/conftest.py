"""What all tests share: they run on the CPU, and Linux is made as strict about open files as Windows is."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # set before torch is imported: only on a CPU are equal runs equal to the bit

import pathlib
import signal
import sys

import pytest
import torch

if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # programs that the tests start inherit it, ignored under nohup


def held_open(path):
    """Whether this process has the file at `path` open or mapped into memory; Linux only."""
    try:
        wanted = os.stat(path)
    except OSError:
        return False
    for link in pathlib.Path("/proc/self/fd").iterdir():
        try:
            found = os.stat(link)
        except OSError:  # closed since
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    with open("/proc/self/maps") as maps:  # address, rights, offset, device, inode, path
        return any(line.split(maxsplit=5)[4:5] == [str(wanted.st_ino)] and line.rstrip().endswith(os.path.basename(path))
                   for line in maps)


@pytest.fixture(autouse=True)
def random_numbers_are_the_same_in_every_run():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def open_files_cannot_be_replaced_or_removed(monkeypatch):
    """As on Windows: os.replace and os.unlink of a file that this process has open or mapped raise PermissionError."""
    if sys.platform != "linux":
        return
    real_replace, real_unlink = os.replace, os.unlink

    def refuse(*paths):
        for path in paths:
            if isinstance(path, str | os.PathLike) and held_open(path):
                raise PermissionError(13, "The process cannot access the file because it is open", str(path))

    def replace(source, target, **options):
        refuse(source, target)
        return real_replace(source, target, **options)

    def unlink(path, **options):
        if "dir_fd" not in options:
            refuse(path)
        return real_unlink(path, **options)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "rename", replace)
    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "remove", unlink)
