"""The toy world: EDM in ladd's time, the samplers, teacher and judge, the samples' cache, a job."""

import colorsys
import dataclasses
import json
import math
import os
import shlex
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ladd
import tiny
from toy_mnist import judge as toy_judge, report, teacher, world as toy_world
from toy_mnist.data import ColorMNIST, colour, hue_to_rgb, image_hue, load_mnist
from toy_mnist.edm import CUNet, EDMVelocity, sample_dpm, sample_heun, time_grid
from toy_mnist.judge import WEIGHTS, Judge

SD = 0.6  # a sigma_data unlike EDM's 0.5


@pytest.fixture
def float64():
    """New tensors are float64, so that what is equal on paper is equal but for rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_net(width=8, seed=0):
    """A small CUNet in the default dtype, whose zero-initialised layers are random too."""
    torch.manual_seed(seed)
    net = CUNet(width, emb=32)
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return net.eval().requires_grad_(False)


def published_denoiser(net, x, sigma, label, sd=SD):
    """D(x; sigma) as EDM prints it: eq. 7 with the constants of table 1. x [B,...], sigma [B]"""
    s = tiny.as4d(sigma)
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / torch.sqrt(sd**2 + s**2)
    c_in, c_noise = 1 / torch.sqrt(s**2 + sd**2), torch.log(sigma) / 4
    return c_skip * x + c_out * net(c_in * x, c_noise, label)


def noise_and_label(n, seed=1):
    return tiny.normal(seed, n, 3, 28, 28), torch.arange(n) % 11


def close(a, b, tolerance=1e-8):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_untrained_student_is_edms_denoiser_at_every_noise_level(float64):
    net = random_net()
    student = ladd.World(EDMVelocity(net, SD), None).make_student().eval().requires_grad_(False)
    sigma = torch.logspace(math.log10(0.002), math.log10(80), 12)
    eps, label = noise_and_label(12)
    x = 0.5 * torch.randn(12, 3, 28, 28) + tiny.as4d(sigma) * eps
    t, x_t = sigma / (1 + sigma), x / tiny.as4d(1 + sigma)
    D, v = published_denoiser(net, x, sigma, label), student(x_t, t, label)
    close(ladd.velocity_to_x0(x_t, v, t), D, 1e-9)
    close(v, (x_t - D) / tiny.as4d(t), 1e-9)


@pytest.mark.parametrize(
    "t, sigma", [(0.0, 0.002), (1e-5, 0.002), (0.5, 1.0), (80 / 81, 80), (0.999, 80), (1.0, 80)]
)
def test_the_network_is_given_the_nearest_trained_sigma(float64, t, sigma):
    asked, (x_t, label) = [], noise_and_label(3)

    def net(x, c_noise, label):
        asked.append(c_noise)
        return torch.sin(x)

    v = EDMVelocity(net, SD)(x_t, torch.full((3,), t), label)
    assert torch.isfinite(v).all()
    close(asked[0], torch.full((3,), math.log(sigma) / 4), 1e-9)
    if t == 1:  # the limit
        close(v, x_t - SD * torch.sin(x_t), 1e-12)
    elif t > 0:  # the preconditioning itself stays at the true sigma
        D = published_denoiser(net, x_t / (1 - t), torch.full((3,), t / (1 - t)), label)
        close(v, (x_t - D) / t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_computes_in_the_dtype_that_is_asked_for(dtype):
    computed, (x_t, label) = [], noise_and_label(2)
    velocity = EDMVelocity(random_net(), SD, dtype)
    velocity.net.stem.register_forward_hook(lambda module, x, y: computed.append(y.dtype))
    for t in (0.0, 0.5, 1.0):
        v = velocity(x_t, torch.full((2,), t), label)
        assert v.dtype == torch.float32 and v.isfinite().all()
    assert computed == [dtype] * 3


def edm_sigmas(n):
    """EDM eq. 5, in plain Python, with the final 0."""
    step = (0.002 ** (1 / 7) - 80 ** (1 / 7)) / max(n - 1, 1)
    return [(80 ** (1 / 7) + i * step) ** 7 for i in range(n)] + [0.0]


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_euler_in_t_is_edms_euler_in_sigma(float64, n):
    net, (noise, label), sigmas = random_net(), noise_and_label(3), edm_sigmas(n)
    x = noise * sigmas[0]
    for a, b in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (b - a) * (x - published_denoiser(net, x, torch.full((3,), a), label)) / a
    velocity = tiny.Recorder(EDMVelocity(net, SD))
    close(ladd.sample_euler(velocity, noise, time_grid(n), label), x)
    np.testing.assert_allclose(velocity.times(), [s / (1 + s) for s in sigmas[:-1]], rtol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_heun_is_edms_algorithm_1(float64, n):
    net, (noise, label), t = random_net(), noise_and_label(3), edm_sigmas(n)

    def D(x, sigma):
        return published_denoiser(net, x, torch.full((3,), sigma), label)

    x = t[0] * noise
    for i in range(n):
        d = (x - D(x, t[i])) / t[i]
        euler = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_prime = (euler - D(euler, t[i + 1])) / t[i + 1]
            euler = x + (t[i + 1] - t[i]) * (d / 2 + d_prime / 2)
        x = euler
    velocity = tiny.Recorder(EDMVelocity(net, SD))
    close(sample_heun(velocity, noise, n, label), x)
    assert len(velocity.times()) == 2 * n - 1


@pytest.mark.parametrize("n", [1, 4, 20])
def test_dpm_solver_is_diffusers_own_run_of_a_preconditioned_network(float64, n):
    from diffusers import EDMDPMSolverMultistepScheduler

    net, (noise, label) = random_net(), noise_and_label(2)
    scheduler = EDMDPMSolverMultistepScheduler(sigma_data=SD, solver_order=2)
    scheduler.set_timesteps(n)
    x = noise * 80
    for c_noise in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, c_noise)
        output = net(scaled, c_noise.double().repeat(2), label)
        x = scheduler.step(output, c_noise, x).prev_sample
    velocity = tiny.Recorder(EDMVelocity(net, SD))
    close(sample_dpm(velocity, noise, n, label), x, 1e-4)
    assert len(velocity.times()) == n and x.std() > 0.1


def grey_digits(n, seed=0):
    """Digit-like pictures: one bright bar per label, shifted at random. uint8 [n, 28, 28], [n]"""
    gen = torch.Generator().manual_seed(seed)
    grey, label = torch.zeros(n, 28, 28, dtype=torch.uint8), torch.arange(n) % 10
    for i in range(n):
        y, x, value = torch.randint(4, 10, (3,), generator=gen).tolist()
        left = x + int(label[i])
        grey[i, y : y + 12, left : left + 3] = 25 * value
    return grey, label


@pytest.fixture(scope="module")
def mnist_root(tmp_path_factory):
    """MNIST's own files, as torchvision reads them, with made-up digits: 300 and 60."""
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 300), ("t10k", 60)):
        grey, label = grey_digits(n, seed=n)
        images = struct.pack(">4i", 2051, n, 28, 28) + grey.numpy().tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">2i", 2049, n) + label.byte().numpy().tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return root


