"""Z-Image's data and evaluation on a tiny pipeline: samples and images equal stock diffusers',
a kill costs a shard, the reader's promises, figures equal independent ones."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import tiny
import tiny_zimage
import torch
from cleanfid.resize import build_resizer
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline
from PIL import Image
from processes import forked
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor, CLIPTextModelWithProjection, CLIPTokenizer

import ladd
from zimage import adapter, data, evaluate, precompute
from zimage.world import ZImageRecipe

ROOT = Path(precompute.__file__).parents[1]
LONG = "a violin on a chair beside an open window, with sheet music on the floor"
PROMPTS = ["a cat", "an owl", "a grey wolf drinking from a mountain stream", "tea", "fog", "一只猫"]
PROMPTS += ["a harbour in the evening with boats", "a red fox", LONG, "a hen", "an old map"]
CPU = ["--dtype", "float32", "--device", "cpu"]
TINY = "--resolution 64,32x48 --steps 3 --shard-size 3 --batch 2".split() + CPU
SMALL = "--resolution 48x32 --teacher-steps 2 --steps 2,1 --batch 1".split() + CPU


def net(x):
    """Stands for Inception: images [B, 3, 299, 299] in 0 .. 255 -> [B, 12]."""
    return torch.nn.functional.avg_pool2d(x.float() / 255 - 0.5, 149).flatten(1)


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    """model, clip, prompts.txt; made: the data made of them by one process; latents: its reader."""
    folder = tmp_path_factory.mktemp("data")
    place = SimpleNamespace(model=model, prompts=folder / "prompts.txt", made=folder / "made")
    place.prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    place.clip = tiny_zimage.save_clip(folder / "clip")
    assert run(place, place.made, "--clip", place.clip) == 0
    place.latents = data.Latents(place.made)
    return place


@pytest.fixture
def copy(place, tmp_path):
    """A copy of the data that a test may damage."""
    return Path(shutil.copytree(place.made, tmp_path / "copy"))


def arguments(place, out, *options):
    """The tiny settings of precompute; options come last and so win."""
    return ["--model", place.model, "--prompts", place.prompts, "--out", out, *TINY, *options]


def run(place, out, *options):
    return tiny.start(precompute.main, *arguments(place, out, *options))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_shipped_prompts_are_disjoint():
    files = [ROOT / "zimage" / "prompts" / f"{name}.txt" for name in ("train", "heldout")]
    train, heldout = map(data.read_prompts, files)
    assert (len(set(train)), len(set(heldout))) == (len(train), len(heldout)) == (200, 100)
    assert not set(train) & set(heldout)


BAD = {
    "empty.txt": (b"\n \n", "holds no prompt"),
    "latin.txt": (b"a\nb\xff\n", "line 2: not UTF-8"),
    "unmarked.txt": ("a\nb".encode("utf-16-le"), "line 1: holds characters that are no text"),
    "p.jpg": (b"a", "give a file that ends in .txt or .jsonl"),
    "cut.jsonl": (b'{"prompt": "a"}\n{"prompt"\n', "line 2: no prompt"),
    "comma.csv": (b"prompt\na, b\n", "line 2: no prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_prompts_are_refused_by_file_and_line(tmp_path, name):
    text, says = BAD[name]
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ladd.UserError, match=f"{name}.*{says}"):
        data.read_prompts(tmp_path / name)


def test_an_over_long_prompt_is_refused_with_its_count(place, tmp_path, capsys):
    room = adapter.MAX_TOKENS - place.latents.lengths[PROMPTS.index("tea")] + len("tea")
    file = tmp_path / "p.txt"
    file.write_text("a\n" + "x" * (room + 1))  # a token a character
    says = "'xxxxx", "513 tokens with the chat template, but the model reads 512"
    tiny.refused(capsys, run(place, tmp_path / "out", "--prompts", file), *says)


def stock(place, indices, size, w, seed=0, dtype=torch.float32):
    """The stock pipeline's latents for these prompts, from the keyed noise, in 3 steps."""
    pipe = ZImagePipeline.from_pretrained(place.model, dtype=dtype)
    noise = torch.stack([adapter.noise_for(("data", seed), i, *size) for i in indices])
    call = {"latents": noise, "height": 8 * size[0], "width": 8 * size[1], "guidance_scale": w - 1}
    prompts = [PROMPTS[i] for i in indices]
    return pipe(prompts, num_inference_steps=3, output_type="latent", **call).images


