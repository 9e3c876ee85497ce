"""Z-Image's data stage on a tiny random pipeline: the teacher's samples equal stock diffusers', a kill costs a shard, the reader's promises."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load, load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import ladd
import tiny_zimage
from zimage import adapter, data, precompute

PROMPTS = ["a cat", "an owl", "a grey wolf drinking from a mountain stream", "tea", "a harbour in the evening with boats", "一只猫",
           "a red fox", "fog", "a violin on a chair beside an open window, with sheet music on the floor", "a hen", "an old map"]
TINY = ["--resolution", "64,32x48", "--steps", "3", "--shard-size", "3", "--batch", "2", "--dtype", "float32", "--device", "cpu"]
ROOT = Path(precompute.__file__).parents[1]


def make_clip(folder):
    """A tiny random CLIP text encoder, projection 24, with a byte-level tokenizer."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(folder)
    torch.manual_seed(7)
    config = CLIPTextConfig(vocab_size=514, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=24,
                            max_position_embeddings=77, bos_token_id=512, eos_token_id=513)
    CLIPTextModelWithProjection(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """model (a tiny pipeline), clip (a tiny text encoder), prompts.txt and made, the data made of them by one process."""
    folder = tmp_path_factory.mktemp("data")
    make_clip(folder / "clip")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    place = SimpleNamespace(folder=folder, model=tiny_zimage.save(folder / "model"), clip=folder / "clip", prompts=folder / "prompts.txt",
                            made=folder / "made")
    assert run(place, place.made, "--clip", place.clip) == 0
    return place


@pytest.fixture(scope="module")
def latents(place):
    return data.Latents(place.made)


@pytest.fixture(scope="module")
def stock(place):
    pipe = ZImagePipeline.from_pretrained(place.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def copy(place, tmp_path):
    """A copy of the data that a test may damage."""
    return Path(shutil.copytree(place.made, tmp_path / "copy"))


def run(place, out, *options, **replaced):
    """precompute with the tiny settings; options come last and so win."""
    given = {"model": place.model, "prompts": place.prompts, "out": out} | replaced
    return precompute.main([*(str(w) for k, v in given.items() if v is not None for w in ("--" + k, v)), *TINY, *map(str, options)])


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None


def shards(folder):
    return {k: v for k, v in contents(folder).items() if k.startswith("shard-")}


def one_line(capsys):
    """The one line that a refusal prints."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("zimage.precompute: "), lines
    return lines[0]


def rewrite(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- prompts ------------------------------------------------------------------------------------------------------------

def test_the_shipped_prompts_are_disjoint_and_readable():
    train, heldout = (data.read_prompts(ROOT / "zimage" / "prompts" / f"{name}.txt") for name in ("train", "heldout"))
    assert len(set(train)) == len(train) == 200 and len(set(heldout)) == len(heldout) == 100 and not set(train) & set(heldout)
    assert max(len(p.split()) for p in train) > 70 and all(any("一" <= c <= "鿿" for p in part for c in p) for part in (train, heldout))


@pytest.mark.parametrize("name, text", [
    ("p.txt", "a cat\n \"tea\", hot\r\na cat\n"), ("p.TXT", "\ufeffa cat\n\"tea\", hot\na cat"),
    ("p.jsonl", '{"prompt": "a cat"}\n{"id": 1, "prompt": "\\"tea\\", hot"}\n{"prompt": "a cat"}\n'),
    ("p.csv", 'id,prompt\n1,a cat\n2,"""tea"", hot"\n3,a cat\n')])
def test_prompts_of_every_format(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("utf-8"))
    assert data.read_prompts(tmp_path / name) == ["a cat", '"tea", hot', "a cat"]


def test_a_quoted_prompt_may_go_over_lines(tmp_path):
    (tmp_path / "p.csv").write_text('prompt\n"a cat\nand a dog"\ntea\n')
    assert data.numbered_prompts(tmp_path / "p.csv") == [(3, "a cat\nand a dog"), (4, "tea")]


@pytest.mark.parametrize("name, text, says", [
    ("p.txt", None, "can't be read"), ("p.txt", b"", "empty"), ("p.txt", b"\n \n", "empty"), ("p.txt", b"a\n\nb\n", "line 2: no prompt"),
    ("p.txt", b"a\nb\n\n", "line 3: no prompt"), ("p.txt", b"a\nb\xff\n", "line 2: not UTF-8"),
    ("p.txt", "a\n".encode("utf-16"), "line 1: not UTF-8"),
    ("p.jpg", b"a", "unknown ending '.jpg'"), ("prompts", b"a", "unknown ending ''"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "line 2: not a JSON object"), ("p.jsonl", b'{"text": "a"}', "line 1: not a JSON object"),
    ("p.jsonl", b'["a"]', "line 1: not a JSON object"), ("p.jsonl", b"[" * 100_000, "line 1: not a JSON object"),
    ("p.jsonl", b'{"prompt": 3}', "line 1: no prompt"), ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"}', "line 2: no prompt"),
    ("p.jsonl", b'{"prompt": "\\ud83d"}', "line 1: holds half of a surrogate pair"),
    ("p.csv", b"text\na\n", "line 1: the columns are text"), ("p.csv", b"prompt,prompt\na,b\n", "line 1"), ("p.csv", b"prompt\n", "no prompt"),
    ("p.csv", b"id,prompt\n1,a\n2\n", "line 3: 1 columns"), ("p.csv", b"prompt\na, b\n", "line 2: 2 columns"),
    ("p.csv", b"id,prompt\n1,a\n\n3,b\n", "line 3: no prompt"), ("p.csv", b"id,prompt\n1,\n", "line 2: no prompt"),
    ("p.csv", b'prompt\n"a" b\n', "line 2: malformed")])
def test_bad_prompts_are_refused_by_file_and_line(place, tmp_path, capsys, name, text, says):
    if text is not None:
        (tmp_path / name).write_bytes(text)
    assert run(place, tmp_path / "out", prompts=tmp_path / name) == 2
    line = one_line(capsys)
    assert f"--prompts {tmp_path / name}" in line and says in line and not (tmp_path / "out").exists()


def test_an_over_long_prompt_is_refused_with_its_count(place, tmp_path, capsys):
    room = adapter.MAX_TOKENS - precompute.token_counts(tiny_zimage.tokenizer(), [""])[0]      # a token a character
    (tmp_path / "p.txt").write_text("a\n" + "x" * (room + 1) + "\n")
    assert run(place, tmp_path / "out", prompts=tmp_path / "p.txt") == 2
    assert "p.txt, line 2: 513 tokens with the chat template, but the model reads 512" in one_line(capsys)
    (tmp_path / "p.txt").write_text("x" * room)
    assert run(place, tmp_path / "out", "--plan", prompts=tmp_path / "p.txt") == 0


# ---- what is made ---------------------------------------------------------------------------------------------------------

def expected(stock, prompts, indices, height, width, w, seed=0, steps=3):
    noise = torch.stack([adapter.noise_for(seed, i, height // 8, width // 8) for i in indices])
    made = stock([prompts[i] for i in indices], latents=noise, height=height, width=width, guidance_scale=w - 1, num_inference_steps=steps,
                 output_type="latent")
    return made.images, noise


def test_samples_equal_the_stock_pipeline_with_guidance(stock, latents):
    for size in set(latents.sizes):
        mine = [i for i in range(len(latents)) if latents.sizes[i] == size]
        x0, _, noise = latents.get(mine)
        theirs, start = expected(stock, PROMPTS, mine, 8 * size[0], 8 * size[1], w=5)
        assert torch.equal(noise, start) and x0.dtype == torch.float32 and x0.std() > 0.1
        torch.testing.assert_close(x0, theirs, rtol=2e-3, atol=2e-3)
    assert sorted(set(latents.sizes)) == [(6, 4), (8, 8)]               # 32x48 is width x height


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-3), ("bfloat16", 5e-2)])
def test_samples_without_guidance_by_another_seed(place, tmp_path, dtype, tolerance):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS[:2]), encoding="utf-8")
    options = ["--guidance", 1, "--seed", 9, "--resolution", "80x48", "--steps", 2, "--dtype", dtype]
    assert run(place, tmp_path / "out", *options, prompts=tmp_path / "p.txt") == 0
    x0, cond, noise = data.Latents(tmp_path / "out").get([0, 1])
    pipe = adapter.load_pipeline(place.model, getattr(torch, dtype), "cpu")
    theirs, start = expected(pipe, PROMPTS, [0, 1], 48, 80, w=1, seed=9, steps=2)
    assert torch.equal(noise, start) and cond.captions[0].isfinite().all()
    torch.testing.assert_close(x0, theirs, rtol=tolerance, atol=tolerance)


