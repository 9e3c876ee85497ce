"""The run as promised: kills do no harm, ranks agree, bad input is one line, worlds are easy."""

import concurrent.futures
import dataclasses
import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import time
import types

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict  # noqa: F401 (so that children have it already)
from safetensors.torch import load_file

import ladd
import tiny
from processes import FORKS, Child, on_ranks

FIELDS = {"iterations": 6, "batch": 12, "student_lr": 0.01, "head_lr": 0.02, "lr_warmup": 3}
RECIPE = tiny.make_recipe(**FIELDS, lr_decay="cosine")


class Killed(BaseException):
    """As kill -9 is: nothing in the run handles it."""


def train(run, world=None, recipe=RECIPE, losses=(ladd.heads_loss, ladd.student_loss), **options):
    options = {"evaluate_every": 0, "checkpoint_every": 2, "log_every": 1, **options}
    return ladd.train(world or tiny.World(recipe), recipe, run, ladd.Options(**options), losses)


MEASURED = {"seconds", "samples_per_second", "peak_gb"}


def log_of(run):
    """metrics.jsonl without its clock."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in tiny.log_of(run)]


def at_iteration(iteration, act, world=None):
    """A world that acts when the samples of an iteration (from 0) are asked for."""
    world = world or tiny.World(RECIPE)
    batch = world.batch

    def batch_and_act(start, count):
        if start == iteration * RECIPE.batch and world.reads:  # the first is State's
            act()
        return batch(start, count)

    world.batch = batch_and_act
    return world


def killed():
    raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never disturbed: (its folder, all that its state holds)."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, tiny.everything(train(run))


def test_a_console_gets_a_letter_that_it_lacks_as_a_code(tmp_path, monkeypatch):
    with open(tmp_path / "console", "w", encoding="ascii") as console:
        monkeypatch.setattr(sys, "stdout", console)
        assert ladd.run_command_line(lambda argv: print("läufe"), []) == 0
    assert (tmp_path / "console").read_text() == "l\\xe4ufe\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_that_is_asked_for_is_exact_on_a_gpu(tmp_path, dtype):
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    train(tmp_path, dtype=dtype)
    found = [backend.allow_tf32 for backend in backends]
    for backend, was in zip(backends, before, strict=True):
        backend.allow_tf32 = was
    assert found == [dtype == "bfloat16"] * 2


# The command line, with the tiny world in place of the toy:
def make_world(recipe, options, device):
    return tiny.World(recipe, options.data)


MODULE = types.SimpleNamespace(
    OPTIONS=ladd.Options(),
    RECIPES={
        "tiny": dataclasses.replace(RECIPE, iterations=4, taps=("first",)),
        "other": tiny.make_recipe(iterations=2, batch=4),
    },
    add_arguments=lambda group: group.add_argument("--data", type=int, default=0),
    make_world=make_world,
)
WORDS = ["--toy", "--device=cpu", "--dtype=float32", "--log-every=1", "--checkpoint-every=2"]
WORDS += ["--evaluate-every=3", "--keep=1"]


def command(out, *words):
    """The exit code of a command line of the tiny world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "toy_mnist.world", MODULE)
        return ladd.main([*WORDS, f"--out={out}", *words])


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """The folder of such a run, which was never disturbed."""
    out = tmp_path_factory.mktemp("never-killed")
    assert command(out, "--name=run") == 0
    return out / "run"


def assert_same_run(run, other):
    for name in ("student", "best"):
        a, b = (load_file(r / f"{name}.safetensors") for r in (run, other))
        assert tiny.same(a, b)
    assert log_of(run) == log_of(other)
    configs = [json.loads((r / "config.json").read_text()) for r in (run, other)]
    assert configs[0]["recipe"] == configs[1]["recipe"]
    assert not list(run.rglob("*.part"))  # what a killed process has left goes at the next start


