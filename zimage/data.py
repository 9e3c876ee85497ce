"""Prompts, and the teacher's samples on disk: what `zimage.precompute` writes and training reads.

A data folder holds manifest.json (what the data is made of, and the plan of its shards) and the
shards, safetensors of up to 64 samples of one image size. Sample i is made from prompt i and from
the noise keyed by (seed, i), so the noise is not stored. Per sample k of a shard: latent.k
[16, h, w] float16 and caption.k [L, C] bfloat16; for all of them: vector.qwen [n, C] float32, the
mean over a caption's tokens, and, where asked for, vector.clip [n, D] float32.
"""

import contextlib
import csv
import functools
import io
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import ladd
from ladd import UserError, check
from zimage import adapter

KIND, SHARD_KIND = "zimage data 3", "zimage shard 3"  # 3: with noise that no judge draws
ENDINGS = ".txt", ".jsonl", ".csv", ".tsv"  # of files of prompts
NAMES = "prompt", "caption", "text"  # of a prompt in a table or an object; the first one counts


def read_texts(path):
    """What a file in UTF-8 holds as prompts: [(line, text, or None where there is none)].

    .txt: a prompt per line; .jsonl: an object per line; .csv, .tsv: a table, whose prompts with
    commas stand in quotes. Blank lines are skipped. UserError where the file can't be read.
    """
    kind = Path(path).suffix.lower()
    check(kind in ENDINGS, f"{path}: give a file that ends in {' or '.join(ENDINGS)}")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if kind == ".txt":
        return lines
    if kind == ".jsonl":
        return [(number, from_json(line)) for number, line in lines]
    delimiter = "\t" if kind == ".tsv" else ","
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(rows.line_num, from_row(row)) for row in rows]
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.reader.line_num}: {error}; mend it") from error


def from_row(row):
    """The prompt of a table's row or a JSON object; None where there is none."""
    # In a table's row, None holds what lies beyond the last column: after a comma without quotes.
    texts = [row.get(name) for name in NAMES] if isinstance(row, dict) and None not in row else []
    return next((text for text in texts if isinstance(text, str)), None)


def from_json(line):
    with contextlib.suppress(ValueError):
        return from_row(json.loads(line))


def read_prompts(path):
    """The prompts of a file, as `read_texts` reads it; UserError names the line that has none."""
    prompts = []
    for line, text in read_texts(path):
        check(text and text.strip(), f"{path}, line {line}: no prompt")
        # UTF-16 without a mark is UTF-8 full of NULs, and JSON can spell half a character.
        ok = not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)
        check(ok, f"{path}, line {line}: holds characters that are no text; save it as UTF-8")
        prompts.append(text.strip())
    check(prompts, f"{path}: holds no prompt")
    return prompts


def plan_shards(lengths, sizes, shard_size):
    """The shards of a sample per caption, whose lengths in tokens are given. Sample i has size
    sizes[i % len(sizes)], in pixels. Shards of one size follow each other, so ranks that take every
    n-th one get a fair share of each size. Returns [{name, height, width, indices, lengths}]."""
    shards = []
    for height, width in dict.fromkeys(sizes):
        own = [i for i in range(len(lengths)) if sizes[i % len(sizes)] == (height, width)]
        for start in range(0, len(own), shard_size):
            indices = own[start : start + shard_size]
            shard = {"name": f"shard-{len(shards):05d}.safetensors", "indices": indices}
            shard |= {"height": height, "width": width, "lengths": [lengths[i] for i in indices]}
            shards.append(shard)
    return shards


def count_held_out(count):
    """How many of so many samples training never reads, the last ones: a tenth, but 3 to 64."""
    return min(64, max(3, count // 10))


def read_manifest(folder):
    """The manifest of a data folder; UserError where there is none, or another kind."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
        if manifest.get("kind") == KIND:
            return manifest
    why = f"holds no manifest.json of the kind {KIND!r}"
    raise UserError(f"--data {folder}: {why}; name a folder that zimage.precompute made")


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

    about: what the data is made of. sizes: (h, w) of each latent. lengths: tokens of each caption.
    """

    def __init__(self, folder, vector="qwen"):
        self.folder, self.vector = Path(folder), vector
        manifest = read_manifest(folder)
        made_of, shards = manifest["made_of"], manifest["shards"]
        self.about = {"model": manifest["model"], **made_of}
        known = made_of["vectors"]
        way_out = f"take one of {', '.join(known)}, or precompute into another folder with --clip"
        check(vector in known, f"text_vector = {vector}: {folder} holds no such vector; {way_out}")
        self.trained = range(len(self) - count_held_out(len(self)))  # what `read` gives
        check(self.trained, f"--data {folder}: the last 3 samples are held out; make at least 4")
        lost = [s["name"] for s in shards if not is_whole(folder, s, made_of)]
        why = f"{len(lost)} of {len(shards)} shards are missing or damaged, {lost[:1]} the first"
        check(not lost, f"--data {folder}: {why}; make them by: {manifest['command']}")
        self.places = {}  # of a sample: its shard, and its place there
        self.sizes, self.lengths = [None] * len(self), [0] * len(self)
        for shard in shards:
            size = shard["height"] // adapter.PIXELS, shard["width"] // adapter.PIXELS
            for k, (i, length) in enumerate(zip(shard["indices"], shard["lengths"], strict=True)):
                self.places[i], self.sizes[i], self.lengths[i] = (shard["name"], k), size, length
        # Kept: epoch 0, which is asked for its length, and today's.
        self.epoch_batches = functools.lru_cache(2)(self.epoch_batches)

    def __len__(self):
        return self.about["count"]

    def get(self, indices):
        """Samples by index, all of one size: x0 [n, 16, h, w], Prompts, and the noise [n, 16, h, w]
        that each was made from. Only these samples are read."""
        x0, captions, vectors = [], [], []
        for i in indices:
            name, k = self.places[i]
            with safe_open(self.folder / name, "pt") as f:
                x0.append(f.get_tensor(f"latent.{k}").float())
                captions.append(f.get_tensor(f"caption.{k}").clone())  # no view of the mapped file
                vectors.append(f.get_slice(f"vector.{self.vector}")[k].clone())
        key = "data", self.about["seed"]  # no judge's
        noise = [adapter.noise_for(key, i, *self.sizes[i]) for i in indices]
        return torch.stack(x0), adapter.Prompts(captions, torch.stack(vectors)), torch.stack(noise)

    def read(self, start, count, batch, seed):
        """`get` of the places start .. start + count - 1, all in one joint batch, of an endless
        reader without state. Place p lies in joint batch p // batch. Its images have one size. Its
        captions have one padded length, or two where a batch lies across both."""
        number, place = divmod(start, batch)
        epoch, k = divmod(number, len(self.epoch_batches(0, batch, seed)))  # all have as many
        return self.get(self.epoch_batches(epoch, batch, seed)[k][place : place + count])

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
