"""Z-Image's export, pictures and figures, on a tiny random pipeline: stock diffusers samples an export as ladd samples its student."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import ladd
import tiny_zimage
from zimage import adapter, evaluate, export, sample, sampling

TIMES = [1.0, 0.75, 0.5, 0.25]
PROMPTS = ["a red fox in the snow", "a harbour in the evening, with three boats and a lighthouse behind them", "tea"]
SMALL = ["--resolution", "32", "--teacher-steps", "2", "--dtype", "float32", "--device", "cpu"]


def make_run(folder, base, times=TIMES, sampler="euler", student=None, **config):
    """A finished run's folder, written by hand."""
    (folder / "student").mkdir(parents=True)
    if student is None:
        tiny_zimage.transformer(seed=5).save_pretrained(folder / "student")
    else:
        shutil.copytree(student, folder / "student", dirs_exist_ok=True)
    ladd.write_json(folder / "student" / "about.json", {"iteration": 70, "weights": "average", "dtype": "float32"})
    recipe = {"iterations": 70, "batch": 4, "times": times, "sampler": sampler, "seed": 0, "taps": ["1", "3"]}
    made_by = {"world": "zimage", "recipe": recipe, "model": str(base), "data": {}, "drift": {}}
    ladd.write_json(folder / "config.json", {**made_by, **config})
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base (a tiny pipeline), run (a finished run), exported, and prompts.txt, all in one folder."""
    folder = tmp_path_factory.mktemp("zimage")
    base = tiny_zimage.save(folder / "base")
    run = make_run(folder / "runs" / "one", base, data={"teacher": adapter.model_fingerprint(base)})
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    assert export.main([str(run), "--out", str(folder / "exported"), "--dtype", "float32"]) == 0
    return SimpleNamespace(folder=folder, base=base, run=run, exported=folder / "exported", prompts=str(folder / "prompts.txt"))


@pytest.fixture
def run(place, tmp_path):
    """A run of its own for a test that writes into it."""
    return make_run(tmp_path / "mine", place.base, student=place.run / "student")


def stock(folder):
    pipe = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def told(transformer, store):
    """Record the time that every pass of the transformer is told."""
    return transformer.register_forward_pre_hook(lambda module, args: store.append(args[1].clone()))


def conditions(pipe, prompts):
    captions = adapter.encode(pipe, prompts)
    return adapter.Prompts(captions, torch.zeros(len(captions), 1)), adapter.encode(pipe, [""])[0]


def noise(n, h, w):
    return torch.stack([adapter.noise_for(0, i, h // 8, w // 8) for i in range(n)])


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))


# ---- export ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, size", [(4, (32, 64)), (3, (32, 32)), (2, (64, 32)), (1, (48, 32))])
def test_stock_pipeline_samples_the_export_as_ladd_samples_the_student(place, n, size):
    pipe, prompts, z = stock(place.exported), PROMPTS[:2], noise(2, *size)
    times, seen = ladd.step_times(TIMES, n), []
    call = eval(f"dict({export.call_for(times)})")              # what the card tells its reader to write
    handle = told(pipe.transformer, seen)
    made = pipe(list(prompts), latents=z, output_type="latent", height=size[0], width=size[1], **call).images
    handle.remove()
    assert len(seen) == n, "exactly N evaluations of the network"
    assert torch.equal(torch.stack(seen), 1 - torch.tensor(times)[:, None].expand(n, 2)), "told 1 - t, at the trained times alone"

    student = sampling.load_student(sampling.open_run(place.run), torch.float32)
    cond, _ = conditions(pipe, prompts)
    ours = ladd.sample_euler(adapter.ZImageVelocity(student), z, times, cond)
    assert made.shape == ours.shape == (2, 16, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(made, ours, atol=1e-5, rtol=0)
    untrained = ladd.sample_euler(adapter.ZImageVelocity(adapter.load_transformer(place.base / "transformer", torch.float32)), z, times, cond)
    assert (ours - untrained).abs().max() > 0.1, "the student is told from the base model"


def test_renoise_export_adds_fresh_noise_between_the_steps(place, tmp_path):
    run = make_run(tmp_path / "runs" / "two", place.base, sampler="renoise", student=place.run / "student")
    assert export.main([str(run), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    pipe, z = stock(tmp_path / "out"), noise(1, 32, 32)
    torch.manual_seed(3)
    made = pipe(PROMPTS[0], latents=z, num_inference_steps=4, guidance_scale=0, output_type="latent", height=32, width=32).images
    torch.manual_seed(3)                                        # diffusers draws from the global generator
    ours = ladd.sample_renoise(adapter.ZImageVelocity(pipe.transformer), z, TIMES, conditions(pipe, PROMPTS[:1])[0],
                               lambda k: torch.randn(z.shape))
    torch.testing.assert_close(made, ours, atol=1e-5, rtol=0)
    assert "torch.manual_seed(0)" in (tmp_path / "out" / "README.md").read_text()
    assert "torch.manual_seed" not in (place.exported / "README.md").read_text()


@pytest.mark.parametrize("times, calls", [
    (TIMES, {4: "num_inference_steps=4", 3: "sigmas=[1.0, 0.75, 0.5]", 2: "num_inference_steps=2", 1: "num_inference_steps=1"}),
    ([1.0, 2 / 3, 1 / 3], {3: "num_inference_steps=3", 2: f"sigmas=[1.0, {2 / 3}]", 1: "num_inference_steps=1"}),
    ([1.0, 0.9, 0.5], {3: "sigmas=[1.0, 0.9, 0.5]", 2: "sigmas=[1.0, 0.9]", 1: "num_inference_steps=1"}),
    ([1.0], {1: "num_inference_steps=1"})])
def test_the_call_for_each_number_of_steps(times, calls):
    run = SimpleNamespace(times=times)
    assert {n: arguments for n, _, arguments in export.calls(run)} == {n: f"{c}, guidance_scale=0" for n, c in calls.items()}
    for n, ours, _ in export.calls(run):
        assert ours == ladd.step_times(times, n)


def test_the_scheduler_has_no_shift_and_gives_the_calls_times(place):
    pipe = stock(place.exported)
    config = pipe.scheduler.config
    assert config.shift == 1 and not config.use_dynamic_shifting and not config.stochastic_sampling
    assert stock(place.base).scheduler.config.shift == 6
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.5])
    torch.testing.assert_close(pipe.scheduler.sigmas, torch.tensor([1, 0.9, 0.5, 0]))


def test_the_card(place, tmp_path):
    card = (place.exported / "README.md").read_text()
    for words in ("Not evaluated.", "iteration 70", str(place.base), "| times | 1.0, 0.75, 0.5, 0.25 |", "| taps | 1, 3 |",
                  "library_name: diffusers", "`pipe(prompt, sigmas=[1.0, 0.75, 0.5], guidance_scale=0)`",
                  'from_pretrained("exported", dtype=torch.float32)'):
        assert words in card, words
    assert "base_model" not in card                             # a local folder is nothing to a hub
    assert not [p for p in place.exported.rglob("*.json") if str(place.folder) in p.read_text()], "no path of this machine is shared"

    run = make_run(tmp_path / "r", "some/model", student=place.run / "student")
    row = {"name": "student@4", "steps": 4, "nfe": 4, "kid_mean": 0.0125, "kid_std": 0.00025, "fid_mean": 31.5, "fid_std": None,
           "clip_mean": None, "clip_std": None, "ms_per_image": None}
    ladd.write_json(run / "report.json", {"rows": [row], "conditions": {
        "iteration": 60, "images_per_seed": 50, "seeds": [0, 1, 2], "resolution": 512, "guidance": 5.0,
        "features": "clean-fid's Inception", "clip": None, "device": "H200", "dtype": "bfloat16", "batch": 4}})
    card = export.model_card(sampling.open_run(run, place.base), "x", "bfloat16", 1)
    for words in ("base_model: some/model", "huggingface.co/some/model", "| student@4 | 4 | 4 | 0.01250 ± 0.00025 | 31.50 | - | - |",
                  "Measured at iteration 60", "FID is biased", "num_inference_steps=1, guidance_scale=0).images"):
        assert words in card, words


def test_export_is_whole_or_not_there(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    (tmp_path / "out.part").mkdir()                             # what a killed export left
    (tmp_path / "out.part" / "half").touch()

    def full_disk(self, folder):
        Path(folder).mkdir()
        raise OSError(28, "No space left")
    with monkeypatch.context() as m:
        m.setattr(ZImagePipeline, "save_pretrained", full_disk)
        assert export.main([str(place.run), "--out", str(out), "--dtype", "float32"]) == 2
    assert "No space left" in capsys.readouterr().err and files(tmp_path) == []
    out.mkdir()                                                 # an empty folder may stand there
    assert export.main([str(place.run), "--out", str(out), "--dtype", "bfloat16"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"] and "half" not in files(out)
    assert {v.dtype for v in load_file(next((out / "transformer").glob("*.safetensors"))).values()} == {torch.bfloat16}


# ---- errors ----------------------------------------------------------------------------------------------------------

def damage(path, change):
    """Write a JSON file anew after change(value)."""
    value = json.loads(path.read_text())
    change(value)
    ladd.write_json(path, value)


def lose_weight(run):
    path = next((run / "student").glob("*.safetensors"))
    save_file({k: v for k, v in load_file(path).items() if k != "layers.0.attention.to_q.weight"}, path, metadata={"format": "pt"})


def cut_off(run):
    path = next((run / "student").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:5000])


RUN_ERRORS = {      # what is done to the run, and what the line must say
    "no folder": (shutil.rmtree, ("config.json", "runs/001")),
    "no JSON": (lambda r: (r / "config.json").write_text("{"), ("config.json", "can't be read")),
    "no object": (lambda r: (r / "config.json").write_text("[]"), ("config.json", "no JSON object")),
    "another world": (lambda r: damage(r / "config.json", lambda c: c.update(world="toy")), ("'toy'", "--zimage")),
    "no times": (lambda r: damage(r / "config.json", lambda c: c["recipe"].pop("times")), ("config.json", "times")),
    "no sampler": (lambda r: damage(r / "config.json", lambda c: c["recipe"].update(sampler="heun")), ("config.json", "sampler")),
    "no student": (lambda r: shutil.rmtree(r / "student"), ("student/", "--resume --name mine")),
    "no about": (lambda r: (r / "student" / "about.json").unlink(), ("about.json", "--resume")),
    "damaged report": (lambda r: (r / "report.json").write_text('{"rows": [{}]}'), ("report.json", "zimage.evaluate")),
    "no model": (lambda r: damage(r / "config.json", lambda c: c.pop("model")), ("--model ID_OR_DIR",)),
    "model is gone": (lambda r: damage(r / "config.json", lambda c: c.update(model="/nowhere/base")), ("--model /nowhere/base",)),
    "another model": (lambda r: damage(r / "config.json", lambda c: c["data"].update(teacher="0" * 64)), ("--model", "not the model")),
    "another shape": (lambda r: damage(r / "student" / "config.json", lambda c: c.update(n_layers=3)),
                      ("n_layers = 3 (was 4)", "--model")),
    "lost weight": (lose_weight, ("student", "layers.0.attention.to_q.weight", "--resume")),
    "cut off": (cut_off, ("student", "can't be loaded", "--resume")),
}


def refused(module, argv, words, folder, capsys, **more):
    """Exit code 2, one line with these words, and nothing written into folder."""
    before = files(folder)
    capsys.readouterr()
    assert module.main([str(a) for a in argv], **more) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith(f"zimage.{module.__name__.split('.')[1]}: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0] and "Traceback" not in err
    for word in words:
        assert word in lines[0], (word, lines[0])
    assert files(folder) == before


@pytest.fixture
def no_hub(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)


@pytest.mark.parametrize("case", RUN_ERRORS)
def test_export_refuses_a_run_that_it_cannot_export(case, run, tmp_path, capsys, no_hub):
    spoil, words = RUN_ERRORS[case]
    spoil(run)
    refused(export, [run, "--out", tmp_path / "out", "--dtype", "float32"], words, tmp_path, capsys)


@pytest.mark.parametrize("argv, words", [
    (["--out", "full"], ("--out", "not empty", "another folder")), (["--out", "full/file"], ("--out", "is a file")),
    (["--out", "full/file/deeper"], ("--out", "can't be written")),
    (["--out", "new", "--steps", "5"], ("--steps 5", "1 .. 4")), (["--out", "new", "--steps", "0"], ("--steps 0", "1 .. 4")),
    ([], ("--out",)), (["--out", "new", "--dtype", "int8"], ("--dtype", "bfloat16")),
    (["--out", "new", "--model", "full"], ("--model", "model_index.json"))])
def test_export_refuses_bad_options(argv, words, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    refused(export, [place.run, *argv], words, tmp_path, capsys)
    assert (tmp_path / "full" / "file").read_text() == "precious"


def test_export_needs_a_diffusers_whose_sigmas_end_right(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusers.__version__", "0.38.2")
    refused(export, [place.run, "--out", tmp_path / "out"], ("0.38.2", "pip install 'diffusers>=0.40'"), tmp_path, capsys)


SAMPLING_ERRORS = [
    (["--steps", "5"], ("--steps 5", "1 .. 4")), (["--steps", "0,1"], ("--steps '0,1'",)),
    (["--steps", "2,2"], ("--steps '2,2'", "different")),
    (["--steps", "x"], ("--steps 'x'", "whole numbers")), (["--teacher-steps", "0"], ("--teacher-steps 0", "at least 1")),
    (["--guidance", "nan"], ("--guidance nan",)), (["--guidance", "-1"], ("--guidance -1",)),
    (["--resolution", "40"], ("--resolution 40", "multiple of 16")), (["--resolution", "2048"], ("--resolution 2048", "1024")),
    (["--batch", "0"], ("--batch 0", "at least 1")), (["--device", "tpu"], ("--device tpu",)),
    (["--prompts", "nowhere.txt"], ("--prompts nowhere.txt",)), (["--dtype", "int8"], ("--dtype",)), (["--stepz", "4"], ("--stepz",))]


@pytest.mark.parametrize("module, argv, words", [
    *((m, argv, words) for m in (sample, evaluate) for argv, words in SAMPLING_ERRORS),
    (sample, ["--count", "0"], ("--count 0", "at least 1")), (sample, ["--seed", "-1"], ("--seed -1",)),
    (sample, ["--out", "x.jpg"], ("--out x.jpg", ".png")), (sample, ["--out", "nowhere/x.png"], ("--out nowhere/x.png", "exists")),
    (sample, ["--prompt", "a", "--prompts", "b"], ("--prompt",)), (evaluate, ["--seeds", "x"], ("--seeds 'x'",)),
    (evaluate, ["--seeds", "1,1"], ("--seeds '1,1'", "different")), (evaluate, ["--seeds=-1"], ("--seeds '-1'",)),
    (evaluate, ["--prompts", "one.txt"], ("--prompts one.txt", "at least 2")),
    (evaluate, ["--clip", "one.txt"], ("--clip one.txt", "leave it out"))])
def test_sampling_refuses_bad_options(module, argv, words, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)       # it would try for half a minute
    (tmp_path / "one.txt").write_text("a prompt\n")
    argv = argv if "--prompts" in argv or "--prompt" in argv else [*argv, "--prompts", place.prompts]
    before = files(place.run)
    refused(module, [place.run, *argv], words, tmp_path, capsys, **({"features": net} if module is evaluate else {}))
    assert files(place.run) == before


def test_inception_is_asked_for_before_the_images(place, tmp_path, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no network")
    monkeypatch.setattr("cleanfid.inception_torchscript.check_download_inception", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    before = files(place.run)
    argv = [place.run, "--prompts", place.prompts, *SMALL]
    (tmp_path / "home" / "hub" / "clean-fid").mkdir(parents=True)
    refused(evaluate, argv, ("--features inception", "URLError", evaluate.INCEPTION), tmp_path, capsys)
    refused(evaluate, [*argv, "--features", tmp_path], ("--features", f"holds no {evaluate.INCEPTION}"), tmp_path, capsys)
    (tmp_path / evaluate.INCEPTION).write_text("not a network")
    refused(evaluate, [*argv, "--features", tmp_path], ("--features", "can't be loaded"), tmp_path, capsys)
    assert files(place.run) == before


# ---- sampling --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("made, given, guidance, steps", [
    ({"latents.guidance": 3.5, "latents.steps": 28}, [], 3.5, 28), ({}, [], 5.0, 50),
    ({"latents.guidance": 3.5, "latents.steps": 28}, ["--guidance", "2", "--teacher-steps", "9"], 2.0, 9)])
def test_the_teacher_is_sampled_as_the_runs_latents_were(place, tmp_path, made, given, guidance, steps):
    run = sampling.open_run(make_run(tmp_path / "r", place.base, student=place.run / "student", data=made))
    parser = sampling.parser_for("sample", "")
    sampling.add_sampling_arguments(parser)
    options = parser.parse_args([str(run.folder), "--device", "cpu", *given])
    sampling.check_sampling(options, run)
    assert (options.guidance, options.teacher_steps) == (guidance, steps)


def test_a_scheduler_whose_times_are_others_is_refused(place, tmp_path, capsys):
    base = Path(shutil.copytree(place.base, tmp_path / "base"))
    damage(base / "scheduler" / "scheduler_config.json", lambda c: c.update(use_dynamic_shifting=True))
    refused(sample, [place.run, "--model", base, "--prompts", place.prompts, "--out", tmp_path / "x.png", *SMALL],
            ("its scheduler is no flow-matching Euler of fixed shift", "scheduler_config.json"), tmp_path, capsys)


@pytest.mark.parametrize("w", [1.0, 1.5, 5.0])
def test_the_teacher_is_sampled_as_its_pipeline_does(place, w):
    run, pipe, z = sampling.open_run(place.run), stock(place.base), noise(2, 32, 32)
    teacher = sampling.compared(run, [4], 3, w, [4])[0]
    cond, null = conditions(pipe, PROMPTS[:2])
    calls = []
    handle = told(pipe.transformer, calls)
    ours = sampling.sample_latents(adapter.ZImageVelocity(pipe.transformer), teacher, z, cond, null, None)
    handle.remove()
    assert len(calls) == teacher.nfe == (3 if w == 1 else 6)
    theirs = pipe(list(PROMPTS[:2]), latents=z, num_inference_steps=3, guidance_scale=w - 1, output_type="latent", height=32,
                  width=32).images
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_the_ways_that_are_compared(place):
    ways = sampling.compared(sampling.open_run(place.run), [4, 1], 50, 5.0, [4])
    assert [(w.name, w.weights, w.nfe, w.guidance) for w in ways] == [
        ("teacher@50", "base", 100, 5.0), ("student@4", "student", 4, 1.0), ("student@1", "student", 1, 1.0),
        ("untrained@4", "base", 4, 1.0)]
    assert list(ways[1].times) == list(ways[3].times) == TIMES and len(ways[0].times) == 50


def test_renoise_does_not_depend_on_the_batch(place):
    pipe, z = stock(place.exported), noise(3, 32, 32)
    velocity, way = adapter.ZImageVelocity(pipe.transformer), sampling.Way("student@4", "student", tuple(TIMES), "renoise")
    cond, null = conditions(pipe, ["tea"] * 3)
    keys = [(0, 0), (0, 1), (0, 2)]
    together = sampling.sample_latents(velocity, way, z, cond, null, keys)
    alone = torch.cat([sampling.sample_latents(velocity, way, z[i:i + 1], cond[i:i + 1], null, keys[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    other = sampling.sample_latents(velocity, way, z, cond, null, [(1, i) for i in range(3)])
    assert (other - together).abs().max() > 0.1


def test_batches_have_one_caption_length_each():
    captions = [torch.zeros(n, 2) for n in (1, 40, 32, 33, 5)]
    got = sampling.batches([(s, i) for s in (0, 1) for i in range(5)], captions, 4)
    assert sorted(itertools.chain(*got)) == [(s, i) for s in (0, 1) for i in range(5)]
    assert [len(b) for b in got] == [4, 2, 4] and all(len({adapter.padded_length(captions[i]) for _, i in b}) == 1 for b in got)


def test_the_picture_has_a_cell_for_every_prompt_and_way(place, tmp_path):
    out = tmp_path / "grid.png"
    argv = ["--prompts", place.prompts, "--count", "2", "--steps", "4,1", "--seed", "3", "--out", str(out), *SMALL]
    assert sample.main([str(place.run), *argv]) == 0
    scale, cell, _, head, left = sample.layout(32)
    picture = np.asarray(Image.open(out))
    assert picture.shape == (head + 2 * (cell + sample.GAP), left + 5 * (cell + sample.GAP), 3)     # teacher, 2 students, 2 untrained
    corner = lambda row, k: (head + row * (cell + sample.GAP), left + k * (cell + sample.GAP))
    cells = [picture[y:y + cell:scale, x:x + cell:scale] for y, x in (corner(r, k) for r in range(2) for k in range(5))]
    assert len({c.tobytes() for c in cells}) == 10, "each cell shows an image of its own"
    for k in range(5):                                          # every column bears its name, every row its prompt
        assert (picture[:head, corner(0, k)[1]:corner(0, k)[1] + cell] < 128).any()
    for row in range(2):
        assert (picture[corner(row, 0)[0]:corner(row, 0)[0] + cell, :left] < 128).any()
    assert files(tmp_path) == ["grid.png"]

    pipe, z = stock(place.exported), torch.stack([adapter.noise_for(3, i, 4, 4) for i in range(2)])     # row 1, student@4
    made = pipe(list(PROMPTS[:2]), latents=z, num_inference_steps=4, guidance_scale=0, output_type="np", height=32, width=32).images
    assert np.abs((made[1] * 255).round() - cells[5 + 1]).max() <= 1


def test_one_prompt_from_many_noises(place, tmp_path):
    argv = ["--prompt", "tea", "--count", "3", "--steps", "1", "--out", str(tmp_path / "tea.png"), *SMALL]     # one batch of three
    assert sample.main([str(place.run), *argv]) == 0
    scale, cell, _, head, left = sample.layout(32)
    picture, x = np.asarray(Image.open(tmp_path / "tea.png")), left + cell + sample.GAP                         # student@1
    z = torch.stack([adapter.noise_for(0, i, 4, 4) for i in range(3)])
    call = dict(num_inference_steps=1, guidance_scale=0, output_type="np", height=32, width=32)
    made = stock(place.exported)(["tea"] * 3, latents=z, **call).images
    for row in range(3):
        y = head + row * (cell + sample.GAP)
        assert np.abs((made[row] * 255).round() - picture[y:y + cell:scale, x:x + cell:scale]).max() <= 1


# ---- figures ---------------------------------------------------------------------------------------------------------

def make_net():
    torch.manual_seed(9)
    made = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return made.requires_grad_(False)


net = make_net()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny random CLIP with its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    folder, letters = tmp_path_factory.mktemp("clip"), list(bytes_to_unicode().values())
    words = letters + [x + "</w>" for x in letters] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)
    torch.manual_seed(2)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=8)
    start, end = words.index("<|startoftext|>"), words.index("<|endoftext|>")
    config = CLIPConfig(text_config=dict(small, vocab_size=len(words), max_position_embeddings=77,
                                         bos_token_id=start, eos_token_id=end, pad_token_id=end),
                        vision_config=dict(small, image_size=24, patch_size=8), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def evaluated(run, place, *argv, out=None, code=0):
    argv = [str(run), "--prompts", place.prompts, "--steps", "4,1", "--batch", "1", *SMALL, *map(str, argv)]
    assert evaluate.main([*argv, *(["--out", str(out)] if out else [])], features=net) == code
    return json.loads((run / "report.json").read_text()) if (run / "report.json").exists() else None


@pytest.fixture(scope="module")
def judged(place, clip, tmp_path_factory):
    """A run with its evaluation, three seeds."""
    run = make_run(tmp_path_factory.mktemp("judged") / "one", place.base, student=place.run / "student")
    return run, evaluated(run, place, "--clip", clip)


def pngs(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*.png"))}


def pixels(run, name, seed):
    paths = [run / "evaluation" / name / f"seed-{seed}" / f"{i:05d}.png" for i in range(len(PROMPTS))]
    return np.stack([np.asarray(Image.open(p)) for p in paths])


def features_of(images):
    return net(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).double().numpy()


def kid_by_hand(x, y):
    """The unbiased squared MMD under clean-fid's kernel (x.y / D + 1)^3, summed over pairs."""
    k, n = lambda a, b: (a @ b / len(a) + 1) ** 3, len(x)
    same = sum(k(v[i], v[j]) for v in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return same - 2 * sum(k(a, b) for a in x for b in y) / n ** 2


def fid_by_hand(x, y):
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()     # trace of the product's root
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root


def test_figures_equal_independent_ones(judged, clip):
    run, report = judged
    names = ["teacher@2", "student@4", "student@1", "untrained@4"]
    assert [r["name"] for r in report["rows"]] == names and [r["nfe"] for r in report["rows"]] == [4, 4, 1, 4]
    for row in report["rows"]:
        pairs = [(0, 1), (1, 2), (2, 0)]                        # every row against the teacher's images of another seed
        x = [(features_of(pixels(run, row["name"], s)), features_of(pixels(run, "teacher@2", other))) for s, other in pairs]
        for name, by_hand, tolerance in (("kid", kid_by_hand, 2e-6), ("fid", fid_by_hand, 1e-6)):
            values = [by_hand(a, b) for a, b in x]
            assert row["per_seed"][name] == pytest.approx(values, abs=tolerance)
            assert row[f"{name}_mean"] == pytest.approx(np.mean(values), abs=tolerance)
            assert row[f"{name}_std"] == pytest.approx(np.std(values, ddof=1), abs=tolerance)
        by_hand = [clip_by_hand(clip, pixels(run, row["name"], s)) for s in (0, 1, 2)]
        assert row["per_seed"]["clip"] == pytest.approx(by_hand, abs=1e-3) and max(by_hand) > 0
        assert row["ms_per_image"] > 0
    assert len({tuple(r["per_seed"]["kid"]) for r in report["rows"]}) == 4


def clip_by_hand(folder, images):
    from transformers import CLIPModel, CLIPProcessor
    model, processor, scores = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder), []
    for image, prompt in zip(images, PROMPTS):                  # one at a time: nothing is padded
        words = processor.tokenizer(prompt, truncation=True, return_tensors="pt")
        with torch.no_grad():
            text = model.text_projection(model.text_model(**words).pooler_output)[0].numpy()
            shown = processor.image_processor(Image.fromarray(image), return_tensors="pt")
            seen = model.visual_projection(model.vision_model(**shown).pooler_output)[0].numpy()
        scores.append(max(0.0, 100 * float(text @ seen / np.linalg.norm(text) / np.linalg.norm(seen))))
    return np.mean(scores)


