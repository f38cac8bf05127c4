"""The formulas: what scriptc.py computes is what the papers say."""

import math

import pytest
import torch

import scriptc


def random_network(channels=(8, 16, 24), image_size=32, timesteps=1000):
    """A SimpleUnet none of whose weights is zero, as it is after training."""
    torch.manual_seed(1)
    model = scriptc.SimpleUnet(channels, image_size, timesteps)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model.eval().requires_grad_(False)


class Knows(torch.nn.Module):
    """Predicts the noise exactly, for data whose pixels are independent and normal with this mean and deviation."""

    def __init__(self, mean, deviation, image_size=16, timesteps=1000):
        super().__init__()
        self.image_size, self.timesteps = image_size, timesteps
        self.mean, self.deviation = torch.nn.Parameter(torch.tensor(mean)), deviation
        self.alphas_cumprod = torch.cumprod(1 - scriptc.linear_beta_schedule(timesteps), 0)

    def forward(self, x, t):
        a = self.alphas_cumprod[t][:, None, None, None].sqrt()
        b = (1 - a**2).sqrt()
        x_0 = self.mean + a * self.deviation**2 / (a**2 * self.deviation**2 + b**2) * (x - a * self.mean)
        return (x - a * x_0) / b


# The schedule and the forward process


@pytest.mark.parametrize("timesteps", [10, 11, 20, 50, 100, 300, 1000, 4000, 10_000])
def test_the_last_step_leaves_less_than_a_ten_thousandth_of_the_image(timesteps):
    betas = scriptc.linear_beta_schedule(timesteps)
    assert betas.shape == (timesteps,) and betas.dtype in (torch.float32, torch.float64)
    assert betas.min() > 0 and betas.max() < 1
    assert torch.cumprod(1 - betas.double(), 0)[-1] < 1e-4


def test_betas_rise_linearly_and_are_the_papers_at_a_thousand_steps():
    betas = scriptc.linear_beta_schedule(1000)
    assert betas[0].item() == pytest.approx(1e-4) and betas[-1].item() == pytest.approx(0.02)
    assert torch.allclose(betas.diff(), betas.diff()[0])


def test_closed_form_equals_the_step_by_step_chain():
    timesteps, count = 100, 40_000
    betas = scriptc.linear_beta_schedule(timesteps)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    stream = torch.Generator().manual_seed(0)
    x = torch.full((count,), 0.7, dtype=torch.float64)
    for t, beta in enumerate(betas):
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(count, generator=stream, dtype=torch.float64)
        if t in (0, 9, 49, 99):
            x_0 = torch.full((count, 1, 1, 1), 0.7, dtype=torch.float64)
            at_once, _ = scriptc.forward_diffusion(x_0, torch.full((count,), t), alphas_cumprod)
            assert at_once.mean().item() == pytest.approx(x.mean().item(), abs=0.02)
            assert at_once.std().item() == pytest.approx(x.std().item(), rel=0.02)


def test_forward_diffusion_returns_the_noise_it_mixed_in():
    alphas_cumprod = torch.cumprod(1 - scriptc.linear_beta_schedule(1000), 0).float()
    x_0, t = torch.rand(3, 3, 8, 8) * 2 - 1, torch.tensor([0, 500, 999])
    x_t, noise = scriptc.forward_diffusion(x_0, t, alphas_cumprod)
    a = alphas_cumprod[t][:, None, None, None]
    assert torch.allclose(a.sqrt() * x_0 + (1 - a).sqrt() * noise, x_t)
    given = torch.ones_like(x_0)
    assert scriptc.forward_diffusion(x_0, t, alphas_cumprod, given)[1] is given


