"""Prompts, and the teacher's samples on disk: what `zimage.precompute` writes and training reads.

A data folder holds manifest.json (what the data is made of, and the plan of its shards) and the
shards, safetensors of up to 64 samples of one image size. Sample i is made from prompt i and from
the noise keyed by (seed, i), so the noise is not stored. Per sample k of a shard: latent.k
[16, h, w] float16 and caption.k [L, C] bfloat16; for all of them: vector.qwen [n, C] float32, the
mean over a caption's tokens, and, where asked for, vector.clip [n, D] float32.
"""

import contextlib
import csv
import io
import json
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import ladd
from ladd import UserError, check
from zimage import adapter

KIND, SHARD_KIND = "zimage data 2", "zimage shard 2"


def read_prompts(path):
    """The prompts of a file in UTF-8, in one of FORMATS. Blank lines are skipped. UserError names
    file and line of what is wrong."""
    return [prompt for _, prompt in numbered_prompts(path)]


def numbered_prompts(path):
    """`read_prompts` with the line at which each prompt ends: [(line, prompt)]."""
    path = Path(path)
    kind = path.suffix.lower()
    known = "; ".join(f"{ending}: {what}" for ending, (what, _) in FORMATS.items())
    check(kind in FORMATS, f"--prompts {path}: unknown ending {kind!r}; give one of {known}")
    what, read = FORMATS[kind]
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"--prompts {path}, line {line}: not UTF-8; save it so") from error
    prompts = []
    for line, prompt in read(text):
        place = f"--prompts {path}, line {line}"
        ok = isinstance(prompt, str) and prompt.strip()
        check(ok, f"{place}: no prompt; a {kind} holds {what}")
        # UTF-16 without a mark is UTF-8 full of NULs, and JSON can spell half a character.
        ok = not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in prompt)
        check(ok, f"{place}: holds characters that are no text; save the file as UTF-8")
        prompts.append((line, prompt.strip()))
    check(prompts, f"--prompts {path}: empty; a {kind} holds {what}")
    return prompts