def test_captions_and_vectors_are_the_encoders_own(place, stock, latents):
    captions, _ = stock.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    same = [i for i in range(len(latents)) if latents.sizes[i] == (8, 8)]
    _, qwen, _ = latents.get(same)
    clip = data.Latents(place.made, vector="clip")
    assert latents.vector_dim == 32 and clip.vector_dim == 24 and latents.lengths == [len(c) for c in captions]
    net, tokenizer = CLIPTextModelWithProjection.from_pretrained(place.clip), CLIPTokenizer.from_pretrained(place.clip)
    for k, i in enumerate(same):
        assert qwen.captions[k].dtype == torch.bfloat16 and qwen.captions[k].shape == captions[i].shape
        torch.testing.assert_close(qwen.captions[k].float(), captions[i], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(qwen.vector[k], captions[i].mean(0), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            pooled = net(**tokenizer(PROMPTS[i], return_tensors="pt", truncation=True, max_length=77)).text_embeds[0]
        torch.testing.assert_close(clip.get([i])[1].vector[0], pooled, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(qwen.vector[0], qwen.vector[1])


def test_the_manifest_and_the_shards_say_of_what_they_are_made(place, latents):
    manifest = json.loads((place.made / "manifest.json").read_text())
    assert manifest["made_of"] == latents.about and manifest["schema"] == ladd.SCHEMA and "--shard-size 3" in manifest["command"]
    assert latents.about["fingerprint"] == adapter.model_fingerprint(place.model) and len(latents.about["clip"]) == 64
    wanted = {"steps": 3, "guidance": 5.0, "seed": 0, "shift": 6.0, "count": 11, "dtype": "float32", "vectors": ["qwen", "clip"],
              "resolution": ["64x64", "32x48"]}
    assert wanted.items() <= latents.about.items()
    assert sorted(i for s in manifest["shards"] for i in s["indices"]) == list(range(11))
    for shard in manifest["shards"]:
        tensors, about = ladd.load_weights(place.made / shard["name"], "zimage shard")
        assert about["made_of"] == latents.about and shard.items() <= about.items()
        assert about["count"] == len(about["lengths"]) == len(shard["indices"])
        assert tensors["latent.0"].dtype == torch.float16 and tensors["latent.0"].shape == (16, shard["height"] // 8, shard["width"] // 8)
    assert not list(place.made.glob("*.part"))


def test_the_plan_is_a_pure_function():
    sizes = [(512, 512), (640, 384), (512, 512)]
    plan = data.plan_shards(10, sizes, 3)
    assert plan == data.plan_shards(10, sizes, 3)
    assert [(s["name"], s["indices"], s["height"]) for s in plan] == [
        ("shard-00000.safetensors", [0, 2, 3], 512), ("shard-00001.safetensors", [5, 6, 8], 512), ("shard-00002.safetensors", [9], 512),
        ("shard-00003.safetensors", [1, 4, 7], 640)]


def test_batches_of_the_teacher_need_no_mask():
    batches = list(precompute.alike([10, 40, 20, 64, 31, 32, 33], 2))
    assert sorted(sum(batches, [])) == list(range(7)) and max(map(len, batches)) == 2
    assert batches == [[0, 2], [4, 5], [1, 3], [6]]


# ---- restarts and ranks ---------------------------------------------------------------------------------------------------

def test_a_restart_makes_what_is_missing_or_damaged_alike_and_nothing_else(place, copy):
    whole = contents(copy)
    a, b, c, d = sorted(n for n in whole if n.endswith(".safetensors"))
    flipped = bytearray(whole[d])
    flipped[-5] ^= 1

    def mended(kept, damage):
        damage()
        before = [os.stat(copy / n).st_mtime_ns for n in kept]
        assert contents(copy) != whole and run(place, copy, "--clip", place.clip) == 0
        assert contents(copy) == whole and [os.stat(copy / n).st_mtime_ns for n in kept] == before
    mended([c, d], lambda: [(copy / a).unlink(), (copy / b).with_suffix(".json").unlink()])        # deleted; killed before its .json
    mended([a, b], lambda: [(copy / c).write_bytes(whole[c][:-100]), (copy / (c + ".part")).write_bytes(b"half"),
                            (copy / d).write_bytes(flipped)])


def test_a_kill_loses_the_shard_in_work_alone(place, tmp_path, monkeypatch, capsys):
    out, sample, calls = tmp_path / "out", precompute.Teacher.sample, []

    def dies(self, *args):
        calls.append(1)
        if len(calls) == 4:                                             # in the second or third shard
            raise KeyboardInterrupt
        return sample(self, *args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(precompute.Teacher, "sample", dies)
        run(place, out, "--clip", place.clip)
    done = shards(out)
    assert done and done.items() < shards(place.made).items()
    with pytest.raises(ladd.UserError, match=r"\d of 4 shards are missing, shard-0000\d.safetensors the first; go on with: python -m zimage"):
        data.Latents(out)
    assert run(place, out, "--clip", place.clip) == 0
    assert shards(out) == shards(place.made)
    monkeypatch.setattr(precompute, "Teacher", None)                    # whole: no model is loaded
    assert run(place, out, "--clip", place.clip) == 0 and "are there" in capsys.readouterr().out


def test_a_kill_while_the_manifest_is_written(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json.part").write_text("{")
    assert run(place, tmp_path / "out", "--clip", place.clip) == 0 and shards(tmp_path / "out") == shards(place.made)


@pytest.mark.parametrize("options, says", [
    (["--steps", 4], "steps = 4 (was 3)"), (["--guidance", 1], "guidance = 1.0 (was 5.0)"), (["--seed", 1], "seed = 1 (was 0)"),
    (["--resolution", "64"], "resolution = ['64x64'] (was ['64x64', '32x48'])"), (["--shard-size", 2], "shard_size = 2 (was 3)"),
    (["--dtype", "bfloat16", "--steps", 2], "steps = 2 (was 3); dtype = bfloat16 (was float32)")])
def test_a_restart_with_other_settings_is_refused(place, copy, capsys, options, says):
    before = contents(copy)
    assert run(place, copy, "--clip", place.clip, *options) == 2
    assert f"--out {copy}: holds data made otherwise: {says}; name a new folder" in one_line(capsys) and contents(copy) == before


def test_a_restart_with_other_inputs_is_refused(place, copy, tmp_path, capsys):
    assert run(place, copy) == 2                                        # without --clip
    assert "vectors = ['qwen'] (was ['qwen', 'clip'])" in one_line(capsys)
    (tmp_path / "p.txt").write_text("\n".join([*PROMPTS[:-1], "another"]), encoding="utf-8")
    assert run(place, copy, "--clip", place.clip, prompts=tmp_path / "p.txt") == 2
    assert "holds data made otherwise: prompts = " in one_line(capsys)
    assert run(place, copy, "--clip", place.clip, model=tiny_zimage.save(tmp_path / "other", seed=5)) == 2
    assert "fingerprint = " in one_line(capsys)
    shutil.copytree(place.model, tmp_path / "moved")                    # the same model elsewhere
    before = contents(copy)
    (copy / "shard-00000.safetensors").unlink()
    assert run(place, copy, "--clip", place.clip, model=tmp_path / "moved") == 0 and contents(copy) == before


def test_two_ranks_make_the_same_data_as_one(place, tmp_path, monkeypatch):
    """Rank 1, another process, starts first and waits for the manifest of rank 0."""
    out = tmp_path / "out"
    command = ["-m", "zimage.precompute", "--model", place.model, "--prompts", place.prompts, "--out", out, *TINY, "--clip", place.clip]
    env = {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(place, out, "--clip", place.clip) == 0
    printed = other.communicate(timeout=120)[0]
    assert other.returncode == 0 and printed == "", printed             # the first rank talks for all
    a, b = shards(out), shards(place.made)
    assert a.keys() == b.keys()
    for k in a:
        if k.endswith(".safetensors"):                                  # another process may round otherwise
            one, two = load(a[k]), load(b[k])
            assert one.keys() == two.keys()
            for name in one:
                torch.testing.assert_close(one[name].float(), two[name].float(), rtol=0.02, atol=2e-3)
    ours, theirs = (json.loads((folder / "manifest.json").read_text()) for folder in (out, place.made))
    assert {**ours, "command": 0} == {**theirs, "command": 0}


def test_a_rank_does_not_wait_for_ever(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setattr(precompute, "WAIT", 0)
    assert run(place, tmp_path / "out") == 2
    assert "rank 1 waited 0 s for the first rank's manifest.json in vain" in one_line(capsys) and not (tmp_path / "out").exists()


# ---- refusals -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, says", [
    (["--steps", 0], "--steps 0: give at least 1"), (["--batch", 0], "--batch 0: give at least 1"),
    (["--shard-size", -1], "--shard-size -1: give at least 1"), (["--guidance", -0.5], "--guidance -0.5: give a number from 0 up"),
    (["--guidance", "nan"], "--guidance nan"), (["--guidance", "inf"], "--guidance inf"), (["--guidance", "much"], "invalid float value: 'much'"),
    (["--dtype", "float16"], "invalid choice: 'float16'"), (["--nonsense"], "--nonsense"),
    (["--resolution", "500"], "the width 500 of 500 is no multiple of 16; 496 is near"),
    (["--resolution", "64,48x40"], "the height 40 of 48x40 is no multiple"), (["--resolution", "0"], "the width 0"),
    (["--resolution", "64x"], "'64x' is no size"), (["--resolution", "a"], "'a' is no size"), (["--resolution", "64,"], "'' is no size"),
    (["--resolution", "-64"], "--resolution"), (["--resolution", "16x32x48"], "'16x32x48' is no size"),
    (["--resolution", "64x1040"], "--resolution 64x1040: this model takes sides of at most 1024 pixels"),
    (["--device", "abacus"], "--device abacus: not here"), (["--device", "cuda:77"], "--device cuda:77: not here")])
def test_bad_options_are_refused(place, tmp_path, capsys, options, says):
    assert run(place, tmp_path / "out", *options) == 2
    assert says in one_line(capsys) and not (tmp_path / "out").exists()


def test_missing_options_are_refused(place, capsys):
    assert run(place, None) == 2
    assert "--out: say where" in one_line(capsys)
    assert precompute.main(["--out", "x"]) == 2
    assert "required: --model, --prompts" in one_line(capsys)


@pytest.mark.parametrize("env, says", [
    ({"RANK": "0", "WORLD_SIZE": "12"}, "11 prompts for 12 ranks"), ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2, WORLD_SIZE 2"),
    ({"RANK": "one"}, "not whole numbers")])
def test_ranks_that_cannot_work_are_refused(place, tmp_path, capsys, monkeypatch, env, says):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert run(place, tmp_path / "out") == 2
    assert says in one_line(capsys) and not (tmp_path / "out").exists()


def test_idle_ranks_are_told_of(place, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "6")
    assert run(place, None, "--plan") == 0 and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert run(place, None, "--plan") == 0 and "NOTE: 2 ranks have nothing to do; a --shard-size of 1 would use all" in capsys.readouterr().out


def test_models_that_are_not_there_are_refused(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for options, replaced, says in (([], {"model": "no/such-model"}, "--model no/such-model: no such folder, and the hub gave none"),
                                    ([], {"model": tmp_path}, "no readable model_index.json"),
                                    (["--clip", "no/such-clip"], {}, "--clip no/such-clip: no CLIP text encoder"),
                                    (["--clip", place.model / "text_encoder"], {}, "not a CLIP text encoder")):
        assert run(place, tmp_path / "out", *options, **replaced) == 2
        assert says in one_line(capsys) and not (tmp_path / "out").exists()


def test_damaged_models_are_refused(place, tmp_path, capsys):
    def broken(name, damage):
        folder = Path(shutil.copytree(place.model, tmp_path / name))
        damage(folder)
        assert run(place, tmp_path / "out", model=folder) == 2
        line = one_line(capsys)
        assert "--model" in line and not (tmp_path / "out").exists()
        return line
    cut = lambda folder: (p := next((folder / "transformer").glob("*.safetensors"))).write_bytes(p.read_bytes()[:-9])
    assert "the pipeline can't be loaded" in broken("cut", cut)
    assert "transformer/config.json can't be read" in broken("no-config", lambda folder: (folder / "transformer" / "config.json").unlink())
    for name in ("use_dynamic_shifting", "stochastic_sampling", "use_karras_sigmas"):
        other = lambda folder: rewrite(folder / "scheduler" / "scheduler_config.json", **{name: True})
        assert "no flow-matching Euler of fixed shift" in broken(name, other)


def test_the_fingerprint_is_of_what_decides_the_latents(place, tmp_path):
    """Another transformer, text encoder or tokenizer is another model; another VAE, scheduler or README is not."""
    known = adapter.model_fingerprint(place.model)

    def after(damage):
        folder = Path(shutil.copytree(place.model, tmp_path / "m", dirs_exist_ok=True))
        damage(folder)
        return adapter.model_fingerprint(folder)
    def flipped(path, at):
        path.write_bytes((raw := bytearray(path.read_bytes()))[:at] + bytes([raw[at] ^ 1]) + raw[at + 1:])
    assert after(lambda m: [(m / "README.md").write_text("x"), (m / "transformer" / ".cache").mkdir(), (m / "vae" / "config.json").unlink(),
                            rewrite(m / "scheduler" / "scheduler_config.json", shift=3.0)]) == known
    seen = {known}
    for part in ("transformer", "text_encoder"):
        path = next((place.model / part).glob("*.safetensors"))
        for at in (0, 60_000, path.stat().st_size - 1):
            seen.add(after(lambda m: flipped(m / part / path.name, at)))
            shutil.rmtree(tmp_path / "m")
        seen.add(after(lambda m: rewrite(m / part / "config.json", extra=1)))
        shutil.rmtree(tmp_path / "m")
    name = next(p.name for p in (place.model / "tokenizer").iterdir() if "<|im_start|>" in p.read_text())      # the chat template
    seen.add(after(lambda m: (m / "tokenizer" / name).write_text((place.model / "tokenizer" / name).read_text() + " ")))
    assert len(seen) == 10
    with pytest.raises(ladd.UserError, match="tokenizer/ is missing or empty; download the model again"):
        after(lambda m: shutil.rmtree(m / "tokenizer"))


def test_a_turbo_model_is_warned_of(place, tmp_path, capsys):
    model = Path(shutil.copytree(place.model, tmp_path / "turbo"))
    rewrite(model / "scheduler" / "scheduler_config.json", shift=3.0)
    assert run(place, None, "--plan", model=model) == 0 and "looks like Z-Image-Turbo" in capsys.readouterr().out


def test_folders_that_cannot_take_the_data_are_refused(place, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for out, says in (("file", "is no folder"), ("file/out", "is no folder")):
        assert run(place, tmp_path / out) == 2
        line = one_line(capsys)
        assert f"--out {tmp_path / out}: can't be written" in line and says in line
    assert run(place, "/proc/ladd") == 2
    assert "--out /proc/ladd: can't be written" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("mine")
    assert run(place, tmp_path / "full") == 2
    assert "holds something else (thesis.doc, and no manifest.json)" in one_line(capsys) and [*contents(tmp_path / "full")] == ["thesis.doc"]
    foreign = "not a 'zimage data' manifest"
    for text, says in (("{", "can't be read (not JSON)"), ('{"kind": "other"}', foreign), ("[]", foreign)):
        (tmp_path / "full" / "manifest.json").write_text(text)
        assert run(place, tmp_path / "full") == 2 and says in one_line(capsys)


def test_trouble_on_the_way_ends_in_one_line_and_can_be_gone_on_from(place, tmp_path, capsys, monkeypatch):
    def last(fault, name, owner):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fault)
            assert run(place, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and not list((tmp_path / "out").glob("shard-*"))
        return error.splitlines()[-1]

    def full(path, tensors, about):
        path.with_name(path.name + ".part").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    assert "No space left on device); make room and run the same command again: it goes on" in last(full, "save_weights", ladd)
    assert "out of memory (CUDA out of memory. Tried to allocate 2 GiB.); give a smaller --batch" in last(memory, "sample", precompute.Teacher)
    bad = lambda self, captions, noise: noise.fill_(70_000.0)
    assert "sample 0: the teacher's latent is not finite in float16 (largest value 7e+04)" in last(bad, "sample", precompute.Teacher)


def test_plan_times_and_writes_nothing(place, tmp_path, capsys):
    before = contents(place.folder / "made"), sorted(os.listdir(tmp_path))
    assert run(place, tmp_path / "out", "--plan", "--clip", place.clip) == 0
    printed = capsys.readouterr().out
    assert "11 samples of 64x64, 32x48 in 4 shards: 66 passes" in printed and "hours on 1 like this" in printed and "nothing was" in printed
    assert "64x64 " in printed.split("plan:")[1] and "32x48 " in printed.split("plan:")[1]
    assert (contents(place.folder / "made"), sorted(os.listdir(tmp_path))) == before


def test_the_size_on_disk_is_foretold(place, capsys):
    assert run(place, None, "--plan", "--clip", place.clip) == 0
    foretold = float(capsys.readouterr().out.split(" GB on disk")[0].split()[-1]) * 1e9
    tensors = [t for path in place.made.glob("*.safetensors") for t in load_file(path).values()]
    assert foretold == pytest.approx(sum(t.numel() * t.element_size() for t in tensors), rel=0.01)


# ---- reading --------------------------------------------------------------------------------------------------------------

def test_get_gives_the_samples_asked_for(latents):
    x0, cond, noise = latents.get([4, 0])
    assert x0.shape == noise.shape == (2, 16, 8, 8) and len(cond) == 2 and cond.vector.shape == (2, 32)
    again = latents.get([0])
    assert torch.equal(x0[1:], again[0]) and torch.equal(noise[1:], again[2]) and torch.equal(cond.captions[1], again[1].captions[0])
    with pytest.raises(ValueError, match="of one size"):
        latents.get([0, 1])


def test_read_is_a_window_on_the_joint_batches(latents):
    whole = [latents.read(4 * b, 4, 4, seed=3) for b in range(8)]
    for b in (5, 0, 7, 2):                                              # in any order: the reader has no state
        x0, cond, noise = latents.read(4 * b + 1, 2, 4, seed=3)
        assert torch.equal(x0, whole[b][0][1:3]) and torch.equal(noise, whole[b][2][1:3]) and torch.equal(cond.vector, whole[b][1].vector[1:3])
    assert torch.equal(data.Latents(latents.folder).read(28, 4, 4, seed=3)[0], whole[7][0])
    for start, count in ((2, 3), (0, 5), (0, 0)):
        with pytest.raises(ValueError, match="more than one joint batch"):
            latents.read(start, count, 4, seed=3)
    for batch in (7, 16):                                               # a batch larger than a size has samples
        assert len(latents.read(0, batch, batch, seed=3)[0]) == batch


def reader(sizes, lengths):
    """A Latents of these samples, without any file."""
    made = data.Latents.__new__(data.Latents)
    made.about, made.sizes, made.lengths, made.order = {"count": len(sizes)}, sizes, lengths, (None, [])
    return made


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_every_epoch_shows_every_sample_in_batches_of_one_size(batch):
    gen = ladd.generator("test")
    lengths = torch.randint(5, 120, (203,), generator=gen).tolist()
    sizes = [((64, 64), (48, 80), (80, 48))[i % 3] if i else (8, 8) for i in range(203)]     # one size has a single sample
    made = reader(sizes, lengths)
    per_epoch = sum(-(-n // batch) for n in Counter(sizes).values())
    epochs = [[made.batch_at(e * per_epoch + b, batch, 5) for b in range(per_epoch)] for e in range(3)]
    padded = lambda i: adapter.padded_length(range(lengths[i]))
    for batches in epochs:
        assert {i for b in batches for i in b} == set(range(203)) and all(len(b) == batch for b in batches)
        assert all(len({sizes[i] for i in b}) == 1 for b in batches)
        mixed = [b for b in batches if len({padded(i) for i in b}) > 1]
        assert len(mixed) <= 3 * 3                                      # per size at most the boundaries between its four lengths
        assert sum(map(len, batches)) <= 203 + 4 * (batch - 1)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch == 1 or {frozenset(b) for b in epochs[0]} != {frozenset(b) for b in epochs[1]}     # other company, not only other order
    again = reader(sizes, lengths)
    assert again.batch_at(2 * per_epoch, batch, 5) == epochs[2][0] and again.batch_at(0, batch, 5) == epochs[0][0]
    assert [again.batch_at(b, batch, 6) for b in range(per_epoch)] != epochs[0]


def test_a_shard_is_checked_once_and_read_in_part(place, monkeypatch):
    made, seen, verify = data.Latents(place.made), [], data.verify
    monkeypatch.setattr(data, "verify", lambda path, about: (seen.append(path.name), verify(path, about)))
    made.get([0, 2, 4]), made.get([0]), made.get([6])
    assert seen == ["shard-00000.safetensors", "shard-00001.safetensors"]
    monkeypatch.setattr(Path, "read_bytes", None)                       # from now on through safe_open alone
    assert torch.equal(made.get([0])[0], made.get([0, 2])[0][:1])


# ---- damaged data ---------------------------------------------------------------------------------------------------------

def damage_cut(folder, path):
    path.write_bytes(path.read_bytes()[:-64])


def damage_header(folder, path):
    path.write_bytes(path.read_bytes()[:20])


def damage_foreign(folder, path):
    rewrite(path.with_suffix(".json"), kind="toy teacher")


def damage_other_made_of(folder, path):
    rewrite(path.with_suffix(".json"), made_of={**json.loads(path.with_suffix(".json").read_text())["made_of"], "seed": 8})


def damage_swapped(folder, path):
    for suffix in (".safetensors", ".json"):
        shutil.copy((folder / "shard-00003").with_suffix(suffix), path.with_suffix(suffix))


def damage_sidecar(folder, path):
    path.with_suffix(".json").write_text("{")


def damage_to_no_tensors(folder, path):
    save_file({}, path)


@pytest.mark.parametrize("damage, says", [
    (damage_cut, "cut off or damaged"), (damage_header, "damaged or cut off"), (damage_foreign, "not a 'zimage shard' file"),
    (damage_other_made_of, "belongs to other data (seed = 8 (was 0))"), (damage_swapped, "belongs to other data"),
    (damage_sidecar, "damaged or cut off"), (damage_to_no_tensors, "damaged or cut off")])
def test_damaged_shards_are_found_at_once(copy, damage, says):
    damage(copy, path := copy / "shard-00001.safetensors")
    with pytest.raises(ladd.UserError) as error:
        data.Latents(copy)
    assert str(path) in str(error.value) and says in str(error.value) and "run its precompute command again" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_shards_are_counted(copy):
    for name in ("shard-00001.safetensors", "shard-00002.json"):
        (copy / name).unlink()
    with pytest.raises(ladd.UserError, match="2 of 4 shards are missing, shard-00001.safetensors the first; go on with: python -m zimage"):
        data.Latents(copy)


def test_a_flipped_byte_is_found_when_its_shard_is_first_read(copy):
    path = copy / "shard-00000.safetensors"
    path.write_bytes((raw := bytearray(path.read_bytes()))[:-7] + bytes([raw[-7] ^ 4]) + raw[-6:])
    made = data.Latents(copy)
    made.get([1])                                                       # in another shard
    for _ in range(2):
        with pytest.raises(ladd.UserError, match="shard-00000.safetensors: damaged .its checksum differs"):
            made.get([0])


def test_other_folders_models_and_vectors_are_refused(place, tmp_path, latents):
    for folder, text, says in ((tmp_path / "none", None, "manifest.json: can't be read (No such file or directory); name a folder that"),
                               (tmp_path, "x", "can't be read (not JSON)"), (tmp_path, '{"schema": 99}', "not a 'zimage data' manifest")):
        if text:
            (folder / "manifest.json").write_text(text)
        with pytest.raises(ladd.UserError) as error:
            data.Latents(folder)
        assert says in str(error.value)
    with pytest.raises(ladd.UserError, match="holds no vector 't5', only qwen, clip"):
        data.Latents(place.made, vector="t5")
    latents.check_model(adapter.model_fingerprint(place.model))
    with pytest.raises(ladd.UserError, match="made by another model"):
        latents.check_model("0" * 64)