def test_hues_agree_with_colorsys_and_digits_are_painted_in_them():
    hue = torch.linspace(0, 0.999, 500)
    expected = torch.tensor([colorsys.hsv_to_rgb(h, 1, 1) for h in hue.tolist()])
    close(hue_to_rgb(hue), expected, 1e-5)
    grey, _ = grey_digits(500)
    x = colour(grey.float() / 255, hue)
    assert (x[grey[:, None].expand_as(x) == 0] == -1).all()  # on black
    close(image_hue(x), hue, 1e-4)
    close((x.amax((1, 2, 3)) + 1) / 2, grey.amax((1, 2)) / 255, 1e-5)


def test_a_batch_is_keyed_by_seed_epoch_and_index():
    data, index = ColorMNIST(*grey_digits(30)), torch.arange(30)
    x, label = data.batch(index, 2)
    assert torch.equal(label, index % 10)
    some = torch.tensor([7, 3, 21])
    assert torch.equal(data.batch(some, torch.tensor([2, 2, 2]))[0], x[some])
    mixed = data.batch(torch.tensor([7, 7]), torch.tensor([2, 5]))[0]
    assert torch.equal(mixed[0], x[7]) and not torch.equal(mixed[1], x[7])  # painted anew
    assert not torch.equal(ColorMNIST(*grey_digits(30), seed=1).batch(index, 2)[0], x)
    many = ColorMNIST(*grey_digits(2000)).batch(torch.arange(2000), 0)[0]
    assert toy_judge.entropy(image_hue(many), bins=10) > 0.99  # uniform