def test_images_are_the_ones_the_stock_pipeline_makes(place, judged):
    run, _ = judged
    for folder, name, call in ((place.exported, "student@4", dict(num_inference_steps=4, guidance_scale=0)),
                               (place.base, "teacher@2", dict(num_inference_steps=2, guidance_scale=4))):
        pipe = stock(folder)
        for i, prompt in enumerate(PROMPTS):
            z = adapter.noise_for(2, i, 4, 4)[None]
            made = pipe(prompt, latents=z, height=32, width=32, output_type="np", **call).images[0]
            assert np.abs((made * 255).round() - pixels(run, name, 2)[i]).max() <= 1
    assert np.abs(pixels(run, "student@4", 0).astype(int) - pixels(run, "student@4", 1)).mean() > 1, "seeds differ"


def test_report_says_what_was_measured(judged):
    run, report = judged
    words, c = (run / "report.md").read_text(), report["conditions"]
    assert "one, iteration 70" in words and "FID is biased: KID is the one to read" in words and "guidance_scale 4" in words
    assert (c["seeds"], c["images_per_seed"], c["iteration"], c["resolution"]) == ([0, 1, 2], 3, 70, 32)
    card = export.model_card(sampling.open_run(run), "x", "float32", 4)
    assert "Measured at iteration 70" in card and evaluate.markdown_table(report["rows"]) in card
    assert "FID is biased" not in evaluate.describe({**c, "images_per_seed": 2048})


