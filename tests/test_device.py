"""What runs on a CUDA GPU or an Apple GPU, tested without either; only the last test needs a CUDA GPU."""

import os
import subprocess

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import scriptc
from fake_face.draw_faces import fill_folder
from tests.runs import SMALL, checkpoint, command, table
from tests.systems import wait_for

CUDA = torch.device("cuda", 0)


@pytest.fixture
def fake_cuda():
    """A SimpleUnet on a GPU that does not exist: tensors have a device and a shape, but no values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            with CUDA:
                model = scriptc.SimpleUnet((8, 16), 32)
        except RuntimeError as error:  # built without CUDA, as for Windows and macOS, or PyTorch 2.6
            pytest.skip(f"this PyTorch makes no tensors of a GPU that is not there: {error}".partition("\n")[0])
        yield model


def test_the_forward_pass_stays_on_the_gpu_and_refuses_a_timestep_elsewhere(fake_cuda):
    x, t = torch.empty(2, 3, 32, 32, device=CUDA), torch.zeros(2, dtype=torch.long, device=CUDA)
    assert fake_cuda(x, t).device == CUDA
    with pytest.raises(Exception, match="same device|different devices"):
        fake_cuda(x, t.cpu())


def test_the_noise_of_a_batch_is_mixed_in_on_the_gpu(fake_cuda):
    x_0, t = torch.empty(2, 3, 32, 32, device=CUDA), torch.zeros(2, dtype=torch.long, device=CUDA)
    x_t, noise = scriptc.forward_diffusion(x_0, t, fake_cuda.alphas_cumprod)
    assert {x_t.device, noise.device} == {CUDA}


def test_muon_steps_on_the_gpu(fake_cuda):
    kernels = [module.weight for module in fake_cuda.modules() if isinstance(module, torch.nn.Conv2d)]
    optimizer = scriptc.Muon(kernels, 0.01)
    for kernel in kernels:
        kernel.grad = torch.zeros_like(kernel)
    optimizer.step()
    moments = [state["momentum"] for state in optimizer.state.values()]
    assert moments and {moment.device for moment in moments} == {CUDA}


@pytest.mark.parametrize("name, capability, precision", [
    ("NVIDIA H100 80GB HBM3", (9, 0), "bf16"), ("NVIDIA GeForce RTX 3060", (8, 6), "bf16"),
    ("Tesla T4", (7, 5), "fp16"), ("Quadro RTX 4000", (7, 5), "fp16"), ("Tesla V100-SXM2-16GB", (7, 0), "fp16"),
    ("NVIDIA GeForce GTX 1650", (7, 5), "fp32"), ("NVIDIA T400 4GB", (7, 5), "fp32"), ("Tesla P100-PCIE-16GB", (6, 0), "fp32"),
])
def test_only_gpus_with_tensor_cores_train_in_low_precision(monkeypatch, name, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert scriptc.choose_precision("auto", CUDA) == precision
    assert scriptc.memory_format(CUDA) == (torch.contiguous_format if precision == "fp32" else torch.channels_last)


def test_more_processes_than_gpus_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(scriptc.UserError, match="--nproc_per_node=1"):
        scriptc.choose_device(None)


def test_a_gpu_that_cannot_compute_is_refused_in_a_sentence(monkeypatch):
    if not torch.version.cuda or torch.cuda.is_available():
        pytest.skip("needs a PyTorch for CUDA on a machine without a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(scriptc.UserError, match=r"cannot use the NVIDIA GPU \(.+README.md"):
        scriptc.choose_device(None)


def test_weights_and_images_are_channels_last_except_on_an_apple_gpu_and_where_a_cpu_trains_in_bf16(monkeypatch):
    assert scriptc.memory_format(torch.device("mps")) == torch.contiguous_format
    for has_bf16, precision, layout in ((True, "bf16", torch.contiguous_format), (False, "fp32", torch.channels_last)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_bf16=has_bf16: has_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert scriptc.choose_precision("auto", torch.device("cpu")) == precision
        assert scriptc.memory_format(torch.device("cpu")) == layout


def test_a_gpu_trains_resumes_after_a_kill_and_draws(tmp_path):
    fill_folder(tmp_path / "faces", 40, 32)
    visible = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    flags = [*SMALL, "--save-minutes", 0.001, "--device", "cuda"]
    killed = subprocess.Popen(command(tmp_path, *flags, "--epochs", 1000), stderr=subprocess.PIPE, text=True, env=visible)
    wait_for(lambda: len(table(tmp_path)) >= 2 or killed.poll() is not None)
    killed.kill()
    _, error = killed.communicate()
    if "finds no cuda device" in error:
        pytest.skip("there is no CUDA GPU")
    epochs = scriptc.read_checkpoint(tmp_path / "checkpoint.pth")["epoch"] + 20
    for more in (["--epochs", epochs], ["--sample", 4]):
        done = subprocess.run(command(tmp_path, *flags, *more), capture_output=True, text=True, env=visible)
        assert done.returncode == 0, done.stderr
    losses = [float(row["train_loss"]) for row in table(tmp_path)]
    assert checkpoint(tmp_path)["epoch"] == len(losses) == epochs and losses[-1] < 0.8 * losses[0]
    assert len([*(tmp_path / "results" / "samples").glob("*.png")]) == 4
