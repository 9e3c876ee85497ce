"""The toy world: EDM in ladd's time, its samplers, the teacher's training, the data, the judge and the variants."""

import colorsys
import copy
import dataclasses
import json
import math
import os
import shutil
import struct
import types
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn

import ladd
from test_core import bad_values, mangled
from toy_mnist import data as toy_data
from toy_mnist import judge as toy_judge
from toy_mnist import teacher, variants
from toy_mnist import world as toy_world
from toy_mnist.data import ColorMNIST, colour, hue_to_rgb, image_hue, load_mnist, rgb_to_hue
from toy_mnist.edm import CUNet, EDMVelocity, sample_dpm, sample_heun, sigma_grid, time_grid
from zimage.world import ZImageRecipe

SD = 0.6                                                        # a sigma_data unlike EDM's 0.5


@pytest.fixture
def float64():
    """New tensors are float64, so that what is equal on paper is equal to rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_net(seed=0):
    """A small CUNet in the default dtype whose zero-initialised layers are random too."""
    torch.manual_seed(seed)
    net = CUNet(width=8, emb=32)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net.eval().requires_grad_(False)


def column(s):
    return s[:, None, None, None]


def published_denoiser(F, x, sigma, label, sd=SD):
    """D(x; sigma) as EDM prints it: eq. 7 with the constants of table 1. x [B,3,28,28], sigma [B]"""
    s = column(sigma)
    c_skip, c_out = sd ** 2 / (s ** 2 + sd ** 2), s * sd / torch.sqrt(sd ** 2 + s ** 2)
    c_in, c_noise = 1 / torch.sqrt(s ** 2 + sd ** 2), torch.log(sigma) / 4
    return c_skip * x + c_out * F(c_in * x, c_noise, label)


def noise_and_label(n, seed=1):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 28, 28, generator=gen), torch.arange(n) % 11


class Counting:
    """A velocity that keeps the times it was asked for."""

    def __init__(self, velocity):
        self.velocity, self.times = velocity, []

    def __call__(self, x_t, t, cond):
        assert (t == t[0]).all()
        self.times.append(float(t[0]))
        return self.velocity(x_t, t, cond)


# ---- EDM's preconditioning --------------------------------------------------------------------------------------------

def test_velocity_is_edms_denoiser_at_every_noise_level(float64):
    net = random_net()
    sigma = torch.logspace(math.log10(0.002), math.log10(80), 12)
    sigma[0], sigma[-1] = 0.002, 80.0
    eps, label = noise_and_label(12)
    x = 0.5 * torch.randn(12, 3, 28, 28) + column(sigma) * eps
    t, x_t = sigma / (1 + sigma), x / column(1 + sigma)
    expected = (x_t - published_denoiser(net, x, sigma, label)) / column(t)
    torch.testing.assert_close(EDMVelocity(net, SD)(x_t, t, label), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t, told", [(0.0, 0.002), (1e-5, 0.002), (0.002 / 1.002, 0.002), (0.5, 1.0), (80 / 81, 80), (0.999, 80), (1.0, 80)])
def test_the_network_is_told_the_nearest_trained_sigma(float64, t, told):
    asked = []

    def net(x, c_noise, label):
        asked.append(c_noise)
        return torch.sin(x)
    x_t, label = noise_and_label(3)
    v = EDMVelocity(NetModule(net), SD)(x_t, torch.full((3,), t), label)
    assert torch.isfinite(v).all()
    torch.testing.assert_close(asked[0], torch.full((3,), math.log(told) / 4), rtol=1e-9, atol=1e-9)
    if 0 < t < 1:                               # the preconditioning itself stays at the true sigma
        s = t / (1 - t)
        D = SD ** 2 / (s ** 2 + SD ** 2) * x_t / (1 - t) + s * SD / math.hypot(s, SD) * torch.sin(x_t / (1 - t) / math.hypot(s, SD))
        torch.testing.assert_close(v, (x_t - D) / t, rtol=1e-8, atol=1e-8)


class NetModule(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def test_velocity_at_pure_noise_is_the_limit(float64):
    net, (x_t, label) = random_net(), noise_and_label(4)
    v = EDMVelocity(net, SD)(x_t, torch.ones(4), label)
    torch.testing.assert_close(v, x_t - SD * net(x_t, torch.full((4,), math.log(80) / 4), label), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_velocity_in_float32_is_float32_and_finite_at_the_ends(t):
    x_t, label = noise_and_label(2)
    v = EDMVelocity(random_net(), SD)(x_t, torch.full((2,), t), label)
    assert v.dtype == torch.float32 and v.isfinite().all()


class StubWorld(ladd.World):
    """The least that `ladd.State` needs."""
    shape, cond_dim = (3, 28, 28), 10

    def __init__(self, velocity):
        self.teacher, self.tap_root = velocity, velocity.net

    def head_cond(self, cond):
        return nn.functional.one_hot(cond, 10).float()

    def read(self, start, count):
        x, label = noise_and_label(count)
        return x, label % 10, x


@pytest.mark.parametrize("t", [1.0, 0.75, 0.5, 0.25])
def test_the_student_at_step_0_guesses_what_edms_denoiser_gives(t):
    net = random_net()
    state = ladd.State(StubWorld(EDMVelocity(net, SD)), ladd.Recipe(taps=("mid.1",), head_width=8), torch.device("cpu"))
    student, net = state.student.double().eval(), copy.deepcopy(net).double()
    x0, label = noise_and_label(4, seed=2)
    eps, _ = noise_and_label(4, seed=3)
    x_t = ((1 - t) * x0 + t * eps).double()
    times = torch.full((4,), t, dtype=torch.float64)
    with torch.no_grad():
        guess = ladd.velocity_to_x0(x_t, student(x_t, times, label), times)
    if t < 1:
        expected = published_denoiser(net, x_t / (1 - t), times / (1 - times), label)
    else:
        expected = SD * net(x_t, torch.full((4,), math.log(80) / 4, dtype=torch.float64), label)
    torch.testing.assert_close(guess, expected, rtol=1e-9, atol=1e-9)


# ---- samplers ---------------------------------------------------------------------------------------------------------

def test_sigma_grid_by_hand():
    assert sigma_grid(1).tolist() == [80]
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    np.testing.assert_allclose(sigma_grid(3).numpy(), [80, middle, 0.002], rtol=1e-12)
    np.testing.assert_allclose(sigma_grid(18)[[0, 1, 2, 3, -1]].numpy(), [80, 57.586, 40.786, 28.375, 0.002], rtol=2e-5)
    np.testing.assert_allclose(time_grid(3), [80 / 81, middle / (1 + middle), 0.002 / 1.002], rtol=1e-12)


def edm_sigmas(n):
    """EDM eq. 5, in plain Python, with the final 0."""
    if n == 1:
        return [80.0, 0.0]
    return [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)] + [0.0]


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_euler_in_t_is_edms_euler_in_sigma(float64, n):
    net, (noise, label), sigmas = random_net(), noise_and_label(3), edm_sigmas(n)
    x = noise * sigmas[0]
    for a, b in zip(sigmas, sigmas[1:]):
        x = x + (b - a) * (x - published_denoiser(net, x, torch.full((3,), a), label)) / a
    velocity = Counting(EDMVelocity(net, SD))
    torch.testing.assert_close(ladd.sample_euler(velocity, noise, time_grid(n), label), x, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(velocity.times, [s / (1 + s) for s in sigmas[:-1]], rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_heun_is_edms_algorithm_1(float64, n):
    net, (noise, label), t = random_net(), noise_and_label(3), edm_sigmas(n)
    D = lambda x, sigma: published_denoiser(net, x, torch.full((3,), sigma), label)
    x = t[0] * noise
    for i in range(n):
        d = (x - D(x, t[i])) / t[i]
        euler = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_prime = (euler - D(euler, t[i + 1])) / t[i + 1]
            euler = x + (t[i + 1] - t[i]) * (d / 2 + d_prime / 2)
        x = euler
    velocity = Counting(EDMVelocity(net, SD))
    torch.testing.assert_close(sample_heun(velocity, noise, n, label), x, rtol=1e-8, atol=1e-8)
    assert len(velocity.times) == 2 * n - 1


@pytest.mark.parametrize("n", [1, 4, 20])
def test_dpm_solver_is_diffusers_own_run_of_a_preconditioned_network(float64, n):
    from diffusers import EDMDPMSolverMultistepScheduler
    net, (noise, label) = random_net(), noise_and_label(2)
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=SD, rho=7.0, solver_order=2)
    scheduler.set_timesteps(n)
    x = noise * 80
    for c_noise in scheduler.timesteps:
        F = net(scheduler.scale_model_input(x, c_noise), c_noise.double().repeat(2), label)
        x = scheduler.step(F, c_noise, x).prev_sample
    velocity = Counting(EDMVelocity(net, SD))
    made = sample_dpm(velocity, noise, n, label, sd=SD)
    torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-4)
    assert len(velocity.times) == n and made.std() > 0.1
    torch.testing.assert_close(sample_dpm(velocity, noise, n, label), made, rtol=1e-4, atol=1e-4)      # another sd, the same samples


@pytest.mark.parametrize("sampler, tolerance", [
    (lambda v, z, y: ladd.sample_euler(v, z, time_grid(200), y), 0.03),
    (lambda v, z, y: sample_heun(v, z, 200, y), 1e-3),
    (lambda v, z, y: sample_dpm(v, z, 60, y), 1e-2)], ids=["euler", "heun", "dpm"])
def test_samplers_solve_the_ode_of_gaussian_data(float64, sampler, tolerance):
    """With F = 0 the denoiser is exact for N(0, sd^2), and the flow ends at sd / sqrt(80^2 + sd^2) * 80 * noise."""
    velocity = EDMVelocity(NetModule(lambda x, c_noise, label: torch.zeros_like(x)), SD)
    noise, label = noise_and_label(2)
    expected = noise * 80 * SD / math.hypot(80, SD)
    assert (sampler(velocity, noise, label) - expected).norm() < tolerance * expected.norm()


# ---- the teacher's training -------------------------------------------------------------------------------------------

def test_edm_loss_is_the_weighted_denoising_error(float64):
    net, (eps, label) = random_net(), noise_and_label(5)
    x0 = 0.5 * torch.randn(5, 3, 28, 28)
    sigma = torch.tensor([0.002, 0.1, 1.0, 7.0, 80.0])
    D = published_denoiser(net, x0 + column(sigma) * eps, sigma, label)
    lam = (sigma ** 2 + SD ** 2) / (sigma * SD) ** 2
    expected = lam * ((D - x0) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(teacher.edm_loss(EDMVelocity(net, SD), x0, label, sigma, eps), expected, rtol=1e-8, atol=1e-10)


def test_training_sigmas_follow_their_mixture_and_reach_both_ends():
    sigma = teacher.draw_sigma(200_000, torch.Generator().manual_seed(0))
    assert 0.002 <= sigma.min() and sigma.max() <= 80.0001
    below = lambda s: (teacher.UNIFORM_SHARE * math.log(s / 0.002) / math.log(80 / 0.002)
                       + (1 - teacher.UNIFORM_SHARE) * 0.5 * (1 + math.erf((math.log(s) - teacher.P_MEAN) / teacher.P_STD / 2 ** 0.5)))
    for s in (0.004, 0.1, 1.0, 10.0, 40.0):
        assert float((sigma <= s).double().mean()) == pytest.approx(below(s), abs=0.004)
    assert (sigma < 0.003).any() and (sigma > 70).sum() > 100       # the student starts at t = 1, so that end must be trained


def test_labels_are_dropped_and_the_batch_is_keyed_by_its_step():
    data = fake_digits(40)
    a, again, other = (teacher.batch_at(data, step, 400, 0) for step in (3, 3, 4))
    assert all(map(torch.equal, a, again)) and not torch.equal(a[3], other[3])
    assert 0.05 < float((a[1] == 10).float().mean()) < 0.2


def test_loss_by_sigma_of_an_untrained_network():
    """With F = 0 and D = c_skip x the expected loss is lambda ((1 - c_skip)^2 E x0^2 + (c_skip sigma)^2)."""
    data = fake_digits(40)
    table = teacher.loss_by_sigma(EDMVelocity(CUNet(width=8, emb=32), SD), data, per_sigma=48)
    assert min(table) == 0.002 and max(table) == 80 and len(table) >= 8
    m2 = float(data.batch(torch.arange(40), torch.zeros(40, dtype=torch.long))[0].square().mean())
    for s, loss in table.items():
        c_skip, lam = SD ** 2 / (s ** 2 + SD ** 2), (s ** 2 + SD ** 2) / (s * SD) ** 2
        assert loss == pytest.approx(lam * ((1 - c_skip) ** 2 * m2 + (c_skip * s) ** 2), rel=0.05)


def grey_digits(n, seed=0):
    """Digit-like pictures: one bright bar per label, shifted at random. uint8 [n, 28, 28], labels [n]"""
    gen = torch.Generator().manual_seed(seed)
    grey, label = torch.zeros(n, 28, 28, dtype=torch.uint8), torch.arange(n) % 10
    for i in range(n):
        y, x = torch.randint(4, 10, (2,), generator=gen).tolist()
        grey[i, y:y + 12, x + int(label[i]):x + int(label[i]) + 3] = int(torch.randint(150, 256, (1,), generator=gen))
    return grey, label


def fake_digits(n, seed=0):
    return ColorMNIST(*grey_digits(n), seed=seed)


def write_mnist(root, train, test):
    """MNIST's own files, as torchvision reads them, with made-up digits."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", train), ("t10k", test)):
        grey, label = grey_digits(n, seed=len(part))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + grey.numpy().tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + label.byte().numpy().tobytes())
    return root