def test_a_stopped_evaluation_goes_on_as_if_never_stopped(place, judged, run, monkeypatch):
    whole, report = judged
    decode, count = adapter.decode, itertools.count()

    def stop_in_the_middle(*args):
        if next(count) == 14:
            raise KeyboardInterrupt
        return decode(*args)
    with monkeypatch.context() as m:
        m.setattr(adapter, "decode", stop_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            evaluated(run, place)
    assert len(pngs(run / "evaluation")) == 14 and not (run / "report.json").exists()
    made = []
    monkeypatch.setattr(adapter, "decode", lambda *args: (made.append(len(args[1])), decode(*args))[1])
    resumed = evaluated(run, place)
    assert pngs(run / "evaluation") == pngs(whole / "evaluation") and sum(made) == 36 - 14      # 4 ways, 3 seeds, 3 prompts
    for a, b in zip(resumed["rows"], report["rows"]):
        assert all(a[k] == b[k] for k in ("name", "kid_mean", "kid_std", "fid_mean", "fid_std"))
        assert a["clip_mean"] is None and b["clip_mean"] is not None
    monkeypatch.setattr(sampling, "encode_prompts", None)       # all images are there: nothing is loaded
    monkeypatch.setattr(adapter, "load_transformer", None)
    again = evaluated(run, place)
    assert again["rows"] == resumed["rows"]


def test_images_do_not_depend_on_batch_or_processes(place, judged, run, monkeypatch):
    whole = pngs(judged[0] / "evaluation")
    for rank in (1, 0):                                         # the first judges when the second is done
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "2")
        report = evaluated(run, place, "--batch", "3")
        assert (report is None) == (rank == 1)
        split = pngs(run / "evaluation")
        assert len(split) == (12 if rank else 36)               # one of three prompts is the second's
    assert split.keys() == whole.keys()
    for name, a in split.items():                               # rounding alone: a level of 255 at most
        a, b = (np.asarray(Image.open(p / "evaluation" / name)).astype(int) for p in (run, judged[0]))
        assert np.abs(a - b).max() <= 1
    for row, one in zip(report["rows"], judged[1]["rows"]):
        assert row["fid_mean"] == pytest.approx(one["fid_mean"], rel=0.05)


