"""Devices that are not there: what would run on a CUDA card or an Apple GPU, without either."""

import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import scriptc

CUDA = torch.device("cuda", 0)


@pytest.fixture
def fake_cuda(monkeypatch):
    """A SimpleUnet on a card that does not exist: tensors have a device and a shape, but no values."""
    real_schedule = scriptc.sampling_schedule

    def schedule(*arguments):
        with unset_fake_temporarily():
            return real_schedule(*arguments)

    monkeypatch.setattr(scriptc, "sampling_schedule", schedule)
    monkeypatch.setattr(scriptc, "generator", lambda *_, device: types.SimpleNamespace(device=device))
    for name in ("rand", "randn"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *shape, real=real, generator=None, **options: real(*shape, **options))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with CUDA:
            model = scriptc.SimpleUnet((8, 16), 32)
        yield model


def test_the_forward_pass_stays_on_the_card_and_refuses_a_timestep_elsewhere(fake_cuda):
    x, t = torch.empty(2, 3, 32, 32, device=CUDA), torch.zeros(2, dtype=torch.long, device=CUDA)
    assert fake_cuda(x, t).device == CUDA
    with pytest.raises(Exception, match="same device"):
        fake_cuda(x, t.cpu())


@pytest.mark.parametrize("sampler", scriptc.SAMPLERS)
def test_sampling_runs_on_the_card_and_returns_images_on_the_cpu(fake_cuda, sampler):
    devices = []
    images = scriptc.sample(fake_cuda, 2, 4, sampler, on_step=lambda *pair: devices.extend(x.device for x in pair))
    assert images.device.type == "cpu" and set(devices) == {CUDA} and len(devices) == 8


def test_data_noise_and_timesteps_of_a_step_are_on_the_card(fake_cuda):
    run = types.SimpleNamespace(device=CUDA, args=types.SimpleNamespace(image_size=32, seed=0, timesteps=1000),
                                at=types.SimpleNamespace(step=0), cumulative_density=torch.ones(1000, device=CUDA))
    flip, t, noise = scriptc.random_draws(run, 8)
    faces = scriptc.Faces.__new__(scriptc.Faces)
    faces.device = CUDA
    faces.pixels = torch.zeros(10, 32, 32, 3, dtype=torch.uint8, device=CUDA)
    x_0 = faces.batch(torch.arange(8, device=CUDA), flip)
    x_t, _ = scriptc.forward_diffusion(x_0, t, fake_cuda.alphas_cumprod, noise)
    assert {tensor.device for tensor in (flip, t, noise, x_0, x_t)} == {CUDA} and x_t.shape == (8, 3, 32, 32)


def test_muon_steps_on_the_card(fake_cuda):
    kernels = [module.weight for module in fake_cuda.modules() if isinstance(module, torch.nn.Conv2d)]
    optimizer = scriptc.Muon(kernels, torch.zeros((), device=CUDA))
    for kernel in kernels:
        kernel.grad = torch.zeros_like(kernel)
    optimizer.step()
    assert {optimizer.state[kernel]["momentum"].device for kernel in kernels} == {CUDA}


def test_more_processes_than_cards_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(scriptc.UserError, match="--nproc_per_node=1"):
        scriptc.choose_device(None)


def test_images_are_copied_to_an_apple_gpu_before_their_memory_is_freed(monkeypatch):
    copies, real_to = [], torch.Tensor.to

    def to(self, device, **options):
        copies.append(options)
        return real_to(self, "cpu")

    faces = scriptc.Faces(torch.zeros(10, 16, 16, 3, dtype=torch.uint8).numpy(), torch.device("mps"))
    monkeypatch.setattr(torch.Tensor, "to", to)
    x_0 = faces.batch(torch.arange(4))
    assert copies and not any(options.get("non_blocking") for options in copies)
    assert x_0.is_contiguous()  # and not channels_last, which is slow there