@pytest.fixture(scope="module")
def mnist_root(tmp_path_factory):
    return write_mnist(tmp_path_factory.mktemp("mnist"), 300, 60)


def test_teacher_training_resumed_is_training_never_stopped(mnist_root, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "loss_by_sigma", lambda *args: {})
    train = lambda out: teacher.main(["--data-root", str(mnist_root), "--steps", "6", "--batch", "8", "--width", "8", "--checkpoint-every",
                                      "3", "--run", str(tmp_path / "run"), "--out", str(tmp_path / out)])
    train("whole")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert [int(p.name[5:]) for p in checkpoints] == [3, 6]
    (checkpoints[1] / "complete.json").unlink()                     # as a kill while the second was being written leaves it
    train("resumed")
    whole, resumed = ((tmp_path / out / "teacher.safetensors").read_bytes() for out in ("whole", "resumed"))
    assert whole == resumed

    velocity, about = toy_world.load_teacher(tmp_path / "whole", torch.device("cpu"))
    digits = ColorMNIST(*load_mnist(mnist_root))
    x0 = digits.batch(torch.arange(300), torch.zeros(300, dtype=torch.long))[0]
    assert velocity.sigma_data == pytest.approx(float(x0.std()), abs=1e-3)
    assert about["config"]["width"] == 8 and about["figures"]["steps"] == 6 and "--steps 6" in about["command"]