@pytest.mark.parametrize("iteration", [0, 1, 3, 5])
def test_killed_in_an_iteration_and_resumed_is_never_killed(tmp_path, whole, iteration):
    with pytest.raises(Killed):
        train(tmp_path / "run", at_iteration(iteration, killed))
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"iteration": 4, "heads_lo')  # a line that the kill has cut off
    world = tiny.World(RECIPE)
    state = train(tmp_path / "run", world, resume=True)
    assert tiny.same(tiny.everything(state), whole[1])
    assert log_of(tmp_path / "run") == log_of(whole[0])
    reads = [start // 12 for start, count in world.reads[1:]]  # the first is State's
    assert reads == list(range(iteration - iteration % 2, 6))  # from the last checkpoint


def command_that_dies(n, out):
    """A command that is killed at its n-th change of a file: before it, or when it has been opened
    and nothing is written."""
    count = itertools.count()

    def hook(event, args):
        opens = event == "open" and isinstance(args[1], str) and set("wax") & set(args[1])
        moves = event in ("os.rename", "os.rmdir", "shutil.rmtree")
        moves = moves or event == "os.remove" and not str(args[0]).endswith(".part")
        if (opens or moves) and next(count) == n:
            if opens:
                os.open(args[0], os.O_CREAT | os.O_WRONLY | os.O_TRUNC * ("a" not in args[1]))
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return command(out, "--name=run", "--resume")


def test_killed_at_any_change_of_a_file_and_resumed_is_never_killed(tmp_path, never_killed):
    """Between two changes of files a kill leaves nothing but what the one before has left."""
    for n in itertools.count():
        out = tmp_path / str(n)
        code, printed = Child(tmp_path / "log", command_that_dies, n, out).ended()
        if code == 0:
            break
        assert code == -signal.SIGKILL, printed
        code, printed = Child(tmp_path / "log", command, out, "--name=run", "--resume").ended()
        assert code == 0, printed
        assert_same_run(out / "run", never_killed)
        shutil.rmtree(out)
    assert n > 20


def test_a_cut_off_checkpoint_is_passed_over_aloud(tmp_path, whole, capsys):
    with pytest.raises(Killed):
        train(tmp_path / "run", at_iteration(5, killed))
    (tmp_path / "run/checkpoints/step-0000004/.metadata").unlink()
    state = train(tmp_path / "run", resume=True)
    captured = capsys.readouterr()
    assert "step-0000004: cut off, passed over" in captured.err
    assert "going on from" in captured.out and "step-0000002" in captured.out
    assert tiny.same(tiny.everything(state), whole[1])
    assert log_of(tmp_path / "run") == log_of(whole[0])


def test_the_teacher_is_frozen_whatever_its_mode(tmp_path):
    world = tiny.World(RECIPE)
    before = tiny.weights(world.teacher.train().requires_grad_(True))
    state = train(tmp_path / "run", world)
    assert not any(m.training or m._forward_hooks for m in world.teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in world.teacher.parameters())
    assert torch.equal(tiny.weights(world.teacher), before) and state.student.training


def test_checkpoints_are_kept_as_asked(tmp_path):
    (tmp_path / "checkpoints" / "step-0000006").mkdir(parents=True)  # cut off by a kill
    for step in (2, 3, 4):
        ladd.save_checkpoint(tmp_path, step, {"x": torch.ones(1)}, keep=2)
    assert [*ladd.checkpoints(tmp_path)] == [3, 4]


def test_a_resume_knows_the_best_student_and_the_updates_that_were_skipped(tmp_path):
    def scored(killed_in):
        world = at_iteration(killed_in, killed)
        world.evaluate = lambda student, run, step: {"score": float(step)}
        return world

    run, options = tmp_path / "run", {"evaluate_every": 1, "losses": tiny.not_finite({3, 4, 5})}
    with pytest.raises(Killed):
        train(run, scored(5), checkpoint_every=1, **options)
    best = (run / "best.safetensors").stat().st_mtime_ns
    with pytest.raises(ladd.UserError, match="iteration 6: three non-finite gradients"):
        train(run, scored(9), resume=True, **options)
    train(run, scored(9), resume=True, **{**options, "losses": tiny.not_finite({})})
    assert (run / "best.safetensors").stat().st_mtime_ns == best


def command_that_waits(out, place):
    """A job that waits in iteration 3 or in a checkpoint."""

    def wait(*args):
        (out / "waiting").touch()
        while True:  # short naps, because a signal that comes just before one does not end it
            time.sleep(0.05)

    if place == "background":  # as a shell starts a job there: without Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if place == "checkpoint":
        dcp.FileSystemWriter.write_data = wait
    else:
        MODULE.make_world = lambda *args: at_iteration(3, wait, make_world(*args))
    return command(out, "--name=run")


def waiting_child(out, place="iteration"):
    process = Child(out / "log", command_that_waits, out, place)
    while not (out / "waiting").exists():
        assert process.is_alive(), process.log.read_text()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("place", ["iteration", "background", "checkpoint"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_job_ends_with_one_line_and_130(tmp_path, never_killed, place, number):
    process = waiting_child(tmp_path, place)
    os.kill(process.pid, number)
    code, printed = process.ended()
    assert code == 130 and "stopped" in tiny.one_line(printed)
    assert command(tmp_path, "--name=run", "--resume") == 0
    assert_same_run(tmp_path / "run", never_killed)


@pytest.mark.parametrize("name, every", [("evaluate", 1), ("checkpoint", 1), ("log", 4)])
def test_evaluation_checkpoints_and_log_do_not_change_the_run(tmp_path, whole, name, every):
    state = train(tmp_path / "run", **{f"{name}_every": every})
    assert tiny.same(tiny.everything(state), whole[1])


def test_the_averaged_student_is_evaluated_and_the_best_is_kept(tmp_path):
    seen, scores = [], {2: 3.0, 3: 1.0, 4: 0.8}  # the last is no better than by chance
    world = tiny.World(RECIPE)

    def evaluate(student, run, step):
        seen.append((step, tiny.weights(student)))
        return {"score": scores.get(step, 9.0), "score_error": 0.25}

    world.evaluate = evaluate
    state = train(tmp_path / "run", world, evaluate_every=1)
    steps = [step for step, _ in seen]
    assert steps == [1, 2, 3, 4, 5] and state.best == 1.0
    best = load_file(tmp_path / "run/best.safetensors")
    flat = torch.cat([best[k].flatten() for k, _ in world.teacher.named_parameters()])
    assert torch.equal(flat, seen[2][1])
    with state.averaged() as student:
        assert not torch.equal(tiny.weights(student), seen[-1][1])
    log = log_of(tmp_path / "run")
    assert [line["score"] for line in log if "score" in line] == [9.0, 3.0, 1.0, 0.8, 9.0]


def test_the_log_has_the_mean_of_each_window(tmp_path, whole):
    train(tmp_path / "run", log_every=4)
    lines, every = log_of(tmp_path / "run"), log_of(whole[0])
    assert [line["iteration"] for line in lines] == [4, 6]
    for line, part in zip(lines, (every[:4], every[4:]), strict=True):
        for name in ("heads_loss", "student_loss", "student_grad_norm"):
            values = [one[name] for one in part if name in one]
            assert line[name] == pytest.approx(sum(values) / len(values), rel=1e-9)
    for line in tiny.log_of(tmp_path / "run"):
        assert line["samples_per_second"] == pytest.approx(RECIPE.batch / line["seconds"])


def test_the_log_has_the_most_memory_of_a_gpu_since_the_last_line(tmp_path, monkeypatch, capsys):
    """On a GPU that is made up: the run computes on the CPU. A command's end prints it too."""
    world, state_of, peaks = tiny.World(RECIPE), ladd.State, [3e9, 2e9, 1e9]

    def on_the_cpu(world, recipe, device, dtype):
        del world.teacher.parameters
        return state_of(world, recipe, tiny.CPU, dtype)

    parameter = types.SimpleNamespace(device=torch.device("cuda"), requires_grad_=bool)
    world.teacher.parameters = lambda: iter([parameter])
    monkeypatch.setattr(ladd, "State", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: [*peaks, 4e9][0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.pop(0))
    train(tmp_path / "run", world, log_every=2)
    assert [line["peak_gb"] for line in tiny.log_of(tmp_path / "run")] == [3, 2, 1]
    assert ladd.run_command_line(lambda argv: None, []) == 0
    assert capsys.readouterr().out.endswith("\npeak_gb 4.000\n")


def test_config_holds_recipe_difference_data_and_versions(never_killed, tmp_path, capsys):
    config = json.loads((never_killed / "config.json").read_text())
    assert config["recipe"]["batch"] == 12 and config["recipe"]["taps"] == ["first"]
    assert config["data"] == {"tiny": 0} and config["torch"] == torch.__version__
    assert config["diff"]["student_lr"] == [1e-4, 0.01] and "beta2" not in config["diff"]
    assert command(tmp_path, "--name=a b", "--iterations=2") == 0
    assert "student_lr = 0.01 (not 0.0001)" in capsys.readouterr().out


def test_collapse_is_called_out_and_ends_the_run_when_asked(tmp_path, capsys):
    world = tiny.World(RECIPE)
    world.collapse = ["one hue"]
    train(tmp_path / "warned", world, evaluate_every=3)
    assert "collapse? one hue" in capsys.readouterr().out
    with pytest.raises(ladd.UserError, match="collapsed at iteration 3"):
        train(tmp_path / "ended", world, evaluate_every=3, stop_on_collapse=True)
    assert max(ladd.checkpoints(tmp_path / "ended")) == 3


def test_a_run_that_exists_is_refused_or_resumed_under_the_same_recipe_and_data(tmp_path, whole):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    before = (run / "config.json").read_bytes()
    with pytest.raises(ladd.UserError, match="--name run: .* exists; give another name"):
        train(run)
    other = tiny.make_recipe(**{**FIELDS, "student_lr": 0.02}, lr_decay="cosine")
    with pytest.raises(ladd.UserError, match="student_lr = 0.02 .was 0.01.*start a new run"):
        train(run, recipe=other, resume=True)
    with pytest.raises(ladd.UserError, match="tiny = 5 .was 0"):
        train(run, tiny.World(RECIPE, seed=5), resume=True)
    assert (run / "config.json").read_bytes() == before


def command_at_once(barrier, out, *words):
    """A start that makes its world at the same time as others."""
    MODULE.make_world = lambda *args: barrier.wait(60) * 0 or make_world(*args)
    return command(out, *words)


def two_starts(folder, *words):
    """How two starts at once end, in order of their exit codes: (code, what it printed, seed)."""
    start = command_at_once, FORKS.Barrier(2), folder / "out"
    starts = [Child(folder / f"log-{k}", *start, f"--seed={k}", *words) for k in (1, 2)]
    return sorted((*start.ended(), seed) for seed, start in enumerate(starts, 1))


def test_of_two_starts_with_one_name_one_is_refused(tmp_path):
    (first, _, winner), (second, printed, _) = two_starts(tmp_path, "--name=one")
    assert (first, second) == (0, 2) and "--name one" in tiny.one_line(printed)
    config = json.loads((tmp_path / "out/one/config.json").read_text())
    assert config["recipe"]["seed"] == winner


def test_an_out_that_leads_nowhere_is_an_error_and_not_tried_for_ever(tmp_path, monkeypatch):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    monkeypatch.setattr(ladd.itertools, "count", lambda first: [first])
    with pytest.raises(FileExistsError):
        ladd.numbered_folder(tmp_path / "out")


def test_two_starts_without_a_name_get_numbers_of_their_own(tmp_path):
    assert [code for code, _, _ in two_starts(tmp_path, "--iterations=2")] == [0, 0]
    for name in ("001", "002"):
        assert (tmp_path / "out" / name / "student.safetensors").exists()


def test_a_live_run_is_not_resumed_beside_itself(tmp_path, never_killed, capsys):
    process = waiting_child(tmp_path)
    assert command(tmp_path, "--name=run", "--resume") == 2
    assert "--name run: another process" in tiny.one_line(capsys.readouterr().err)
    process.kill()
    process.join()
    assert command(tmp_path, "--name=run", "--resume") == 0  # the lock has ended with its process
    assert_same_run(tmp_path / "run", never_killed)


def command_on_a_full_disk(out, name):
    """From this function on no file of more than so many bytes can be written."""
    limit = 1000 if name == "write_json" else 9000
    owner = tiny.World if name == "finish" else ladd
    work = getattr(owner, name)

    def limited(*args, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return work(*args, **options)

    setattr(owner, name, limited)
    return command(out, "--name=run")


@pytest.mark.parametrize("name", ["write_json", "save_checkpoint", "evaluate", "finish"])
def test_a_full_disk_is_one_line_and_the_run_can_go_on(tmp_path, never_killed, name):
    log = tmp_path / "log"
    code, printed = Child(log, command_on_a_full_disk, tmp_path, name).ended()
    assert code == 2 and "File too large" in tiny.one_line(printed)
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "run/student.safetensors").exists()
    assert command(tmp_path, "--name=run", "--resume") == 0
    assert_same_run(tmp_path / "run", never_killed)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError), ladd.replacing(path) as part:
        part.write_text("half")
        raise OSError
    assert [*tmp_path.iterdir()] == [path] and path.read_text() == "old"


FULL = {**ladd.GAME, **ladd.TARGETS, "distill_own": False}
FULL |= {"iterations": 6, "batch": 12, "share_noise": False, "clip": 1e9}
FULL["head_lr"] = 0.0  # else AdamW's first step, of the gradient's sign, enlarges rounding


def one_iteration(rank=0, folder=None):
    """What the losses are given, and the gradients, of iteration 3."""
    recipe = tiny.make_recipe(**FULL)
    world = tiny.World(recipe)
    state, spy = tiny.make_state(world, recipe), tiny.Spy()
    grads = tiny.record_grads(state)
    spy.step(state, world, recipe, 3)
    return spy.joint(), {k: tiny.flat(steps[0]) for k, steps in grads.items()}


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_a_batch_and_take_the_gradients_of_one(tmp_path, size):
    joint, alone = one_iteration()
    found = on_ranks(size, tmp_path, one_iteration)
    for name, value in joint.items():
        parts = torch.cat([batch[name] for batch, _ in found])
        if name == "x_t":  # what the student has made, in other batches
            torch.testing.assert_close(parts, value, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(parts, value), name
    for _, grads in found:
        for name, grad in grads.items():
            assert float((grad - alone[name]).norm() / alone[name].norm()) < 1e-5, name
            assert torch.equal(grad, found[0][1][name])


def trouble(rank, folder):
    """Trouble on rank 1 alone, and what becomes of it on this rank."""
    world = tiny.World(RECIPE)
    state = tiny.make_state(world, RECIPE)
    steps = tiny.run_steps(state, world, RECIPE, range(4), losses=tiny.not_finite({2}, 0, 1))
    assert [metrics["skipped"] for metrics in steps] == [0, 0, 1, 0]
    assert all(v.isfinite().all() for v in tiny.everything(state).values())
    with pytest.raises(ladd.UserError, match="iteration 6: three non-finite gradients"):
        train(folder / "diverged", losses=tiny.not_finite({3, 4, 5}, 0, 1))
    world.collapse = ["all alike"] * rank
    with pytest.raises(ladd.UserError, match="collapsed at iteration 3"):
        train(folder / "collapsed", world, evaluate_every=3, stop_on_collapse=True)


def test_trouble_on_one_rank_is_trouble_on_both(tmp_path):
    on_ranks(2, tmp_path, trouble)


def heads_at_start(rank, folder=None):
    """The heads of a world that draws weights and measures features otherwise on each rank."""
    world = tiny.World(RECIPE)
    features = world.features

    def head(*args):
        torch.manual_seed(rank)
        return ladd.Head(*args)

    world.head = head
    world.features = lambda *args: [f * (1 + rank) for f in features(*args)]
    return tiny.make_state(world, RECIPE).heads.state_dict()


def test_every_rank_starts_with_the_heads_of_the_first(tmp_path):
    first, second = on_ranks(2, tmp_path, heads_at_start)
    assert tiny.same(first, heads_at_start(0)) and tiny.same(second, first)


SLOW = {**FIELDS, "student_lr": 1e-3, "head_lr": 1e-3}  # since AdamW enlarges rounding


def some_iterations(rank, folder):
    """Resume the run and train it up to 2 iterations further."""
    done = max(ladd.checkpoints(folder / "run"), default=0)
    recipe = tiny.make_recipe(**{**SLOW, "iterations": done + 2})
    state = train(folder / "run", recipe=recipe, resume=True, evaluate_every=1)
    return tiny.everything(state)


def test_a_run_goes_from_2_ranks_to_1_and_to_3(tmp_path):
    two = on_ranks(2, tmp_path, some_iterations)
    assert tiny.same(*two)
    alone = some_iterations(0, tmp_path)
    assert alone.keys() == two[0].keys() and not tiny.same(alone, two[0])
    three = on_ranks(3, tmp_path, some_iterations)
    assert tiny.same(three[0], three[1]) and tiny.same(three[1], three[2])
    train(tmp_path / "alone", recipe=tiny.make_recipe(**SLOW), evaluate_every=1)
    log, expected = log_of(tmp_path / "run"), log_of(tmp_path / "alone")
    training = [[line for line in lines if "heads_loss" in line] for lines in (log, expected)]
    assert [line["iteration"] for line in training[0]] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(*training, strict=True):
        for name in {"heads_loss", "student_loss", "heads_grad_norm"} & {*line, *other}:
            assert line[name] == pytest.approx(other[name], rel=1e-3), name


def a_cell(folder):
    """A run in a thread, beside the caller's own signal handlers and pictures."""
    import matplotlib

    matplotlib.use("svg")
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(command, folder, "--name=run").result() == 0
        pool.submit(importlib.import_module, "toy_mnist.world").result()
    assert matplotlib.get_backend() == "svg"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_notebook_trains_in_a_thread(tmp_path):
    code, printed = Child(tmp_path / "log", a_cell, tmp_path).ended()
    assert code == 0, printed


def test_a_refusal_leaves_a_folder_of_other_things_as_it_was(tmp_path):
    recipe = tiny.make_recipe(paired_share=0.5)
    world = tiny.World(recipe)
    world.noise = None
    (tmp_path / "mine").touch()
    with pytest.raises(ladd.UserError, match="paired_share.* stores no noise"):
        train(tmp_path, world, recipe)
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"mine"}


BAD = {
    "unknown option": ("--nonsense=1", "--nonsense"),
    "an abbreviation": ("--iter=3", "--iter"),
    "not a number": ("--head-lr=fast", "head_lr = 'fast'"),
    "not a number of the world's": ("--data=many", "--data"),
    "not a flag's value": ("--share-noise=perhaps", "share_noise"),
    "an unknown tap": ("--taps=first,fourth", "fourth"),
    "no tap": ("--taps=", "taps = ()"),
    "one sample": ("--batch=1", "batch = 1: give each rank an even number"),
    "no divisor": ("--micro-batch=5", "--micro-batch 5"),
    "an unknown recipe": ("--recipe=best", "tiny, other"),
    "an unknown device": ("--device=hpu", "--device hpu"),
    "a folder in the name": ("--name=a/b", "--name a/b"),
    "no name to resume": ("--resume", "--name"),
}


@pytest.mark.parametrize("word, words", BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_run(tmp_path, capsys, word, words):
    tiny.refused(capsys, command(tmp_path, word), words)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_the_modes_of_the_umask_and_is_replaced_whole(tmp_path, monkeypatch):
    os.umask(umask := os.umask(0))
    removed, rmtree = [], shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda p, **how: removed.append(p) or rmtree(p, **how))
    for _ in range(2):
        with ladd.replacing(tmp_path / "a" / "folder") as part:
            part.mkdir(mode=0o700)
            (part / "file").touch(0o600)
    assert tmp_path / "a/folder" not in removed and len([*(tmp_path / "a").iterdir()]) == 1
    for path in (tmp_path / "a").rglob("*"):
        want = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == want & ~umask, path


@pytest.mark.parametrize("size, batch", [(5, 12), (12, 12)], ids=["not divisible", "one each"])
def test_a_batch_that_the_ranks_do_not_share_is_refused(tmp_path, monkeypatch, size, batch):
    monkeypatch.setattr(ladd, "world_size", lambda: size)
    monkeypatch.setattr(ladd, "on_rank0", lambda make: make())
    with pytest.raises(ladd.UserError, match=f"batch = {batch}: give each rank an even"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_recipe_by_name_by_file_and_by_field(tmp_path, never_killed):
    file = never_killed / "config.json"
    assert command(tmp_path, "--name=a", "--recipe=other", "--times=1,0.5,0.25,0.1") == 0
    assert command(tmp_path, "--name=b", f"--recipe={file}", "--iterations=2") == 0
    a, b = (json.loads((tmp_path / n / "config.json").read_text())["recipe"] for n in "ab")
    assert a["batch"] == 4 and a["times"] == [1.0, 0.5, 0.25, 0.1]
    assert b == {**json.loads(file.read_text())["recipe"], "iterations": 2}


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        command("runs", "--help")
    printed = capsys.readouterr().out
    assert end.value.code == 0
    for cls in (ladd.Recipe, ladd.Options):
        for name in cls.__dataclass_fields__:
            assert f"--{name.replace('_', '-')} " in printed
    assert "euler|renoise" in printed and "(1.0,0.75,0.5,0.25)" in printed  # as it is to be typed