def test_mnist_is_found_by_either_name_and_missed_in_one_line(mnist_root, tmp_path, monkeypatch):
    monkeypatch.setenv("LADD_DATA", str(mnist_root))
    assert load_mnist()[0].shape == (300, 28, 28)
    monkeypatch.setenv("LADD_DATA", str(tmp_path))
    assert len(load_mnist(mnist_root, train=False)[0]) == 60
    monkeypatch.delenv("LADD_DATA")
    monkeypatch.chdir(tmp_path)
    offline = Mock(side_effect=URLError("no network"))
    monkeypatch.setattr("torchvision.datasets.MNIST.download", offline)
    for root in (None, tmp_path / "nothing"):
        with pytest.raises(ladd.UserError, match="--data-root.*LADD_DATA") as error:
            load_mnist(root)
        assert "\n" not in str(error.value) and str(root or "data") in str(error.value)


def test_edm_loss_is_the_weighted_denoising_error(float64):
    net, (eps, label) = random_net(), noise_and_label(5)
    x0 = 0.5 * torch.randn(5, 3, 28, 28)
    sigma = torch.tensor([0.002, 0.1, 1.0, 7.0, 80.0])
    D = published_denoiser(net, x0 + tiny.as4d(sigma) * eps, sigma, label)
    weight = (sigma**2 + SD**2) / (sigma * SD) ** 2
    made = teacher.edm_loss(EDMVelocity(net, SD), x0, label, sigma, eps)
    close(made, weight * ((D - x0) ** 2).mean((1, 2, 3)))


def test_training_sigmas_follow_their_mixture_and_reach_both_ends():
    sigma = teacher.draw_sigma(200_000, torch.Generator().manual_seed(0))
    assert 0.002 <= sigma.min() < 0.003 and (sigma > 70).sum() > 100  # the student starts there
    for s in (0.004, 0.1, 1.0, 10.0, 40.0):
        normal = 0.5 + 0.5 * math.erf((math.log(s) + 0.4) / 1.5 / 2**0.5)
        expected = 0.15 * math.log(s / 0.002) / math.log(80 / 0.002) + 0.85 * normal
        assert float((sigma <= s).double().mean()) == pytest.approx(expected, abs=0.004)


def test_labels_are_dropped_and_the_batch_is_keyed_by_its_step():
    data = ColorMNIST(*grey_digits(40))
    a, again, other = (teacher.batch_at(data, step, 400, 0) for step in (3, 3, 4))
    assert all(map(torch.equal, a, again)) and not torch.equal(a[3], other[3])
    assert 0.05 < float((a[1] == 10).float().mean()) < 0.2


def train(module, root, folder, *options):
    """The exit code of a short training of teacher or judge; its weights go to folder."""
    given = ["--data-root", root, "--out", folder]
    if module is teacher:
        given += ["--steps", 40, "--batch", 8, "--width", 8, "--lr", 0.05]
        given += ["--run", folder / "run", "--checkpoint-every", 20]
    return tiny.start(module.main, *given, *options)