def test_samples_equal_the_stock_pipeline_with_guidance(place):
    assert sorted(set(place.latents.sizes)) == [(6, 4), (8, 8)]  # 32x48 is width x height
    for size in set(place.latents.sizes):
        own = [i for i in range(len(place.latents)) if place.latents.sizes[i] == size]
        x0, _, noise = place.latents.get(own)
        assert noise[1].equal(adapter.noise_for(("data", 0), own[1], *size)) and x0.std() > 0.1
        torch.testing.assert_close(x0, stock(place, own, size, w=5), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-3), ("bfloat16", 5e-2)])
def test_samples_without_guidance_by_another_seed(place, tmp_path, dtype, tolerance):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS[:4]))
    options = ["--guidance", 1, "--seed", 9, "--resolution", "80x48", "--dtype", dtype]
    assert run(place, tmp_path / "out", *options, "--prompts", tmp_path / "p.txt") == 0
    x0, _, _ = data.Latents(tmp_path / "out").get([0, 1])
    theirs = stock(place, [0, 1], (6, 10), w=1, seed=9, dtype=getattr(torch, dtype))
    torch.testing.assert_close(x0, theirs, rtol=tolerance, atol=tolerance)


def test_captions_and_vectors_are_the_encoders_own(place):
    pipe = ZImagePipeline.from_pretrained(place.model, dtype=torch.float32)
    captions, _ = pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    clip = data.Latents(place.made, vector="clip")
    assert place.latents.about["vectors"] == {"qwen": 32, "clip": 24}
    assert place.latents.lengths == [len(c) for c in captions]
    net = CLIPTextModelWithProjection.from_pretrained(place.clip)
    tokenizer = CLIPTokenizer.from_pretrained(place.clip)
    for i in (0, 8):
        _, cond, _ = place.latents.get([i])
        assert cond.captions[0].dtype == torch.bfloat16
        torch.testing.assert_close(cond.captions[0].float(), captions[i], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(cond.vector[0], captions[i].mean(0), rtol=1e-4, atol=1e-5)
        tokens = tokenizer(PROMPTS[i], return_tensors="pt", truncation=True, max_length=77)
        pooled = net(**tokens).text_embeds.detach()
        torch.testing.assert_close(clip.get([i])[1].vector, pooled, rtol=1e-4, atol=1e-5)


def test_a_restart_makes_what_is_missing_or_cut_off_alike_and_nothing_else(place, copy, capsys):
    whole = contents(copy)
    a, b, c, d = sorted(name for name in whole if name.startswith("shard"))
    (copy / a).unlink()
    (copy / b).write_bytes(whole[b][:-100])
    shutil.copy(copy / d, copy / c)
    (copy / f".{a}.7.part").touch()  # a killed process left it
    before = (copy / d).stat().st_mtime_ns
    with pytest.raises(ladd.UserError, match="3 of 4 shards are missing or damaged"):
        data.Latents(copy)
    assert run(place, copy, "--clip", place.clip) == 0
    assert contents(copy) == whole and (copy / d).stat().st_mtime_ns == before


def test_a_kill_loses_the_shard_in_work_alone(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        made = [*[DEFAULT] * 3, KeyboardInterrupt]  # in the second or third of four shards
        stops = Mock(wraps=adapter.sample_teacher, side_effect=made)
        patch.setattr(adapter, "sample_teacher", stops)
        assert run(place, out, "--clip", place.clip) == 130
    assert 0 < len(list(out.glob("shard*"))) < 3 and run(place, out, "--clip", place.clip) == 0
    made, whole = contents(out), contents(place.made)
    assert {**made, "manifest.json": 0} == {**whole, "manifest.json": 0}  # it holds the command
    monkeypatch.setattr(adapter, "load_transformer", None)  # whole: no model is loaded
    assert run(place, out, "--clip", place.clip) == 0
    assert "all 4 shards are there" in capsys.readouterr().out


def test_two_ranks_make_the_same_data_as_one(place, tmp_path):
    out = tmp_path / "out"
    words = ["-m", "zimage.precompute", *arguments(place, out, "--clip", place.clip)]
    said = forked(2, words, tmp_path / "log")
    assert said.count("11 samples") == said.count("are there") == 1  # rank 0 talks for all
    assert contents(out).keys() == contents(place.made).keys()
    for path in out.glob("shard*"):
        one, two = load_file(path), load_file(place.made / path.name)
        for name in two:  # another process may round otherwise
            close = {"rtol": 0.02, "atol": 2e-3}
            torch.testing.assert_close(one[name].float(), two[name].float(), **close)


CHANGES = {
    "--steps 4": "steps = 4 (was 3)",
    "--resolution 64": "resolution = ['64x64'] (was ['64x64', '32x48'])",
    f"--prompts {ROOT}/zimage/prompts/heldout.txt": "prompts = ",
}


@pytest.mark.parametrize("options", CHANGES)
def test_a_restart_with_other_settings_is_refused(place, copy, capsys, options):
    before = contents(copy)
    code = run(place, copy, "--clip", place.clip, *options.split())
    tiny.refused(capsys, code, f"--out {copy}: holds data made otherwise", CHANGES[options])
    assert contents(copy) == before


def test_the_model_may_move_but_not_change(place, copy, tmp_path, capsys):
    other, options = tiny_zimage.save(tmp_path / "other", seed=5), ["--clip", place.clip, "--model"]
    tiny.refused(capsys, run(place, copy, *options, other), "fingerprint = ")
    moved = shutil.copytree(place.model, tmp_path / "moved")
    before = contents(copy)
    (copy / "shard-00000.safetensors").unlink()
    assert run(place, copy, *options, moved) == 0 and contents(copy) == before


WRONG = {
    "--guidance inf": "--guidance inf: give a number from 1",
    "--resolution 64,48x40": "'48x40' is no size in multiples of 16",
    f"--clip {ROOT}": "can't be loaded",
    f"--model {ROOT}": "holds no model_index.json; name the folder of a ZImagePipeline",
    "--model no/such-model": "--model no/such-model: no such folder, and the hub gave none",
}


@pytest.mark.parametrize("options", WRONG)
def test_bad_options_are_refused(place, tmp_path, capsys, monkeypatch, options):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tiny.refused(capsys, run(place, tmp_path / "out", *options.split()), WRONG[options])
    assert not (tmp_path / "out").exists()


def test_damaged_models_are_refused(place, tmp_path, capsys):
    folder = Path(shutil.copytree(place.model, tmp_path / "m"))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tiny_zimage.rewrite(weights.with_name("config.json"), n_layers=5)
    tiny.refused(capsys, run(place, tmp_path / "out", "--model", folder), "weights, ['layers.4")
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-9])
    tiny.refused(capsys, run(place, tmp_path / "out", "--model", folder), "can't be loaded")
    torch.save(tensors, weights.with_suffix(".bin"))
    weights.unlink()
    code = run(place, tmp_path / "out", "--model", folder)
    tiny.refused(capsys, code, "no file named diffusion_pytorch_model.safetensors")
    assert not (tmp_path / "out").exists()