def test_teacher_training_learns(mnist_root, tmp_path, monkeypatch):
    """The written weights denoise far better than none (F = 0) at strong noise, where the data's mean already helps most."""
    monkeypatch.setattr(teacher, "loss_by_sigma", lambda *args: {})
    teacher.main(["--data-root", str(mnist_root), "--steps", "60", "--batch", "16", "--width", "8", "--lr", "0.05",
                  "--run", str(tmp_path / "run"), "--out", str(tmp_path)])
    trained, _ = toy_world.load_teacher(tmp_path, torch.device("cpu"))
    x0, label = ColorMNIST(*load_mnist(mnist_root)).batch(torch.arange(64), torch.ones(64, dtype=torch.long))
    eps, _ = noise_and_label(64)
    with torch.no_grad():
        losses = [float(teacher.edm_loss(v, x0, label, torch.full((64,), 20.0), eps).mean())
                  for v in (trained, EDMVelocity(CUNet(width=8), trained.sigma_data))]
    assert losses[0] < 0.5 * losses[1]


# ---- data -------------------------------------------------------------------------------------------------------------

def test_hue_and_rgb_agree_with_colorsys():
    hue = torch.linspace(0, 0.999, 500)
    expected = torch.tensor([colorsys.hsv_to_rgb(h, 1, 1) for h in hue.tolist()])
    torch.testing.assert_close(hue_to_rgb(hue), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(rgb_to_hue(expected), hue, rtol=0, atol=1e-5)
    rgb = torch.rand(200, 3)
    torch.testing.assert_close(rgb_to_hue(rgb), torch.tensor([colorsys.rgb_to_hsv(*c)[0] for c in rgb.tolist()]), rtol=0, atol=1e-4)
    assert rgb_to_hue(torch.tensor([[0.0, 0, 0], [0.4, 0.4, 0.4]])).tolist() == [0, 0]


def test_painted_digits_keep_their_range_ground_and_hue():
    grey, _ = grey_digits(50)
    hue = torch.linspace(0, 0.98, 50)
    x = colour(grey.float() / 255, hue)
    assert x.shape == (50, 3, 28, 28) and x.min() == -1 and 0 < x.max() <= 1
    assert (x[grey[:, None].expand_as(x) == 0] == -1).all()
    torch.testing.assert_close(image_hue(x), hue, rtol=0, atol=1e-4)
    brightest = (x.amax((1, 2, 3)) + 1) / 2
    torch.testing.assert_close(brightest, grey.amax((1, 2)) / 255, rtol=0, atol=1e-5)


def test_a_batch_is_keyed_by_seed_epoch_and_index():
    data, index = fake_digits(30), torch.arange(30)
    epoch = torch.full((30,), 2)
    x, label = data.batch(index, epoch)
    assert torch.equal(label, index % 10)
    some = torch.tensor([7, 3, 21])
    assert torch.equal(data.batch(some, torch.tensor([2, 2, 2]))[0], x[some])                 # whatever else is in the batch
    mixed = data.batch(torch.tensor([7, 7]), torch.tensor([2, 5]))[0]
    assert torch.equal(mixed[0], x[7]) and not torch.equal(mixed[1], x[7])                    # painted anew every epoch
    assert not torch.equal(fake_digits(30, seed=1).batch(index, epoch)[0], x)
    assert toy_judge.entropy(fake_digits(20_000 // 10).hues(), bins=10) > 0.99                   # uniform hues


def test_missing_mnist_names_both_ways_to_give_it(tmp_path, monkeypatch):
    def no_network(self):
        raise URLError("no network")
    monkeypatch.setattr("torchvision.datasets.MNIST.download", no_network)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LADD_DATA", raising=False)
    for root, environment in ((None, None), (tmp_path / "nothing", None), (None, str(tmp_path / "void"))):
        if environment:
            monkeypatch.setenv("LADD_DATA", environment)
        with pytest.raises(ladd.UserError, match="--data-root.*LADD_DATA") as error:
            load_mnist(root)
        assert "\n" not in str(error.value)
        assert str(root or environment or "data") in str(error.value)


def test_ladd_data_and_data_root_name_the_folder(mnist_root, tmp_path, monkeypatch):
    monkeypatch.setenv("LADD_DATA", str(mnist_root))
    grey, label = load_mnist()
    assert grey.shape == (300, 28, 28) and torch.equal(label, torch.arange(300) % 10)
    assert len(load_mnist(train=False)[0]) == 60
    monkeypatch.setenv("LADD_DATA", str(tmp_path))
    assert torch.equal(load_mnist(mnist_root)[0], grey)


# ---- the judge --------------------------------------------------------------------------------------------------------

def exact_normal(n, d, mean, scale, seed):
    """n points whose sample mean and covariance are exactly `mean` and diag(scale^2)."""
    z = np.random.default_rng(seed).standard_normal((n, d))
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z, rowvar=False))).T
    return mean + z * scale