def test_teacher_training_learns_and_resumed_is_never_stopped(mnist_root, tmp_path, capsys):
    assert train(teacher, mnist_root, tmp_path) == 0
    velocity, about = toy_world.load_teacher(tmp_path, tiny.CPU)
    blank = {"ema": [torch.zeros_like(p) for p in velocity.parameters()]}
    kept, _ = ladd.load_checkpoint(tmp_path / "run", blank)
    assert all(map(torch.equal, kept["ema"], velocity.parameters()))  # the average is saved
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-0000020", "step-0000040"]
    (checkpoints[1] / ".metadata").unlink()  # as a kill while it was written leaves it
    assert train(teacher, mnist_root, tmp_path) == 0
    assert toy_world.load_teacher(tmp_path, tiny.CPU)[1]["sha256"] == about["sha256"]
    assert "--steps 40 --batch 8" in about["command"]
    x0, label = ColorMNIST(*load_mnist(mnist_root)).batch(torch.arange(300), 0)
    assert velocity.sigma_data == pytest.approx(float(x0.std()), abs=1e-3)
    # It denoises far better than none (F = 0) at strong noise, where the data's mean helps.
    sigma, eps = torch.full((300,), 20.0), torch.randn(x0.shape)
    none = EDMVelocity(CUNet(width=8), velocity.sigma_data)
    with torch.no_grad():
        a, b = (teacher.edm_loss(v, x0, label, sigma, eps).mean() for v in (velocity, none))
    assert a < 0.7 * b
    capsys.readouterr()
    code = train(teacher, mnist_root, tmp_path, "--lr", "0.1")
    tiny.refused(capsys, code, "--run", "lr", "0.1")


def test_frechet_of_correlated_samples_by_eigenvalues():
    rng = np.random.default_rng(0)
    mixed = [rng.standard_normal((400, 16)) @ rng.standard_normal((16, 16)) for _ in range(2)]
    a, b = mixed[0], mixed[1] + rng.standard_normal(16)
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(A @ B).real).sum()  # tr sqrt(AB), by AB's eigenvalues
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * root
    made = toy_judge.frechet(a.astype(np.float32), torch.tensor(b))
    assert made == pytest.approx(expected, rel=1e-5)
    assert toy_judge.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_kernel_is_the_unbiased_cubic_estimate_of_seeded_subsets():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((1100, 4)), rng.standard_normal((1100, 4)) + 0.5
    a, b = x[:40], y[:40]  # subsets of 40 of 40
    assert toy_judge.kernel(a, b) == pytest.approx(tiny.kid_by_hand(a, b), rel=1e-4)
    first, again, other = (toy_judge.kernel(x, y, subsets=3, seed=k) for k in (0, 0, 1))
    assert first == again != other


def test_entropy_of_hues():
    assert toy_judge.entropy((torch.arange(3600) + 0.5) / 3600) == pytest.approx(1, abs=1e-6)
    assert toy_judge.entropy(torch.full((100,), 0.3)) == 0
    two = torch.tensor([0.1, 0.1, 0.6, 0.6])
    assert toy_judge.entropy(two) == pytest.approx(math.log(2) / math.log(36))


@pytest.fixture(scope="module")
def judge():
    return Judge()


def test_shipped_reference_has_full_rank_and_its_floor_falls_with_the_images(judge):
    reference = judge.reference.double().numpy()
    assert reference.shape == (10_000, 128) and reference.std(0).min() > 0.1  # no dead unit
    assert np.linalg.matrix_rank(np.cov(reference, rowvar=False)) == 128
    falling = list(judge.floor.values())
    assert falling == sorted(falling, reverse=True) and 0 < falling[-1] < falling[0] < 5
    floors = [judge.floor_at(n) for n in (500, 1999, 2000, 10**6)]
    assert floors == [(n, judge.floor[n]) for n in (1000, 1000, 2000, 10000)]


def test_shipped_judge_sees_bars_wrong_labels_and_one_colour(judge):
    figures = judge.about["figures"]
    assert figures["test_accuracy"] > 0.98 and figures["hue_entropy_real"] > 0.99
    assert sum(judge.class_share) == pytest.approx(1, abs=1e-4)
    grey, label = grey_digits(200)
    x = colour(grey.float() / 255, torch.full((200,), 0.6))
    f = toy_judge.features_of(judge.net, x)
    judged = judge(x, label)
    assert judged["fid"] == pytest.approx(toy_judge.frechet(f, judge.reference))
    assert judged["fid"] > 10 * judge.floor[1000] and judged["hue_entropy"] == 0
    assert judged["kid"] == pytest.approx(toy_judge.kernel(f.double(), judge.reference.double()))
    own = judge.net.heads(f)[0].argmax(1)
    curve, wrong = judge(x, own, curve=True), judge(x, (own + 1) % 10, curve=True)
    assert curve["accuracy"] == 1 and wrong["accuracy"] == 0 and "kid" not in curve
    assert curve["fid"] == pytest.approx(toy_judge.frechet(f, judge.curve_reference))