def test_images_of_other_settings_are_never_mixed_in(place, judged, tmp_path, capsys):
    run = tmp_path / "one"
    shutil.copytree(judged[0], run)
    argv = [run, "--prompts", place.prompts, "--steps", "4,1", *SMALL]
    again = dict(folder=tmp_path, capsys=capsys, features=net)
    refused(evaluate, [*argv, "--guidance", "3"], ("teacher@2", "guidance = 3.0 (was 5.0)", "give another --out"), **again)
    refused(evaluate, [*argv, "--resolution", "48"], ("resolution = 48 (was 32)",), **again)
    refused(evaluate, [*argv, "--dtype", "bfloat16"], ("dtype = bfloat16 (was float32)",), **again)
    vae = next((Path(shutil.copytree(place.base, tmp_path / "base")) / "vae").glob("*.safetensors"))
    vae.write_bytes((raw := vae.read_bytes())[:-1] + bytes([raw[-1] ^ 1]))
    refused(evaluate, [*argv, "--model", tmp_path / "base"], ("teacher@2", "vae = "), **again)
    (tmp_path / "other.txt").write_text("\n".join(PROMPTS[:2]))
    refused(evaluate, [*argv, "--prompts", tmp_path / "other.txt"], ("prompts = 2, sha256",), **again)
    damage(run / "config.json", lambda c: c["recipe"].update(sampler="renoise"))
    refused(evaluate, argv, ("student@4", "sampler = renoise (was euler)"), **again)
    damage(run / "config.json", lambda c: c["recipe"].update(sampler="euler"))
    tiny_zimage.transformer(seed=6).save_pretrained(run / "student")        # the run went on: its student is another one
    refused(evaluate, argv, ("student@4", "student = "), **again)
    shutil.rmtree(run / "evaluation" / "student@4"), shutil.rmtree(run / "evaluation" / "student@1")
    teacher = pngs(run / "evaluation" / "teacher@2")
    report = evaluated(run, place)
    assert pngs(run / "evaluation" / "teacher@2") == teacher                # the costly images stay
    kid = lambda rows: [row["kid_mean"] for row in rows[:2]]                # the teacher's and a student's
    assert [a == b for a, b in zip(kid(report["rows"]), kid(judged[1]["rows"]))] == [True, False]
    (run / "evaluation" / "student@4" / "seed-1" / "00001.png").write_bytes(b"no picture")
    refused(evaluate, argv, ("student@4/seed-1/00001.png", "remove it"), **again)
    (run / "evaluation" / "teacher@2" / "manifest.json").unlink()
    refused(evaluate, argv, ("teacher@2", "no manifest.json"), **again)