def test_frechet_of_diagonal_gaussians_is_the_closed_form():
    m1, m2 = np.array([0.0, 1, 2, 3, 4]), np.array([1.0, 1, 0, 3, 4])
    s1, s2 = np.array([1, 2, 0.5, 1, 3]), np.array([2, 2, 1.5, 0.1, 1])
    a, b = exact_normal(300, 5, m1, s1, 0), exact_normal(200, 5, m2, s2, 1)
    assert toy_judge.frechet(a, b) == pytest.approx(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum(), rel=1e-8)
    assert toy_judge.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_of_correlated_samples_by_eigenvalues():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((400, 16)) @ rng.standard_normal((16, 16)) + rng.standard_normal(16) for _ in range(2))
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(A @ B).real).sum()             # tr sqrt(AB) = sum of the roots of AB's eigenvalues
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * root
    assert toy_judge.frechet(a.astype(np.float32), torch.tensor(b)) == pytest.approx(expected, rel=1e-5)


def test_kernel_is_the_unbiased_cubic_estimate_on_whole_sets():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 6)), rng.standard_normal((40, 6)) + 0.5
    k = lambda p, q: (p @ q / 6 + 1) ** 3
    within = lambda s: np.mean([k(s[i], s[j]) for i in range(40) for j in range(40) if i != j])
    expected = within(x) + within(y) - 2 * np.mean([k(p, q) for p in x for q in y])
    assert toy_judge.kernel(x, y) == pytest.approx(expected, rel=1e-4)     # subsets of 40 of 40 are the sets themselves


def test_kernel_is_seeded_and_leaves_numpys_generator_alone():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1500, 4)), rng.standard_normal((1200, 4))
    np.random.seed(5)
    expected = np.random.rand(3)
    np.random.seed(5)
    first = toy_judge.kernel(x, y, subsets=3)
    assert np.array_equal(np.random.rand(3), expected)
    assert toy_judge.kernel(x, y, subsets=3) == first != toy_judge.kernel(x, y, subsets=3, seed=1)


def test_entropy_of_hues():
    assert toy_judge.entropy((torch.arange(3600) + 0.5) / 3600) == pytest.approx(1, abs=1e-6)
    assert toy_judge.entropy(torch.full((100,), 0.3)) == 0
    assert toy_judge.entropy(torch.tensor([0.1, 0.1, 0.6, 0.6])) == pytest.approx(math.log(2) / math.log(36))


def test_hue_spread_per_class():
    hue = torch.tensor([0.3, 0.3, 0.0, 0.25, 0.0, 0.5, 0.9, 0.1])
    label = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    spread = toy_judge.hue_spread(hue, label)
    assert spread == {0: pytest.approx(0, abs=1e-6), 1: pytest.approx(1 - 2 ** -0.5, abs=1e-6), 2: pytest.approx(1, abs=1e-6),
                      3: pytest.approx(1 - math.cos(0.2 * math.pi), abs=1e-6)}      # across red, where hues wrap


@pytest.fixture(scope="module")
def shipped_judge():
    return toy_judge.Judge()


def test_shipped_features_have_no_dead_unit_and_full_rank(shipped_judge):
    reference = shipped_judge.reference.astype(np.float64)
    assert reference.shape == (10_000, 128) and np.isfinite(reference).all()
    assert reference.std(0).min() > 0.1
    assert np.linalg.matrix_rank(np.cov(reference, rowvar=False)) == 128


def test_shipped_floor_falls_with_the_number_of_images(shipped_judge):
    floor = {int(n): f for n, f in shipped_judge.floor.items()}
    assert list(floor) == [1000, 2000, 5000, 10000]
    assert 0 < floor[10000] < floor[5000] < floor[2000] < floor[1000] < 5
    assert [shipped_judge.floor_at(n) for n in (500, 1999, 2000, 10 ** 6)] == [(k, floor[k]) for k in (1000, 1000, 2000, 10000)]


def test_shipped_judge_reports_its_figures(shipped_judge):
    figures = shipped_judge.about["figures"]
    assert figures["test_accuracy"] > 0.98 and figures["hue_entropy_real"] > 0.99
    assert sum(figures["class_share"]) == pytest.approx(1, abs=1e-4)
    x, label = fake_digits(200).batch(torch.arange(200), torch.zeros(200, dtype=torch.long))
    judged = shipped_judge(x, label)
    features, logits = shipped_judge.features(x)
    assert judged["n"] == 200 and features.shape == (200, 128)
    assert judged["accuracy"] == pytest.approx(float((logits.argmax(1) == label).double().mean()))
    assert judged["fid"] == pytest.approx(toy_judge.frechet(features.numpy(), shipped_judge.reference))
    assert judged["fid"] > 10 * figures["floor"]["1000"]                # bars are no digits
    assert shipped_judge(x, label, watch=True)["kid"] is None


def test_a_wrong_label_or_colour_shows(shipped_judge):
    grey, label = grey_digits(200)
    x = colour(grey.float() / 255, torch.full((200,), 0.6))
    own = shipped_judge.features(x)[1].argmax(1)
    assert shipped_judge(x, own, watch=True)["accuracy"] == 1 and shipped_judge(x, (own + 1) % 10, watch=True)["accuracy"] == 0
    one_colour = shipped_judge(x, label, watch=True)
    assert one_colour["hue_entropy"] == 0 and one_colour["hue_spread_min"] == pytest.approx(0, abs=1e-4)


def test_judge_training_on_a_few_digits(mnist_root, tmp_path):
    toy_judge.main(["--data-root", str(mnist_root), "--epochs", "1", "--out", str(tmp_path)])
    judge = toy_judge.Judge(tmp_path)
    assert judge.reference.shape == judge.watch_reference.shape == (100, 128) and set(judge.floor) == {"100"}
    assert judge.about["figures"]["class_share"] == pytest.approx([0.1] * 10)
    x, label = fake_digits(200).batch(torch.arange(200), torch.zeros(200, dtype=torch.long))
    assert all(math.isfinite(v) for v in judge(x, label).values())


def judge_files(folder, change=lambda about: None, name="judge", tensors=None):
    """Copies of the shipped judge and reference; `change` edits what one of them says of itself, tensors replaces its contents."""
    for path in [*toy_judge.WEIGHTS.glob("judge.*"), *toy_judge.WEIGHTS.glob("reference.*")]:
        shutil.copy(path, folder)
    path = folder / f"{name}.json"
    about = json.loads(path.read_text())
    if tensors is not None:
        ladd.save_weights(path.with_suffix(".safetensors"), tensors, {k: v for k, v in about.items() if k not in ("schema", "sha256")})
        about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))
    return folder


def put(*keys, value):
    """A change of a JSON: the value under these keys, or without the last of them."""
    def change(about):
        for k in keys[:-1]:
            about = about[k]
        about.pop(keys[-1]) if value is None else about.update({keys[-1]: value})
    return change