def test_judge_training_on_a_few_digits(mnist_root, tmp_path):
    for _ in range(2):  # and again, over the first
        assert train(toy_judge, mnist_root, tmp_path, "--epochs", "1") == 0
    made = Judge(tmp_path)
    assert made.reference.shape == made.curve_reference.shape == (100, 128)
    assert made.class_share == pytest.approx([0.1] * 10)
    data = ColorMNIST(*load_mnist(mnist_root), seed=1000)
    first, second = (data.batch(torch.arange(k, k + 100), toy_judge.PAINTED) for k in (0, 100))
    assert made(*first)["fid"] == pytest.approx(0, abs=1e-2)  # the reference itself
    assert made(*second)["fid"] == pytest.approx(made.floor[100], rel=1e-6)
    assert made(*second, curve=True)["fid"] == pytest.approx(made.curve_floor, rel=1e-2)


def test_real_mnist_is_judged_as_the_shipped_figures_say(judge):
    root = Path(os.environ.get("LADD_DATA", "data"))
    if not (root / "MNIST" / "raw").is_dir():  # it is not downloaded for a test
        pytest.skip("MNIST is not here: LADD_DATA names no folder that holds MNIST/raw")
    data = ColorMNIST(*load_mnist(root), seed=1000)  # the floor's own images and colours
    x, label = data.batch(torch.arange(10_000, 11_000), toy_judge.PAINTED)
    judged = judge(x, label)
    assert judged["fid"] == pytest.approx(judge.floor[1000], rel=1e-2)
    assert judged["accuracy"] > 0.98 and judged["hue_entropy"] > 0.98
    assert judge(x, label, curve=True)["fid"] == pytest.approx(judge.curve_floor, rel=1e-2)