def test_one_seed_is_judged_against_the_next(place, judged, run):
    report = evaluated(run, place, "--seeds", "1")              # the teacher's images of seed 2 are its reference
    for row, three in zip(report["rows"], judged[1]["rows"]):
        assert row["kid_mean"] == pytest.approx(three["per_seed"]["kid"][1], abs=1e-9) and row["kid_std"] is None
    assert {p.name for p in (run / "evaluation" / "teacher@2").glob("seed-*")} == {"seed-1", "seed-2"}
    assert {p.name for p in (run / "evaluation" / "student@4").glob("seed-*")} == {"seed-1"}


def test_kernel_subsets_are_seeded_and_leave_numpy_alone():
    x, y = np.random.default_rng(0).normal(size=(2, 1200, 4))
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    once, again, other = (evaluate.kernel(x, y, subsets=2, seed=seed) for seed in (1, 1, 2))
    assert once == again != other
    assert np.array_equal(before, np.random.get_state()[1])


def test_inception_is_cleanfids_on_what_the_png_holds(tmp_path, monkeypatch):
    class Stub(nn.Module):
        """Stands for clean-fid's network: tells the mean of what it is shown."""

        def __init__(self, path, download, resize_inside=False):
            super().__init__()
            assert path == str(tmp_path) and not download

        def forward(self, x):
            assert x.shape[1:] == (3, 299, 299)
            return x.mean((2, 3))
    (tmp_path / evaluate.INCEPTION).touch()
    monkeypatch.setattr("cleanfid.inception_torchscript.InceptionV3W", Stub)
    levels = torch.arange(256).repeat(3, 1).reshape(1, 3, 16, 16) / 255
    got = evaluate.inception(str(tmp_path), "cpu")(levels)
    assert got.shape == (1, 3) and torch.allclose(got, torch.full((1, 3), 127.5), atol=0.5)
    assert np.array_equal(sampling.to_bytes(levels)[0, :, :, 0].ravel(), np.arange(256))