def test_timesteps_are_drawn_such_that_the_log_signal_to_noise_ratio_has_a_normal_density():
    for size, mean in ((32, scriptc.DENSITY_MEAN), (64, scriptc.DENSITY_MEAN - math.log(4))):
        probability = scriptc.timestep_probabilities(4000, size)
        a = torch.cumprod(1 - scriptc.linear_beta_schedule(4000), 0)
        log_snr = torch.log(a / (1 - a))
        assert probability.shape == (4000,) and probability.sum().item() == pytest.approx(1)
        for below in (mean - 2, mean, mean + 2):
            expected = 0.5 * math.erfc((mean - below) / scriptc.DENSITY_DEVIATION / 2**0.5)
            assert probability[log_snr < below].sum().item() == pytest.approx(expected, abs=0.03)


def test_training_draws_its_timesteps_from_that_density():
    settings = scriptc.read_settings(["--image-size", "16", "--channels", "8", "--batch-size", "32"])
    run = scriptc.Run(settings, torch.device("cpu"))
    drawn = []
    for run.progress.step in range(60):
        _, t, noise = scriptc.random_draws(run, 32)
        drawn.append(t)
    assert noise.shape == (32, 3, 16, 16) and not torch.equal(drawn[0], drawn[1])
    quantiles = scriptc.timestep_probabilities(1000, 16).cumsum(0)
    for t in (10, 100, 300, 600):
        assert (torch.cat(drawn) <= t).double().mean().item() == pytest.approx(quantiles[t].item(), abs=0.02)


# The network