def test_a_turbo_model_is_warned_of(place, tmp_path, capsys):
    model = Path(shutil.copytree(place.model, tmp_path / "m"))
    tiny_zimage.rewrite(model / "scheduler" / "scheduler_config.json", shift=3.0)
    assert adapter.model_folder(model) == model
    assert "looks like Z-Image-Turbo" in capsys.readouterr().out


def test_a_latent_that_is_not_finite_is_refused(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(adapter, "sample_teacher", lambda *args: args[3].fill_(70_000.0))
    tiny.refused(capsys, run(place, tmp_path / "out"), "a latent is not finite in float16")


def test_prompts_are_indexed_as_a_tensor_is():
    captions = [torch.full((k + 1, 3), float(k)) for k in range(4)]
    prompts = adapter.Prompts(captions, torch.arange(4.0)[:, None])
    rows = torch.tensor([3, 0, 3])
    for some, places in ((prompts[rows], [3, 0, 3]), (prompts[1:3], [1, 2]), (prompts[:0], [])):
        assert [len(c) - 1 for c in some.captions] == some.vector[:, 0].tolist() == places
    assert len(prompts[rows].to("meta")) == 3 and prompts.to("meta").vector.device.type == "meta"


def test_read_is_a_window_on_the_joint_batches(place):
    whole = [place.latents.read(4 * b, 4, 4, seed=3) for b in range(8)]
    for b in (5, 0, 7, 2):  # in any order: the reader has no state
        x0, cond, noise = place.latents.read(4 * b + 1, 2, 4, seed=3)
        assert torch.equal(x0, whole[b][0][1:3]) and torch.equal(noise, whole[b][2][1:3])
        assert torch.equal(cond.vector, whole[b][1].vector[1:3])
    assert torch.equal(data.Latents(place.made).read(28, 4, 4, seed=3)[0], whole[7][0])
    assert len(place.latents.read(0, 16, 16, seed=3)[0]) == 16  # more than a size has samples


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_every_epoch_shows_every_sample_in_batches_of_one_size(batch):
    made = data.Latents.__new__(data.Latents)  # without any file
    made.about, made.trained = {"count": 203}, range(203 - data.count_held_out(203))
    made.lengths = torch.randint(5, 120, (203,), generator=ladd.generator("test")).tolist()
    three = ((64, 64), (48, 80), (80, 48))
    made.sizes = [three[i % 3] if i else (8, 8) for i in range(203)]  # (8, 8) has one sample
    epochs = [made.epoch_batches(e, batch, 5) for e in (0, 1, 0)]
    for batches in epochs:
        assert len(batches) == sum(-(-n // batch) for n in Counter(made.sizes[:183]).values())
        assert {i for b in batches for i in b} == set(range(183))
        assert all(len(b) == batch and len({made.sizes[i] for i in b}) == 1 for b in batches)
        lengths = [{adapter.padded_length(made.lengths[i]) for i in b} for b in batches]
        assert sum(len(each) > 1 for each in lengths) <= 9  # per size: between its four lengths
    held_out = list(made.held_out_batches(batch))
    assert sorted(sum(held_out, [])) == list(range(183, 203))
    assert max(map(len, held_out)) == min(batch, 5)
    kinds = [{(made.sizes[i], adapter.padded_length(made.lengths[i])) for i in b} for b in held_out]
    assert all(len(each) == 1 for each in kinds) and epochs[0] == epochs[2] != epochs[1]
    assert made.epoch_batches(0, batch, 6) != epochs[0]
    if batch > 1:  # other company, not only another order
        assert len({frozenset(map(frozenset, batches)) for batches in epochs}) == 2


def test_the_last_samples_are_held_out(place):
    counts = {10_000: 64, 640: 64, 639: 63, 40: 4, 11: 3}
    assert {n: data.count_held_out(n) for n in counts} == counts
    assert sorted(sum(place.latents.held_out_batches(2), [])) == [8, 9, 10]


def make_run(folder, place):
    """A finished run's folder, written by hand."""
    tiny_zimage.transformer(seed=5).save_pretrained(folder / "student")
    recipe = ZImageRecipe(times=(1.0, 0.5), time_probs=(0.5, 0.5), warmup_probs=(0.0, 1.0))
    made_of = {"teacher": adapter.model_fingerprint(place.model), "latents.model": str(place.model)}
    made_of |= {"latents.steps": 2, "latents.guidance": 5.0}
    config = {"world": "zimage", "recipe": dataclasses.asdict(recipe), "data": made_of}
    ladd.write_json(folder / "config.json", config)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    return folder


def judge(run, *options, features=net):
    words = [run, "--prompts", run / "prompts.txt", *SMALL, *options]
    return tiny.start(lambda argv: evaluate.main(argv, features), *words)


@pytest.fixture(scope="module")
def judged(place, tmp_path_factory):
    """A run with its evaluation, three seeds."""
    run = make_run(tmp_path_factory.mktemp("judged") / "one", place)
    assert judge(run, "--clip", place.clip) == 0
    return run


def rows(run):
    return json.loads((run / "report.json").read_text())["rows"]


def pixels(run, name, seed):
    paths = sorted(run.glob(f"evaluation/{name}-*/seed-{seed}/*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def features_of(images):
    resize = build_resizer("clean")
    small = [torch.from_numpy(resize(image)).permute(2, 0, 1) for image in images]
    return net(torch.stack(small)).double().numpy()


def clip_by_hand(folder, images):
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    scores = []
    for image, prompt in zip(images, PROMPTS[:3], strict=True):
        inputs = processor(text=[prompt], images=[Image.fromarray(image)], return_tensors="pt")
        with torch.no_grad():
            cosine = model(**inputs).logits_per_image / model.logit_scale.exp()
        scores.append(max(0.0, 100 * float(cosine)))
    return np.mean(scores)


def test_figures_equal_independent_ones(place, judged):
    names = ["teacher@2", "student@2", "student@1", "untrained@2"]
    assert [r["name"] for r in rows(judged)] == names
    assert [r["nfe"] for r in rows(judged)] == [4, 2, 1, 2]
    for row in rows(judged):
        kid = []
        for seed, other in ((0, 1), (1, 2), (2, 0)):  # against the teacher's images of another seed
            x, y = pixels(judged, row["name"], seed), pixels(judged, "teacher@2", other)
            kid.append(tiny.kid_by_hand(features_of(x), features_of(y)))
        assert row["kid"] == pytest.approx(kid, abs=1e-6)
        assert row["kid_mean"] == pytest.approx(np.mean(kid), abs=1e-6)
        assert row["kid_std"] == pytest.approx(np.std(kid, ddof=1), abs=1e-6)
        clip = [clip_by_hand(place.clip, pixels(judged, row["name"], seed)) for seed in (0, 1, 2)]
        assert row["clip"] == pytest.approx(clip, abs=1e-3)
    assert len({r["kid_mean"] for r in rows(judged)}) == 4
    report = (judged / "report.md").read_text()
    for words in ("| student@2 | 2 | 2 | ", "3 images of 48x32 per seed", "guidance_scale 4)"):
        assert words in report


def test_images_are_the_ones_the_stock_pipeline_makes(place, judged):
    student = adapter.load_transformer(judged / "student", torch.float32)
    flat = FlowMatchEulerDiscreteScheduler(shift=1.0)
    ways = {"teacher@2": ({}, 2, 4), "untrained@2": ({"scheduler": flat}, 2, 0)}
    ways["student@1"] = ({"scheduler": flat, "transformer": student}, 1, 0)
    for name, (parts, steps, scale) in ways.items():
        pipe = adapter.load_pipeline(place.model, torch.float32, "cpu", **parts)
        call = {"num_inference_steps": steps, "guidance_scale": scale, "height": 32, "width": 48}
        for i, shown in enumerate(pixels(judged, name, 2)):
            noise = adapter.noise_for(2, i, 4, 6)[None]
            made = pipe(PROMPTS[i], latents=noise, output_type="np", **call).images[0]
            assert np.abs((made * 255).round() - shown).max() <= 1
    a, b = (pixels(judged, "student@2", seed).astype(int) for seed in (0, 1))
    assert np.abs(a - b).mean() > 1, "seeds differ"


def test_a_stopped_evaluation_goes_on(place, judged, tmp_path, monkeypatch):
    run = make_run(tmp_path / "one", place)
    with monkeypatch.context() as patch:
        stops = Mock(wraps=adapter.decode, side_effect=[*[DEFAULT] * 13, KeyboardInterrupt])
        patch.setattr(adapter, "decode", stops)
        assert judge(run) == 130 and not (run / "report.json").exists()
    assert len(list(run.rglob("*.png"))) == 13 and judge(run) == 0
    for row, one in zip(rows(run), rows(judged), strict=True):
        assert row["kid"] == pytest.approx(one["kid"], abs=1e-9) and row["clip"] == []
    monkeypatch.setattr(adapter, "load_transformer", None)  # all images are there
    assert judge(run) == 0


def test_images_of_other_settings_are_never_mixed_in(judged, tmp_path):
    run = Path(shutil.copytree(judged, tmp_path / "one"))

    def added(*options):
        """What is new in the folder of the images after another evaluation."""
        before = set((run / "evaluation").iterdir())
        assert judge(run, *options) == 0
        new = set((run / "evaluation").iterdir()) - before
        return sorted(path.name.split("-")[0] for path in new)

    tiny_zimage.transformer(seed=6).save_pretrained(run / "student")  # another student
    assert added() == ["student@1", "student@2"]
    kid = [row["kid_mean"] for row in rows(run)]
    old = [row["kid_mean"] for row in rows(judged)]
    assert [a == pytest.approx(b, abs=1e-9) for a, b in zip(kid, old, strict=True)] == [1, 0, 0, 1]
    assert added("--seeds", 1) == []  # one seed is judged against the next
    for k in (0, 3):  # teacher and untrained
        assert rows(run)[k]["kid"] == pytest.approx(rows(judged)[k]["kid"][1:2], abs=1e-9)
    assert added("--seeds", 1, "--guidance", 3) == ["teacher@2"]
    (tmp_path / "other.txt").write_text("\n".join(PROMPTS[:2]))
    for option in (["--resolution", 48], ["--prompts", tmp_path / "other.txt"]):
        assert ",".join(added("--seeds", 1, *option)) == "student@1,student@2,teacher@2,untrained@2"


def test_inception_is_asked_for_before_the_images(place, tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "one", place)
    offline = Mock(side_effect=OSError("no network"))
    monkeypatch.setattr("cleanfid.inception_torchscript.check_download_inception", offline)
    code = judge(run, "--features", tmp_path / "nets", features=None)
    tiny.refused(capsys, code, "--features", "can't be loaded or downloaded (OSError)")
    assert not (run / "evaluation").exists()