@pytest.mark.parametrize("name", ["teacher", "judge", "reference"])
def test_a_flipped_bit_and_a_cut_off_file_are_noticed(tmp_path, name):
    shutil.copytree(WEIGHTS, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"{name}.safetensors"
    whole = bytearray(path.read_bytes())
    flipped = [whole.copy(), whole.copy()]
    flipped[0][30] ^= 1  # in the header
    flipped[1][-1000] ^= 1
    for damaged in (*flipped, whole[:-100], b""):
        path.write_bytes(damaged)
        with pytest.raises(ladd.UserError, match=f"{name}.safetensors"):
            toy_world.load_teacher(tmp_path, tiny.CPU) if name == "teacher" else Judge(tmp_path)


TINY = {"iterations": 4, "batch": 4, "samples": 20, "teacher_steps": 3, "head_width": 8}
TINY |= {"warmup": 1, "lr_warmup": 1, "guidance_low": 0.0, "guidance_high": 1.0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a teacher of random weights, and the shipped judge."""
    folder = tmp_path_factory.mktemp("weights")
    shutil.copytree(WEIGHTS, folder, dirs_exist_ok=True)
    net = random_net()
    about = {"config": {**net.config, "sigma_data": SD}}
    toy_judge.save_file(folder, "teacher", net.state_dict(), about)
    return folder


@pytest.fixture
def toy(weights, tmp_path):
    """toy(**changes of the recipe) -> a ToyWorld whose cache is in tmp_path."""

    def make(weights=weights, dtype="float32", **changes):
        options = {"judge_samples": 200, "gif": False, "dtype": dtype}
        options |= {"weights": weights, "out": tmp_path}
        recipe = dataclasses.replace(toy_world.TOY, **{**TINY, **changes})
        return toy_world.make_world(recipe, types.SimpleNamespace(**options), tiny.CPU)

    return make


def test_features_are_the_teachers_own_and_carry_gradients(toy):
    world = toy()
    (x_t, _), label = noise_and_label(2), torch.tensor([3, 7])
    maps = world.features(x_t.requires_grad_(), torch.full((2,), 0.4), label)
    wide, narrow = (8, 14, 14), (16, 7, 7)
    assert [m.shape[1:] for m in maps] == [wide, narrow, narrow, narrow, wide]
    maps[-1].sum().backward()
    assert x_t.grad.abs().sum() > 0 and all(p.grad is None for p in world.teacher.parameters())
    assert torch.equal(world.head_cond(label), torch.eye(10)[label])


def test_the_teachers_samples_are_guided_as_the_recipe_says(toy):
    """Euler on EDM's grid, written out: none + w (given - none) inside, the given label outside."""
    world = toy(guidance=3.0, guidance_low=0.2, guidance_high=0.9, teacher_steps=5)
    noise, label = world.draw_noise(4, "guided")

    def euler(x, times):
        passes = 0
        for t, after in zip(times, [*times[1:], 0.0], strict=True):
            given = world.teacher(x, torch.full((4,), t), label)
            none = world.teacher(x, torch.full((4,), t), torch.full((4,), 10))
            inside = 0.2 <= t <= 0.9
            x = x + (after - t) * (none + 3 * (given - none) if inside else given)
            passes += 1 + inside
        return x.clamp(-1, 1), passes

    expected, passes = euler(time_grid(5)[0] * noise, time_grid(5))
    made, cost = world.run_sampler(world.sample_teacher, world.teacher, noise, label, "")
    close(made, expected, 1e-4)
    assert cost["nfe"] == passes in (6, 7, 8) and cost["ms_per_image"] > 0
    # The anchor holds the student to the velocity that made these samples.
    own = ladd.sample_euler(world.anchor, noise, time_grid(5), label).clamp(-1, 1)
    close(own, expected, 1e-4)


def test_a_batch_holds_samples_with_the_noise_that_leads_to_them(toy):
    world = toy()
    x0, label, noise, real = world.batch(17, 40)  # more than the samples: over an epoch's end
    again, _ = world.run_sampler(world.sample_teacher, world.teacher, noise, label, "")
    close(again, x0, 1e-4)
    assert torch.equal(real, x0) and len(set(label.tolist())) > 3
    assert torch.equal(world.batch(30, 5)[0], x0[13:18])
    epoch, table = world.batch(20, 20)[2], world.samples.noise
    assert sorted(epoch[:, 0, 0, 0].tolist()) == sorted(table[:, 0, 0, 0].tolist())  # each once


@pytest.fixture
def made(monkeypatch):
    """How many images each call of `run_sampler` makes."""
    counts, run_sampler = [], toy_world.ToyWorld.run_sampler

    def counting(self, sampler, velocity, noise, *more):
        counts.append(len(noise))
        return run_sampler(self, sampler, velocity, noise, *more)

    monkeypatch.setattr(toy_world.ToyWorld, "run_sampler", counting)
    return counts


def test_samples_are_made_once_per_setting(toy, weights, tmp_path, made):
    first = toy().samples
    again = toy(student_lr=5e-4, seed=3).samples  # not what the samples are made of
    assert made == [20] and all(map(torch.equal, again[:3], first[:3])) and again[3] == first[3]
    other = tmp_path / "other"
    shutil.copytree(weights, other)
    tensors, about = toy_judge.load_file(weights, "teacher")
    moved = {k: v + 0.01 for k, v in tensors.items()}
    toy_judge.save_file(other, "teacher", moved, {"config": about["config"]})
    changes = [{"guidance": 2.0}, {"teacher_steps": 4}, {"samples_seed": 2}, {"samples": 21}]
    worlds = [toy(), *(toy(**change) for change in changes), toy(weights=other)]
    assert len({json.dumps(world.fingerprint()) for world in worlds}) == 6
    paths = {world.cache_path("samples") for world in (*worlds, toy(dtype="bfloat16"))}
    assert len(paths) == 7 and not torch.equal(worlds[-1].samples.x0, first.x0)


def test_a_kill_loses_one_part_and_a_damaged_part_is_refused(toy, monkeypatch, made):
    monkeypatch.setattr(toy_world, "PART", 8)
    expected, folder = toy().samples, toy().cache_path("samples")
    parts = sorted(folder.glob("*.safetensors"))
    parts[1].unlink()  # never made
    assert toy().samples.x0.equal(expected.x0) and made == [8, 8, 4, 8]
    parts[0].write_bytes(parts[0].read_bytes()[:-100])  # cut off
    with pytest.raises(ladd.UserError, match="0000000.safetensors: missing or damaged"):
        print(toy().samples)


def test_an_evaluation_repeats_whatever_was_drawn_before(toy, tmp_path):
    world, seen = toy(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        metrics = world.evaluate(world.teacher, tmp_path, 7)
        seen.append((metrics, (tmp_path / "samples" / "0000007.png").read_bytes()))
    assert seen[0] == seen[1]
    assert metrics["score"] == pytest.approx(sum(metrics[f"fid@{s}"] for s in (4, 2, 1)) / 3)


@pytest.mark.parametrize(
    "accuracy, entropy, signs",
    [(0.81, 0.96, []), (0.5, 0.96, ["accuracy@4"]), (0.81, 0.9, ["hue_entropy@4"])],
)
def test_signs_of_collapse(toy, tmp_path, monkeypatch, accuracy, entropy, signs):
    figures = {"fid": 3.0, "accuracy": accuracy, "hue_entropy": entropy}
    monkeypatch.setattr(Judge, "__call__", lambda self, x, label, curve: curve and figures)
    world = toy()
    metrics = world.evaluate(world.teacher, tmp_path, 8)
    assert [sign.split()[0] for sign in metrics["collapse"]] == signs


def command(out, *options, weights):
    """The words of a tiny job's command."""
    words = [sys.executable, ladd.__file__, "--toy", "--device", "cpu", "--dtype", "float32"]
    words += ["--weights", weights, "--out", out, "--judge-samples", "200", "--log-every", "1"]
    for name, value in TINY.items():
        words += [f"--{name.replace('_', '-')}", value]
    return [*map(str, words), *options]


@pytest.fixture(scope="module")
def job(weights, tmp_path_factory):
    """Two runs at once with an empty --out: (the folder of the first, what it printed)."""
    out = tmp_path_factory.mktemp("runs")
    options = ("--evaluate-every", "1", "--checkpoint-every", "3", "--gif")
    running = []
    for name, closed in (("a name", ""), ("another", " 2>&-")):  # one with its stderr closed
        line = shlex.join(command(out, "--name", name, *options, weights=weights)) + closed
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        streams["env"] = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
        running.append(subprocess.Popen(line, shell=True, cwd=out, **streams))
    ended = [process.communicate(timeout=300) for process in running]
    for process, (_, errors) in zip(running, ended, strict=True):
        assert process.returncode == 0, errors
    assert "\r" not in "".join(ended[0])  # no progress bar without a terminal
    return out / "a name", ended[0][0]


def test_two_jobs_at_once_share_their_samples_and_leave_their_files(job):
    run, _ = job
    first, second = (run.parent / name / "student.safetensors" for name in ("a name", "another"))
    assert first.read_bytes() == second.read_bytes()
    cache = run.parent / "cache"
    assert len(list(cache.glob("samples-*/*.safetensors"))) == 2 and not list(cache.rglob("*.part"))
    left = {"config.json", "metrics.jsonl", "samples", "checkpoints", ".lock", "best.safetensors"}
    left |= {"student.safetensors", "report.json", "report.png", "training.gif"}
    assert {path.name for path in run.iterdir()} == left
    for name in ("report.png", "samples/0000002.png"):
        with Image.open(run / name) as image:
            assert min(image.size) > 60 and len(image.getcolors(2**24)) > 20
    with Image.open(run / "training.gif") as movie:
        assert (movie.n_frames, movie.size) == (3, (302, 182))
    judged = [line for line in tiny.log_of(run) if "fid@4" in line]
    assert [line["iteration"] for line in judged] == [1, 2, 3]
    assert {"fid@1", "accuracy@2", "hue_entropy@1", "score"} <= judged[0].keys()
    tensors, about = ladd.load_weights(run / "student.safetensors", "toy student")
    trained = [k for k, v in random_net().state_dict().items() if not torch.equal(tensors[k], v)]
    assert len(trained) > 0.9 * len(tensors) and about["recipe"]["iterations"] == 4


def test_the_report_has_every_row_with_its_cost_and_the_command(job):
    run, printed = job
    made = json.loads((run / "report.json").read_text())
    rows = {row["name"]: row for row in made["rows"]}
    nfe = {name: (row["steps"], row["nfe"]) for name, row in rows.items()}
    expected = {"teacher@3": (3, 6), "teacher@4": (4, 8), "DPM-Solver++@4": (4, 8)}  # guided: two
    assert nfe == {**expected, "student@4": (4, 4), "student@2": (2, 2), "student@1": (1, 1)}
    for row in rows.values():
        assert row["fid"] > 0 and math.isfinite(row["kid"]) and row["ms_per_image"] > 0
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["hue_entropy"] <= 1
    assert made["recipe"]["samples"] == 20 and made["recipe"]["loss"] == "hinge"
    words = shlex.split(made["command"])
    assert words[0] == "python" and words[words.index("--name") + 1] == "a name"
    for name in ("DPM-Solver++@4", "samples = 20 (not 3000)", str(run / "report.png")):
        assert name in printed


def test_runs_are_drawn_beneath_each_other(job, tmp_path):
    runs = [str(job[0].parent / name) for name in ("a name", "another")]
    for n in (1, 2):
        report.main([*runs[:n], "--picture", str(tmp_path / "picture.png")])
        with Image.open(tmp_path / "picture.png") as picture:
            assert picture.size == (1800, 350 * n) and len(picture.getcolors(2**24)) > 20


def test_sample_draws_a_grid_of_the_finished_run(job, weights, toy, tmp_path, capsys):
    run, _ = job
    world = toy()
    student = world.make_student()
    tensors, _ = ladd.load_weights(run / "student.safetensors", "toy student")
    student.net.load_state_dict(tensors)
    for steps in ("1", "4"):  # --real data: it needs no MNIST
        words = "--sample", "--steps", steps, "--real", "data", "--data-root", "/nowhere"
        words = command(run.parent, "--name", run.name, *words, weights=weights)[2:]
        assert ladd.main(words) == 0
        path = run / f"sample-{steps}.png"
        assert capsys.readouterr().out.strip() == str(path)
        expected = world.sample_grid(student, world.sample_student(int(steps)), key="sample")
        toy_world.draw(expected, tmp_path / "expected.png")
        assert path.read_bytes() == (tmp_path / "expected.png").read_bytes()


BAD_JOB = {
    "--judge-samples 10": ["--judge-samples", "200"],
    "--weights /nowhere": ["/nowhere/teacher.safetensors"],
    "--real data --data-root /nowhere": ["MNIST is not in /nowhere", "--data-root DIR"],
    "--sample --name absent": ["absent holds no finished student"],
}


@pytest.mark.parametrize("options", BAD_JOB)
def test_bad_input_to_a_job_is_one_line_and_no_run(weights, tmp_path, capsys, options):
    words = command(tmp_path, "--name", "bad", *options.split(), weights=weights)[2:]
    tiny.refused(capsys, ladd.main(words), *BAD_JOB[options])
    assert not list(tmp_path.iterdir())


def test_every_row_of_the_table_has_its_own_name_and_is_judged_by_its_labels(toy, monkeypatch):
    world = toy(teacher_steps=4, times=(1.0, 0.5), time_probs=(0.5, 0.5), warmup_probs=(1.0, 0.0))
    monkeypatch.setattr(Judge, "__call__", lambda self, x, label: {"label": label})
    rows = report.judged_rows(world, world.teacher)
    assert len({row["name"] for row in rows}) == 5
    assert [row["name"] for row in rows[3:]] == ["student@2", "student@1"]
    _, label = world.draw_noise(200, 0, "judge")
    assert all(torch.equal(row["label"], label) for row in rows[1:])
    assert torch.equal(rows[0]["label"][:20], world.samples.label)