@pytest.mark.parametrize("keys, value", [
    (("config",), {"width": "32"}), (("config",), {"depth": 3}), (("config",), [32]), (("config", "width"), 12), (("config", "width"), -8), (("config", "width"), 64),
    (("figures",), 3), (("figures",), {}), (("figures", "floor"), [1]), (("figures", "floor"), {"many": 1}), (("figures", "floor"), {"1000": "low"}),
    (("figures", "watch_floor"), None), (("figures", "hue_entropy_real"), None), (("figures", "hue_entropy_real"), [1]), (("figures", "class_share"), None),
    (("figures", "class_share"), [0.5, 0.5]), (("figures", "class_share"), [0.2] * 10), (("figures", "class_share"), [1.1, -0.1] + [0] * 8),
    (("figures", "class_share"), [math.nan] * 10), (("figures", "class_share"), "0123456789"), (("config",), None), (("figures",), None), (("kind",), "toy teacher")], ids=str)
def test_a_judge_that_says_other_things_of_itself_is_refused(tmp_path, keys, value):
    judge_files(tmp_path)
    toy_judge.Judge(tmp_path)                                           # good as it was
    with pytest.raises(ladd.UserError, match="judge.safetensors") as error:
        toy_judge.Judge(judge_files(tmp_path, put(*keys, value=value)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, count", [("teacher", 150), ("judge", 60)])
def test_mangled_words_about_the_weights_are_one_line_or_do_no_harm(tmp_path, name, count):
    """What a JSON says of its weights is not under their checksum: whatever it holds, the network loads or one line says why not."""
    judge_files(tmp_path), shutil.copy(toy_judge.WEIGHTS / "teacher.safetensors", tmp_path)
    load = {"teacher": lambda: toy_world.load_teacher(tmp_path, "cpu"), "judge": lambda: toy_judge.Judge(tmp_path)}[name]
    refused = 0
    for data in mangled((toy_judge.WEIGHTS / f"{name}.json").read_bytes(), count):
        (tmp_path / f"{name}.json").write_bytes(data)
        try:
            load()
        except ladd.UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert count / 3 < refused


def test_a_reference_of_another_judge_is_refused(tmp_path):
    with pytest.raises(ladd.UserError, match="reference.safetensors: made with another judge"):
        toy_judge.Judge(judge_files(tmp_path, put("figures", "test_accuracy", value=0.5), "reference"))
    with pytest.raises(ladd.UserError, match="reference.safetensors"):
        toy_judge.Judge(judge_files(tmp_path, name="reference", tensors={"features": torch.zeros(9, 128)}))


def test_with_inception_every_floor_is_inceptions_own(tmp_path, monkeypatch):
    """A stand-in for the network, and few digits: 200 of reference, 200 for the floor, 100 for the curve."""
    pixels = lambda x: torch.nn.functional.avg_pool2d(x, 14).flatten(1)
    monkeypatch.setattr(toy_judge, "inception", lambda device: pixels)
    monkeypatch.setattr(toy_judge, "load_mnist", lambda root: grey_digits(500))
    monkeypatch.setattr(toy_judge, "REFERENCE", 200), monkeypatch.setattr(toy_judge, "WATCH", 100), monkeypatch.setattr(toy_judge, "FLOOR_AT", (100, 200))
    judge = toy_judge.Judge(fid="inception")
    images, label = ColorMNIST(*grey_digits(500)).batch(torch.arange(500), torch.full((500,), -2))
    x = pixels(images).numpy()
    assert judge.floor_at(150) == (100, pytest.approx(toy_judge.frechet(x[200:300], x[:200]), rel=1e-6))
    assert judge.watch_floor == pytest.approx(toy_judge.frechet(x[200:400], x[400:]), rel=1e-6)
    assert judge(images[:200], label[:200])["fid"] == pytest.approx(0, abs=1e-6)        # the reference itself
    assert judge(images[400:], label[400:], watch=True)["fid"] == pytest.approx(0, abs=1e-6)
    said, world = [], types.SimpleNamespace(
        judge=judge, recipe=toy_world.TOY, options=types.SimpleNamespace(judge_samples=200), watched=1000, watched_steps=lambda: [1], draw_noise=lambda *key: (None, label[:60]),
        sample_student=lambda steps: None, run_sampler=lambda *a: (images[:60], {}), sample_grid=lambda *a: images[:60])
    monkeypatch.setattr(toy_world.tqdm, "write", said.append)
    toy_world.ToyWorld.watch(world, None, tmp_path / "a.png")
    assert said[0].startswith(f"real {judge.watch_floor:.3g}  fid@1 ") and f"{judge.watch_floor:.3g}" != f"{judge.about['figures']['watch_floor']:.3g}"


@pytest.mark.parametrize("error", [URLError("no network"), OSError("no space"), RuntimeError("hash mismatch\nin two lines")], ids=str)
def test_inception_that_cannot_be_had_is_one_line(monkeypatch, error):
    def fail(*args, **more):
        raise error
    monkeypatch.setattr("cleanfid.features.build_feature_extractor", fail)
    with pytest.raises(ladd.UserError, match="--fid inception.*leave --fid at 'judge'") as line:
        toy_judge.inception("cpu")
    assert "\n" not in str(line.value)


@pytest.mark.parametrize("entropy, accuracy, said", [(1.0, 0.97, []), (0.96, 0.81, []), (0.9, 0.97, ["hue_entropy@4"]), (0.99, 0.5, ["accuracy@4"]),
                                                     (0.0, 0.1, ["hue_entropy@4", "accuracy@4"])])
def test_signs_of_collapse_in_colour_and_digits(shipped_judge, entropy, accuracy, said):
    world = types.SimpleNamespace(judge=shipped_judge, reported_steps=lambda: [4, 2, 1])
    point = {"hue_entropy@4": entropy, "accuracy@4": accuracy, "hue_entropy@1": 0.0, "accuracy@1": 0.0}     # one step may be poor for long
    assert [s.split()[0] for s in toy_world.ToyWorld.signs(world, point)] == said


@pytest.fixture(scope="module")
def real_mnist():
    root = os.environ.get("LADD_DATA")
    if not root or not (Path(root) / "MNIST" / "raw").is_dir():
        pytest.skip("real MNIST is not here: LADD_DATA names no folder that holds MNIST/raw")
    return load_mnist(root)


def test_real_mnist_is_judged_as_the_shipped_figures_say(real_mnist, shipped_judge):
    grey, label = real_mnist
    assert grey.shape == (60_000, 28, 28)
    data = ColorMNIST(grey, label, seed=1000)                           # the floor's own images and colours
    x, label = data.batch(torch.arange(10_000, 11_000), torch.full((1000,), -2))
    judged = shipped_judge(x, label, watch=True)
    assert judged["fid"] == pytest.approx(shipped_judge.floor["1000"], rel=1e-2)
    assert judged["accuracy"] > 0.98 and judged["hue_entropy"] > 0.98


def test_real_digits_are_not_noise(real_mnist):
    data = ColorMNIST(*real_mnist)
    ladd.refuse_noise(data.batch(torch.arange(64), torch.zeros(64, dtype=torch.long))[0], i_know=False)


def test_noise_in_place_of_real_samples_is_refused():
    noise, _ = noise_and_label(16)
    with pytest.raises(ladd.UserError, match="noise"):
        ladd.refuse_noise(noise, i_know=False)
    ladd.refuse_noise(noise, i_know=True)
    ladd.refuse_noise(fake_digits(16).batch(torch.arange(16), torch.zeros(16, dtype=torch.long))[0], i_know=False)


# ---- the shipped teacher ----------------------------------------------------------------------------------------------

def test_shipped_teacher_is_trained_where_it_will_be_asked():
    velocity, about = toy_world.load_teacher(toy_judge.WEIGHTS, torch.device("cpu"))
    assert about["figures"]["parameters"] == sum(p.numel() for p in velocity.parameters())
    assert about["config"]["sigma_data"] == pytest.approx(velocity.sigma_data)
    losses = {float(s): loss for s, loss in about["figures"]["loss_by_sigma"].items()}
    assert min(losses) == 0.002 and max(losses) == 80 and all(0 < loss < 1.1 for loss in losses.values())


# ---- variants ---------------------------------------------------------------------------------------------------------

REAL = [torch.tensor([[[0.5, 2.0]], [[-1.0, 0.0]]]), torch.tensor([[[1.0]], [[3.0]]])]         # two heads, unequal maps
FAKE = [torch.tensor([[[0.0, -2.0]], [[0.5, 1.0]]]), torch.tensor([[[-1.0]], [[2.0]]])]


def softplus(v):
    return math.log1p(math.exp(v))


def by_hand(f):
    """mean over heads of mean over samples and patches of f(real, fake), in plain Python."""
    heads = [[f(r, k) for r, k in zip(real.flatten().tolist(), fake.flatten().tolist())] for real, fake in zip(REAL, FAKE)]
    return sum(sum(h) / len(h) for h in heads) / len(heads)


@pytest.mark.parametrize("name, heads, student", [
    ("hinge", lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda r, f: -f),
    ("nonsaturating", lambda r, f: softplus(-r) + softplus(f), lambda r, f: softplus(-f)),
    ("relativistic", lambda r, f: softplus(f - r), lambda r, f: softplus(r - f)),
    ("wasserstein", lambda r, f: f - r, lambda r, f: -f)])
def test_adversarial_losses_by_hand(name, heads, student):
    of_heads, of_student = variants.LOSSES[name]
    assert float(of_heads(REAL, FAKE)) == pytest.approx(by_hand(heads), rel=1e-6)
    assert float(of_student(REAL, FAKE)) == pytest.approx(by_hand(student), rel=1e-6)


def recipe(**changes):
    return dataclasses.replace(toy_world.PAPER, **changes)


def linear_head(w, seen=None):
    """A state whose only head is w . f at every place."""
    def heads(maps, t_hat, cond, t):
        if seen is not None:
            seen.append((maps, t_hat, cond, t))
        return [torch.einsum("bchw,c->bhw", m, w) for m in maps]
    return types.SimpleNamespace(heads=heads)


def some_pass(n=4, shape=(3, 6, 6), seed=0):
    gen = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(n, *shape, generator=gen)
    p = ladd.Pass(key=(0, 1, 0), x0=draw(), x0_hat=draw(), real_t=draw(), fake_t=draw(), eps=draw(), cond=torch.arange(n), head_cond=torch.eye(10)[:n],
                  t=torch.tensor([1.0, 0.75, 0.5, 0.25])[:n].repeat(n // 4), t_hat=torch.rand(n, generator=gen), t_real=None)
    p.t_real = p.t_hat
    p.real_maps, p.fake_maps = [p.real_t], [p.fake_t]
    return p


def test_gradient_penalty_of_a_linear_head():
    w = torch.tensor([1.0, -2.0, 2.0])                                  # |w| = 3, at every place
    assert float(variants.gradient_penalty(recipe(gradient_penalty=0.5))(some_pass(), linear_head(w))) == pytest.approx(0.5 * (3 - 1) ** 2, rel=1e-5)


def test_gradient_penalty_is_taken_between_real_and_fake_and_trains_the_heads():
    seen, w, p = [], torch.tensor([1.0, 1.0, 1.0], requires_grad=True), some_pass()
    variants.gradient_penalty(recipe(gradient_penalty=1.0))(p, linear_head(w, seen)).backward()
    expected = 2 * (3 ** 0.5 - 1) * w.detach() / 3 ** 0.5               # d (|w| - 1)^2 / dw
    torch.testing.assert_close(w.grad, expected, rtol=1e-5, atol=1e-6)
    share = (seen[0][0][0] - p.real_t) / (p.fake_t - p.real_t)          # one point of the line per sample
    torch.testing.assert_close(share.flatten(1).std(1), torch.zeros(4), rtol=0, atol=1e-3)
    assert share.min() > -1e-4 and share.max() < 1.0001 and share.flatten(1).mean(1).std() > 0.01


@pytest.mark.parametrize("name", ["gradient_penalty", "approximate_r1"])
@pytest.mark.parametrize("other", [(0, 2, 0), (0, 1, 4), (1, 1, 0)], ids=["iteration", "micro-batch", "seed"])
def test_draws_of_a_term_are_keyed_as_the_iterations_are(name, other):
    """Where every t-hat is the same (renoise_std = 0), so are the features: what differs is drawn."""
    w, changes = torch.tensor([1.0, -2.0, 2.0]), {name: 1.0, "taps": ("echo",)}
    term = getattr(variants, name)(recipe(**changes), *([] if name == "gradient_penalty" else [EchoWorld()]))

    def seen(key):
        p, maps = some_pass(), []
        p.t_hat = p.t_real = torch.full((4,), 0.7)
        p.key = key
        term(p, linear_head(w, maps))
        return maps[-1][0][0].detach()
    assert torch.equal(seen((0, 1, 0)), seen((0, 1, 0))) and not torch.equal(seen((0, 1, 0)), seen(other))


class EchoWorld(ladd.World):
    """A teacher whose only feature is its input, and which keeps what it was asked."""
    early_exit = False

    def __init__(self, velocity=lambda x, t, cond: x):
        self.asked = []
        self.tap_root = nn.ModuleDict({"echo": nn.Identity()})
        self.velocity = velocity

    def teacher(self, x_t, t, cond):
        self.asked.append((x_t, t, cond))
        return self.velocity(self.tap_root["echo"](x_t), t, cond)

    def head_cond(self, cond):
        return nn.functional.one_hot(cond, 11).float()


def test_approximate_r1_of_a_linear_head():
    """E |w . (s eps)|^2 = s^2 |w|^2, at every place."""
    w, world, p = torch.tensor([1.0, -2.0, 2.0]), EchoWorld(), some_pass(8, (3, 40, 40))
    term = variants.approximate_r1(recipe(approximate_r1=100.0, approximate_r1_std=0.05, taps=("echo",)), world)
    seen = []
    assert float(term(p, linear_head(w, seen))) == pytest.approx(100 * 0.05 ** 2 * 9, rel=0.08)
    (x_t, t, cond), = world.asked
    assert torch.equal(t, p.t_real) and torch.equal(cond, p.cond)       # the same t-hat: the sample is shaken, not noised anew
    assert float((x_t - p.real_t).std()) == pytest.approx(0.05, rel=0.05)
    assert all(torch.equal(s[1], p.t_real) for s in seen)


def test_misaligned_shows_the_wrong_condition_to_teacher_and_heads():
    world, p, seen = EchoWorld(), some_pass(), []
    p.cond = torch.tensor([5, 5, 7, 9])                                 # sample 1 would get its own class: it must not count
    w = torch.tensor([0.1, 0.2, -0.1])
    value = variants.misaligned(recipe(misaligned=2.0, taps=("echo",)), world)(p, linear_head(w, seen))
    (x_t, t, cond), = world.asked
    assert torch.equal(x_t, p.real_t) and torch.equal(t, p.t_real)
    assert sorted(cond.tolist()) == [5, 5, 7, 9] and (cond != p.cond).sum() == 3
    assert torch.equal(seen[0][2], world.head_cond(cond))
    logits = torch.einsum("bchw,c->bhw", p.real_t, w)
    expected = 2.0 * ((1 + logits).clamp(min=0) * (cond != p.cond).float()[:, None, None]).mean()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("name", ["gradient_penalty", "approximate_r1", "misaligned"])
def test_terms_of_the_heads_take_features_in_bfloat16(name):
    """As a teacher under autocast gives them; the term itself is computed in float32."""
    torch.manual_seed(0)
    p, world, heads = some_pass(4, (8, 6, 6)), EchoWorld(), ladd.Heads([8], [6], 10, width=8)
    world.tap_root["echo"] = NetModule(lambda x: x.bfloat16())
    world.head_cond = lambda cond: torch.eye(10)[cond]
    p.real_maps, p.fake_maps = [p.real_t.bfloat16()], [p.fake_t.bfloat16()]
    make = getattr(variants, name)
    term = make(recipe(**{name: 1.0}, taps=("echo",)), *([] if name == "gradient_penalty" else [world]))
    value = term(p, types.SimpleNamespace(heads=heads))
    value.backward()
    assert value.dtype == torch.float32 and all(w.grad is None or w.grad.isfinite().all() for w in heads.parameters())


@pytest.mark.parametrize("below, paired, simulated, counts", [
    (1.0, [1, 1, 1, 1], False, [0, 1, 2, 3]), (0.99, [1, 1, 1, 1], False, [1, 2, 3]), (0.5, [1, 1, 1, 1], False, [2, 3]),
    (0.1, [1, 1, 1, 1], False, []), (1.0, [0, 1, 0, 1], False, [1, 2, 3]), (1.0, [1, 0, 0, 1], True, [0, 3]),
    (0.5, [1, 0, 1, 0], True, [2]), (0.99, [0, 0, 0, 0], False, [1, 2, 3])])
def test_distillation_counts_the_times_up_to_its_limit_where_the_input_tells_of_x0(below, paired, simulated, counts):
    p = some_pass()                                                     # t = 1, .75, .5, .25
    p.paired = torch.tensor(paired, dtype=torch.bool)
    error = ((p.x0_hat - p.x0) ** 2).mean((1, 2, 3)).tolist()
    value = variants.distillation(recipe(distill_weight=3.0, distill_below=below, paired_share=0.5, backward_simulation=simulated), None)(p, None)
    assert float(value) == pytest.approx(3.0 * sum(error[i] for i in counts) / 4, rel=1e-5)


@pytest.mark.parametrize("power, weights", [(0.0, [1, 1, 1, 1]), (1.0, [1, 4 / 3, 2, 4]), (2.0, [1, 16 / 9, 4, 16])])
def test_distillation_is_divided_by_a_power_of_t(power, weights):
    p = some_pass()                                                     # t = 1, .75, .5, .25
    p.paired = torch.ones(4, dtype=torch.bool)
    value = float(variants.distillation(recipe(distill_weight=3.0, distill_below=1.0, distill_power=power, paired_share=0.5), None)(p, None))
    error = ((p.x0_hat - p.x0) ** 2).mean((1, 2, 3)).tolist()
    assert value == pytest.approx(3.0 * sum(w * e for w, e in zip(weights, error)) / 4, rel=1e-5)
    if power == 2:
        v, target = (ladd.x0_to_velocity(torch.randn(p.x0.shape, generator=ladd.generator(7)), x0, p.t) for x0 in (p.x0_hat, p.x0))
        assert value == pytest.approx(3.0 * float((v - target).square().mean()), rel=1e-4)


@pytest.mark.parametrize("t, steps, times", [(0.75, 5, [0.75, 0.5625, 0.375, 0.1875]), (0.5, 5, [0.5, 1 / 3, 1 / 6]), (0.6, 5, [0.6, 0.4, 0.2]), (0.25, 1, [0.25])])
def test_the_teachers_way_down_has_even_steps_no_longer_than_asked(t, steps, times):
    assert variants.way_down(t, steps) == pytest.approx(times)


def test_continued_is_the_teachers_guided_euler_from_where_the_student_is():
    world, x = EchoWorld(lambda x, t, cond: torch.sin(x) + column(t) * cond[:, None, None, None]), 0.3 * torch.randn(4, 3, 6, 6, generator=ladd.generator(1))
    world.guide = lambda velocity: lambda x, t, cond: velocity(x, t, 2 * cond)
    cond, y = torch.arange(4), x
    for t, dt in ((0.5, 1 / 6), (1 / 3, 1 / 6), (1 / 6, 1 / 6)):
        y = y - dt * (torch.sin(y) + t * 2 * column(cond))
    assert float(y.abs().max()) > 1
    torch.testing.assert_close(variants.continued(world, x, 0.5, cond, 5), y.clamp(-1, 1))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_fresh_noise_is_distilled_to_where_the_teacher_goes_from_the_students_first_step(share):
    """A teacher whose velocity is x_t itself: one Euler step from t leaves (1 - t) x_t."""
    r, world, student = recipe(distill_weight=3.0, distill_below=1.0, distill_fresh=1, paired_share=0.5, backward_simulation=True), EchoWorld(), lambda x, t, cond: 0.5 * x
    world.guide = lambda velocity: velocity
    p = some_pass(8)
    p.paired = torch.arange(8) < 8 * share
    p.x_t = variants.backward_simulation(r)(p, student)
    p.x0_hat = (p.x_t - column(p.t) * 0.5 * p.x_t).requires_grad_()
    first = p.eps - 0.25 * 0.5 * p.eps                                  # Euler from 1 to .75, for every sample alike
    target = torch.where(column(p.paired.float()) > 0, p.x0, (0.25 * first).clamp(-1, 1))
    value = variants.distillation(r, world)(p, None)
    value.backward()
    torch.testing.assert_close(value.detach(), 3 * (p.x0_hat.detach() - target).square().mean())
    torch.testing.assert_close(p.x0_hat.grad, 6 * (p.x0_hat.detach() - target) / p.x0.numel())       # none through the target


@pytest.mark.parametrize("changes", [dict(distill_weight=0.0), dict(backward_simulation=False), dict(times=(1.0,), time_probs=(1.0,), warmup_probs=(1.0,))])
def test_a_target_for_fresh_noise_is_refused_without_what_it_needs(changes):
    recipe(distill_weight=1.0, distill_below=1.0, distill_fresh=5, backward_simulation=True)       # no paired_share needed: fresh noise has a target at t = 1
    with pytest.raises(ladd.UserError, match="distill_fresh = 5"):
        recipe(**{**dict(distill_weight=1.0, distill_fresh=5, backward_simulation=True), **changes})


def score_teacher(x_t, t, cond):
    """A velocity that tells the label from none (10) and depends on x_t and t."""
    return 0.3 * x_t + column(t) + 0.7 * (cond != 10).float()[:, None, None, None]


def score_gradient(p, weighting):
    """d term / d x0_hat, times the number of values, where the noised guess is the guess noised by p.eps."""
    p.t_hat = torch.tensor([0.1, 0.4, 0.7, 0.95])
    p.fake_t = (1 - column(p.t_hat)) * p.x0_hat + column(p.t_hat) * p.eps
    p.x0_hat.requires_grad_()
    value = variants.score_distillation(recipe(score_weight=3.0, score_weighting=weighting), EchoWorld(score_teacher))(p, None)
    value.backward()
    return value.detach(), p.x0_hat.grad * p.x0.numel() / 3


def test_score_distillation_pulls_the_guess_to_the_teachers_without_a_gradient_through_it():
    """ADD, section 3.3: c(t) |x0_hat - target|^2 with c = alpha = 1 - t."""
    p = some_pass()
    value, grad = score_gradient(p, "exponential")
    error = p.x0_hat.detach() - (p.fake_t - column(p.t_hat) * score_teacher(p.fake_t, p.t_hat, p.cond))
    torch.testing.assert_close(value, 3 * ((1 - p.t_hat) * error.square().mean((1, 2, 3))).mean())
    torch.testing.assert_close(grad, 2 * (1 - column(p.t_hat)) * error)


def test_score_distillation_weighted_as_sds_has_its_gradient():
    """DreamFusion, eq. 3, with w = sigma^2 = t^2: w (eps_hat - eps)."""
    p = some_pass()
    _, grad = score_gradient(p, "sds")
    t = column(p.t_hat)
    eps_hat = p.fake_t + (1 - t) * score_teacher(p.fake_t, p.t_hat, p.cond)
    torch.testing.assert_close(grad, t ** 2 * (eps_hat - p.eps), rtol=1e-4, atol=1e-5)


def test_noise_free_score_distillation_points_towards_the_condition():
    p = some_pass()
    _, grad = score_gradient(p, "nfsd")
    t = column(p.t_hat)
    guess = p.fake_t - t * score_teacher(p.fake_t, p.t_hat, p.cond)
    free = p.fake_t - t * score_teacher(p.fake_t, p.t_hat, torch.full((4,), 10))
    direction = torch.where(t < 0.2, guess - p.x0_hat.detach(), guess - free)   # arXiv 2310.17590: small t keep the teacher's guess
    torch.testing.assert_close(grad, -2 * direction)


def test_backward_simulation_is_eulers_way_down_to_each_samples_time():
    times, p = (1.0, 0.75, 0.5, 0.25), some_pass(8)
    student = lambda x, t, cond: torch.sin(x) * column(t) + column(cond.float())
    made = variants.backward_simulation(recipe(times=times))(p, student)
    for i in range(8):
        x, t = p.eps[i:i + 1], 1.0
        while t > float(p.t[i]):
            x = x - 0.25 * (torch.sin(x) * t + float(p.cond[i]))
            t -= 0.25
        torch.testing.assert_close(made[i:i + 1], x)
    assert torch.equal(made[p.t == 1], p.eps[p.t == 1])
    assert not made.requires_grad


def test_nothing_is_added_unless_turned_on():
    plain = variants.terms(toy_world.PAPER, EchoWorld())
    assert plain == ladd.Terms()                                        # hinge on both sides, nothing else
    full = variants.terms(recipe(loss="relativistic", gradient_penalty=1.0, approximate_r1=1.0, misaligned=1.0, distill_weight=1.0,
                                 score_weight=1.0, backward_simulation=True), EchoWorld())
    assert (full.heads_loss, full.student_loss) == (variants.relativistic_heads, variants.relativistic_student)
    assert len(full.add_heads) == 3 and len(full.add_student) == 2 and full.student_input
    for one in ("gradient_penalty", "approximate_r1", "misaligned"):
        assert len(variants.terms(recipe(**{one: 1.0}), EchoWorld()).add_heads) == 1
    for one in ("distill_weight", "score_weight"):
        assert len(variants.terms(recipe(**{one: 1.0}), EchoWorld()).add_student) == 1


def test_paper_recipe_has_the_papers_numbers():
    paper = toy_world.PAPER
    assert paper.times == (1.0, 0.75, 0.5, 0.25) and paper.time_probs == (0.7, 0.1, 0.1, 0.1)
    assert paper.warmup_probs == (0.0, 0.0, 0.5, 0.5) and paper.warmup == 50      # of 600 iterations
    assert (paper.renoise_mean, paper.renoise_std) == (1.0, 1.0) and paper.loss == "hinge"


def test_recipes_that_cannot_work_are_refused():
    for fields, word in ((dict(distill_weight=1.0, distill_below=1.0), "distill_below"), (dict(loss="wasserstein"), "gradient_penalty"),
                         (dict(guidance_low=0.8, guidance_high=0.2), "guidance_low")):
        with pytest.raises(ladd.UserError, match=word):
            toy_world.ToyRecipe(**fields)


@pytest.mark.parametrize("kind", [toy_world.ToyRecipe, ZImageRecipe])
def test_every_field_that_a_world_adds_refuses_bad_values(kind):
    added = {f.name for f in dataclasses.fields(kind)} - {f.name for f in dataclasses.fields(ladd.Recipe)}
    tried = [(name, value) for name, value in bad_values(kind) if name in added]
    assert {name for name, _ in tried} == added
    for name, value in tried:
        with pytest.raises(ladd.UserError, match=name):
            kind(**{name: value})