def test_embeddings_are_sines_and_cosines_of_geometric_wavelengths():
    embeddings = scriptc.SinusoidalPositionEmbeddings(8)(torch.tensor([0, 1, 250]))
    assert embeddings.shape == (3, 8)
    for row, t in zip(embeddings, (0, 1, 250)):
        angles = [t / 10_000 ** (i / 3) for i in range(4)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert row.tolist() == pytest.approx(expected, abs=1e-4)


def test_embeddings_tell_all_timesteps_apart():
    embeddings = scriptc.SinusoidalPositionEmbeddings(32)(torch.arange(1000))
    assert torch.cdist(embeddings, embeddings).fill_diagonal_(1).min() > 1e-3


@pytest.mark.parametrize("size", [32, 48, 64, 128])
@pytest.mark.parametrize("channels", [(8,), (8, 16), (16, 8, 24, 32)])
def test_the_predicted_noise_has_the_shape_of_the_image(size, channels):
    model = scriptc.SimpleUnet(channels, size)
    assert model(torch.randn(2, 3, size, size), torch.tensor([0, 999])).shape == (2, 3, size, size)


def test_every_skip_connection_is_used():
    model = random_network()
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([10])  # where little noise is, and little of x is passed to the output
    whole = model(x, t)
    for block in model.up:

        def cut(_, inputs):
            features, time = inputs
            own, skip = features.chunk(2, dim=1)
            return torch.cat((own, torch.zeros_like(skip)), dim=1), time

        with_cut = block.register_forward_pre_hook(cut)
        assert not torch.allclose(model(x, t), whole, atol=1e-3)
        with_cut.remove()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_network_fits_every_size(device):
    for size in range(16, 257, 16):
        assert size % 2 ** (len(scriptc.default_channels(torch.device(device), size)) - 1) == 0


def test_every_block_is_told_the_time():
    model = random_network().requires_grad_(True)
    model(torch.randn(2, 3, 32, 32), torch.tensor([10, 700])).square().mean().backward()
    blocks = [module for module in model.modules() if isinstance(module, scriptc.Block)]
    assert len(blocks) >= 8 and all(block.time_projection.weight.grad.abs().max() > 0 for block in blocks)


def test_the_whole_image_is_seen_from_the_middle():
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    random_network((8, 8, 8, 8), 64)(x, torch.tensor([500]))[0, :, 32, 32].sum().backward()
    assert x.grad[0, :, 0, 0].abs().max() > 0 and x.grad[0, :, 63, 63].abs().max() > 0


def test_at_the_noisy_end_the_input_itself_is_the_first_guess_of_the_noise():
    x = torch.randn(4, 3, 32, 32)
    assert torch.allclose(scriptc.SimpleUnet((8, 16), 32)(x, torch.full((4,), 999)), x, atol=0.01)


# Sampling


@pytest.mark.parametrize("sampler", scriptc.SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_samplers_find_the_only_image_there_is(sampler, steps):
    images = scriptc.sample(Knows(0.4, 0.0), 2, steps, sampler)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32
    assert torch.allclose(images, torch.full_like(images, 0.4), atol=1e-4)


@pytest.mark.parametrize("sampler", scriptc.SAMPLERS)
def test_samples_have_the_mean_and_the_spread_of_the_data(sampler):
    images = scriptc.sample(Knows(0.2, 0.15), 16, 100, sampler)
    assert images.mean().item() == pytest.approx(0.2, abs=0.02)
    assert images.std().item() == pytest.approx(0.15, rel=0.1)


def test_a_sampler_of_order_2_is_nearer_to_the_limit_of_many_steps():
    model = Knows(0.2, 0.15)
    exact = scriptc.sample(model, 4, 1000, "ddim")
    error = {sampler: (scriptc.sample(model, 4, 12, sampler) - exact).norm() for sampler in ("ddim", "dpm++")}
    assert error["dpm++"] < 0.7 * error["ddim"]


def test_ddpm_is_the_ancestral_sampling_of_ho_et_al():
    model = random_network(image_size=16, timesteps=20)
    betas = scriptc.linear_beta_schedule(20)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    stream = scriptc.generator("sample", 3, 0)
    x = torch.randn(1, 3, 16, 16, generator=stream)
    for t in reversed(range(20)):
        noise = model(x, torch.tensor([t]))
        x_0 = ((x - (1 - alphas_cumprod[t]).sqrt() * noise) / alphas_cumprod[t].sqrt()).clamp(-1, 1)
        before = alphas_cumprod[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
        mean = (before.sqrt() * betas[t] / (1 - alphas_cumprod[t]) * x_0
                + (1 - betas[t]).sqrt() * (1 - before) / (1 - alphas_cumprod[t]) * x)  # equation 7
        variance = (1 - before) / (1 - alphas_cumprod[t]) * betas[t]
        x = (mean + variance.sqrt() * (torch.randn(1, 3, 16, 16, generator=stream) if t else 0)).float()
    assert torch.allclose(scriptc.sample(model, 1, 20, "ddpm", seed=3), x, atol=1e-4)


def test_an_image_is_the_same_however_many_are_drawn_with_it():
    model = random_network(image_size=16)
    five = scriptc.sample(model, 5, 4, seed=7)
    assert torch.allclose(scriptc.sample(model, 2, 4, seed=7, first=3), five[3:], atol=1e-5)
    assert not torch.allclose(scriptc.sample(model, 5, 4, seed=8), five, atol=1e-2)
    assert torch.equal(scriptc.sample(model, 5, 4, seed=7), five)


def test_sampling_from_given_noise_is_sampling_from_the_noise_of_the_seed():
    model = random_network(image_size=16)
    noise = scriptc.randn([scriptc.generator("sample", 7, number) for number in range(3)], 16)
    assert torch.equal(scriptc.sample(model, noise=noise), scriptc.sample(model, 3, seed=7))


# The optimizer


def orthogonalized_one_by_one(x):
    """Newton-Schulz iterations on one matrix, as the paper writes them."""
    x = x / (x.norm() + 1e-7)
    for a, b, c in scriptc.NEWTON_SCHULZ:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(8, 16), (16, 8)])
def test_matrices_are_orthogonalized_together_as_one_by_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    together = scriptc.orthogonalize(matrices, torch.float32)
    for matrix, found in zip(matrices, together):
        assert torch.allclose(found, orthogonalized_one_by_one(matrix), atol=1e-4)
        assert (torch.linalg.svdvals(found) - 1).abs().max() < 0.4


@pytest.mark.parametrize("precision, most", [("bf16", 0.05), ("fp16", 0.01)])
def test_matrices_are_orthogonalized_in_low_precision_almost_as_well(precision, most):
    matrices = torch.randn(2, 64, 576, generator=torch.Generator().manual_seed(0))
    found = scriptc.orthogonalize(matrices, scriptc.DTYPES[precision]).float()
    exact = scriptc.orthogonalize(matrices.double(), torch.float64).float()
    assert (found - exact).norm() < most * exact.norm()


def test_muon_updates_kernels_of_equal_shape_together_as_one_by_one():
    stream = torch.Generator().manual_seed(0)
    kernels = [torch.nn.Parameter(torch.randn(8, 4, 3, 3, generator=stream).to(memory_format=torch.channels_last))
               for _ in range(3)]
    expected = [kernel.detach().clone() for kernel in kernels]
    optimizer = scriptc.Muon(kernels, 0.01)
    momentum = [torch.zeros(8, 36) for _ in kernels]
    for _ in range(3):
        for number, kernel in enumerate(kernels):
            kernel.grad = torch.randn(8, 4, 3, 3, generator=stream).to(memory_format=torch.channels_last)
            gradient = kernel.grad.permute(0, 2, 3, 1).flatten(1)
            momentum[number] = 0.9 * momentum[number] + 0.1 * gradient
            update = orthogonalized_one_by_one(0.1 * gradient + 0.9 * momentum[number])
            expected[number] -= 0.01 * 0.2 * 6 * update.view(8, 3, 3, 4).permute(0, 3, 1, 2)
        optimizer.step()
    assert all(torch.allclose(kernel, other, atol=1e-5) for kernel, other in zip(kernels, expected))


def test_a_step_that_found_no_finite_gradient_changes_neither_weights_nor_momentum():
    kernel = torch.nn.Parameter(torch.ones(8, 4, 3, 3))
    optimizer = scriptc.Muon([kernel], 0.01)
    kernel.grad = torch.rand(8, 4, 3, 3)
    optimizer.step()
    before, momentum = kernel.detach().clone(), optimizer.state[kernel]["momentum"].clone()
    kernel.grad = torch.full_like(kernel, math.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(kernel, before) and torch.equal(optimizer.state[kernel]["momentum"], momentum)


# The sample distance


def pictures(count, seed):
    """Smooth random pictures (count, 3, 32, 32) in [-1, 1] and Faces of them."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    images = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear").clamp(-1, 1)
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return images, scriptc.Faces(pixels, range(count), torch.device("cpu"))


def test_the_sample_distance_is_1_for_new_images_of_the_same_kind_and_more_for_others():
    _, faces = pictures(400, 0)
    real = scriptc.RealFaces(faces, torch.arange(400))
    same = pictures(64, 1)[0]
    distance = real.sample_distance(same)
    assert distance == pytest.approx(1, abs=0.15)
    assert real.sample_distance(same * 0.5) > 1.25 * distance  # too little variation
    assert real.sample_distance(same + 0.3) > 1.5 * distance  # other colours
    assert real.sample_distance(same[:1].expand(64, 3, 32, 32)) > 1.5 * distance  # one image for all
    grain = 0.05 * torch.randn(same.shape, generator=torch.Generator().manual_seed(2))
    assert real.sample_distance(same + grain) > 1.5 * distance
    blurred = torch.nn.functional.avg_pool2d(same, 3, 1, 1)
    assert real.sample_distance(blurred) > 1.1 * distance


def test_the_frechet_distance_is_that_of_the_covariances():
    real = scriptc.RealFaces(pictures(400, 0)[1], torch.arange(400)).seen
    seen = scriptc.RealFaces.reduce(pictures(64, 1)[0])
    expected = []
    for cells, others in zip(seen.flatten(2), torch.cat((real, real.flip(4)), dim=1).flatten(2)):
        one, two = cells.T.cov(correction=0), others.T.cov(correction=0)
        root = torch.linalg.eigvals(one @ two).real.clamp(min=0).sqrt().sum()
        expected.append((cells.mean(0) - others.mean(0)).square().sum() + one.trace() + two.trace() - 2 * root)
    assert scriptc.frechet_distance(seen, real).tolist() == pytest.approx([value.item() for value in expected], rel=1e-3)