def txt_lines(text):
    lines = enumerate(text.split("\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


def jsonl_lines(text):
    for number, line in txt_lines(text):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield number, row.get("prompt") if isinstance(row, dict) else None


def csv_lines(text):
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in rows:  # None holds what lies beyond the last column: an unquoted comma
            yield rows.line_num, None if None in row else row.get("prompt")
    except csv.Error:
        yield rows.reader.line_num, None


FORMATS = {
    ".txt": ("one prompt per line", txt_lines),
    ".jsonl": ('one object with a "prompt" per line', jsonl_lines),
    ".csv": ('a column "prompt", and prompts with commas in quotes', csv_lines),
}


def plan_shards(lengths, sizes, shard_size):
    """The shards of a sample per caption, whose lengths in tokens are given. Sample i has size
    sizes[i % len(sizes)], in pixels. Shards of one size follow each other, so ranks that take every
    n-th one get a fair share of each size. Returns [{name, height, width, indices, lengths}]."""
    shards = []
    for height, width in dict.fromkeys(sizes):
        own = [i for i in range(len(lengths)) if sizes[i % len(sizes)] == (height, width)]
        for start in range(0, len(own), shard_size):
            indices = own[start : start + shard_size]
            shard = {"name": f"shard-{len(shards):05d}.safetensors"}
            shard |= {"height": height, "width": width, "indices": indices}
            shards.append({**shard, "lengths": [lengths[i] for i in indices]})
    return shards


def count_held_out(count):
    """How many of so many samples training never reads, the last ones: a tenth, but 3 to 64."""
    return min(64, max(3, count // 10))


def read_manifest(folder):
    """The manifest of a data folder; UserError where there is none, or another kind."""
    path, way_out = Path(folder) / "manifest.json", "name a folder that zimage.precompute made"
    check(path.exists(), f"--data {folder}: holds no manifest.json; {way_out}")
    with contextlib.suppress(ValueError):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and manifest.get("kind") == KIND:
            return manifest
    raise UserError(f"--data {folder}: its manifest is no '{KIND}'; {way_out}")


def is_whole(folder, shard, made_of):
    """Is this planned shard there, not cut off, and made of this? Its header is read alone."""
    try:
        with safe_open(Path(folder) / shard["name"], "pt") as f:
            about = json.loads(f.metadata()["about"])
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return False
    return about == {"kind": SHARD_KIND, "made_of": made_of, **shard}


class Latents:
    """The teacher's samples for training. Opening checks that every shard is there and whole.

    about: what the data is made of. sizes: (h, w) of each sample's latent. lengths: tokens of its
    caption. vector_dim: D of the heads' condition, which is `vector`: qwen (the mean over the
    caption's tokens) or clip. UserError for whatever is wrong.
    """

    def __init__(self, folder, vector="qwen"):
        self.folder, self.vector = Path(folder), vector
        manifest = read_manifest(folder)
        made_of, shards = manifest["made_of"], manifest["shards"]
        self.about = {"model": manifest["model"], **made_of}
        known = made_of["vectors"]
        way_out = f"take one of {', '.join(known)}, or precompute into another folder with --clip"
        check(vector in known, f"text_vector = {vector}: {folder} holds no such vector; {way_out}")
        self.vector_dim = known[vector]
        self.trained = range(len(self) - count_held_out(len(self)))  # what `read` gives
        check(self.trained, f"--data {folder}: the last 3 samples are held out; make at least 4")
        lost = [s["name"] for s in shards if not is_whole(folder, s, made_of)]
        why = f"{len(lost)} of {len(shards)} shards are missing or damaged, {lost[:1]} the first"
        check(not lost, f"--data {folder}: {why}; make them by: {manifest['command']}")
        self.places = {}  # of a sample: its shard, and its place there
        self.sizes, self.lengths = [None] * len(self), [0] * len(self)
        for shard in shards:
            for k, (i, length) in enumerate(zip(shard["indices"], shard["lengths"], strict=True)):
                self.places[i] = shard["name"], k
                self.sizes[i] = shard["height"] // adapter.PIXELS, shard["width"] // adapter.PIXELS
                self.lengths[i] = length
        self.order = None, []  # the key of one epoch, and its batches

    def __len__(self):
        return self.about["count"]

    def check_model(self, fingerprint):
        """UserError unless the model of this `adapter.model_fingerprint` made the data."""
        same = self.about["fingerprint"] == fingerprint
        why = f"--data {self.folder}: made by another model, {self.about['model']}"
        check(same, f"{why}; give that one as --model, or precompute with this one")

    def get(self, indices):
        """Samples by index, all of one size: x0 [n, 16, h, w], Prompts, and the noise [n, 16, h, w]
        that each was made from. ValueError where the sizes differ. Only these samples are read."""
        indices = [int(i) for i in indices]
        if len({self.sizes[i] for i in indices}) != 1:
            raise ValueError(f"samples {indices} are not of one size")
        x0, captions, vectors = [], [], []
        for i in indices:
            name, k = self.places[i]
            with safe_open(self.folder / name, "pt") as f:
                x0.append(f.get_tensor(f"latent.{k}").float())
                captions.append(f.get_tensor(f"caption.{k}").clone())  # no view of the mapped file
                vectors.append(f.get_slice(f"vector.{self.vector}")[k].clone())
        noise = [adapter.noise_for(self.about["seed"], i, *self.sizes[i]) for i in indices]
        return torch.stack(x0), adapter.Prompts(captions, torch.stack(vectors)), torch.stack(noise)

    def read(self, start, count, batch, seed):
        """`get` of the places start .. start + count - 1 of an endless reader, which has no state:
        place p lies in joint batch p // batch. All of a joint batch have one size, and one padded
        caption length where it does not straddle two. ValueError where the places lie in two."""
        number, place = divmod(start, batch)
        if place + count > batch:
            raise ValueError(f"{count} places from {start} are not of one joint batch of {batch}")
        per_epoch = sum(-(-n // batch) for n in Counter(self.sizes[: len(self.trained)]).values())
        epoch, k = divmod(number, per_epoch)
        if self.order[0] != (epoch, batch, seed):
            self.order = (epoch, batch, seed), self.epoch_batches(epoch, batch, seed)
        return self.get(self.order[1][k][place : place + count])

    def epoch_batches(self, epoch, batch, seed):
        """The joint batches of one epoch, in order, each a list of `batch` indices; keyed by
        (seed, epoch). Every sample is in at least one of them, but for those held out."""
        gen = ladd.generator(seed, epoch, "zimage reader")
        tie = torch.randperm(len(self), generator=gen).tolist()
        padded = [adapter.padded_length(n) for n in self.lengths]
        by_length = sorted(self.trained, key=lambda i: (padded[i], tie[i]))
        joint = []
        for size in sorted(set(self.sizes)):
            own = [i for i in by_length if self.sizes[i] == size]
            for start in range(0, len(own), batch):
                # The last batch takes in some of the one before it, whose lengths are alike.
                first = max(0, min(start, len(own) - batch))
                joint.append([own[(first + k) % len(own)] for k in range(batch)])
        return [joint[b] for b in torch.randperm(len(joint), generator=gen).tolist()]

    def held_out_batches(self, size):
        """The held-out samples in lists of at most `size`, of one image size and padded length."""
        held_out = range(len(self.trained), len(self))
        for image in sorted({self.sizes[i] for i in held_out}):
            own = [i for i in held_out if self.sizes[i] == image]
            for rows in adapter.batches([self.lengths[i] for i in own], size):
                yield [own[k] for k in rows]
