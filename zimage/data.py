"""Prompts, and the teacher's samples on disk: what `zimage.precompute` writes and the training reads.

A data folder holds manifest.json (of what it is made, and the plan of its shards) and the shards: safetensors of up to 64
samples of one image size, each with a .json beside it. Sample i is made from prompt i and from the noise keyed by (seed, i),
so the noise is not stored. Per sample k of a shard: latent.k [16, h, w] float16 and caption.k [L, C] bfloat16; for all of
them: vector.qwen [n, C] float32, the mean over a caption's tokens, and, where asked for, vector.clip [n, D] float32.
"""

import codecs
import csv
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import torch

import ladd
from ladd import UserError
from zimage import adapter

KIND, SHARD_KIND = "zimage data", "zimage shard"
MEND = "run its precompute command again, which makes damaged shards anew"


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------

def read_prompts(path):
    """The prompts of a file: .txt (one per line), .jsonl (objects with "prompt") or .csv (a column "prompt"), in UTF-8.

    UserError names file and line of whatever is wrong. Too long ones are found in `zimage.precompute`, by the tokenizer.
    """
    return [prompt for _, prompt in numbered_prompts(path)]


def numbered_prompts(path):
    """`read_prompts` with the line at which each prompt ends: [(line, prompt)]."""
    path = Path(path)
    reader = {".txt": txt_lines, ".jsonl": jsonl_lines, ".csv": csv_lines}.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--prompts {path}: unknown ending {path.suffix!r}; give a .txt (one prompt per line), a .jsonl (objects "
                        f"with \"prompt\") or a .csv (a column \"prompt\")")
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"--prompts {path}: can't be read ({error.strerror}); name a file of prompts") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"--prompts {path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8") from error
    if not text.strip():
        raise UserError(f"--prompts {path}: empty; give at least one prompt")
    prompts = []
    for line, prompt in reader(path, text):
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"--prompts {path}, line {line}: no prompt on it; remove the line, or write one")
        if any("\ud800" <= c <= "\udfff" for c in prompt):      # JSON can spell half a character
            raise UserError(f"--prompts {path}, line {line}: holds half of a surrogate pair, which is no text; write the character itself")
        prompts.append((line, prompt.strip()))
    if not prompts:
        raise UserError(f"--prompts {path}: holds no prompt, only the head of its table; give at least one")
    return prompts


def txt_lines(path, text):
    return enumerate(text.removesuffix("\n").split("\n"), 1)


def jsonl_lines(path, text):
    for line, row in txt_lines(path, text):
        if not row.strip():
            yield line, None
            continue
        try:
            yield line, json.loads(row)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"--prompts {path}, line {line}: not a JSON object with a \"prompt\" ({type(error).__name__})") from error


def csv_lines(path, text):
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(rows)
        if names.count("prompt") != 1:
            raise UserError(f"--prompts {path}, line 1: the columns are {', '.join(names) or 'nameless'}; exactly one must be called prompt")
        for row in rows:
            if row and len(row) != len(names):
                raise UserError(f"--prompts {path}, line {rows.line_num}: {len(row)} columns, but line 1 names {len(names)}; "
                                f"put a prompt that holds a comma in quotes")
            yield rows.line_num, row[names.index("prompt")] if row else None
    except csv.Error as error:
        raise UserError(f"--prompts {path}, line {rows.line_num}: malformed ({error}); check its quotes") from error


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------

def plan_shards(count, sizes, shard_size):
    """The shards of `count` samples: [{name, indices, height, width}]. Sample i has size sizes[i % len(sizes)], in pixels.

    Shards of one size follow each other, so ranks that take every n-th one get a fair share of each size.
    """
    shards = []
    for height, width in dict.fromkeys(sizes):
        mine = [i for i in range(count) if sizes[i % len(sizes)] == (height, width)]
        for start in range(0, len(mine), shard_size):
            shards.append({"name": f"shard-{len(shards):05d}.safetensors", "indices": mine[start:start + shard_size],
                           "height": height, "width": width})
    return shards


def read_manifest(folder):
    """The manifest of a data folder; UserError where there is none, or a foreign one."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not JSON"
        raise UserError(f"{path}: can't be read ({why}); name a folder that python -m zimage.precompute --out made") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != ladd.SCHEMA or manifest.get("kind") != KIND \
            or not {"made_of", "shards", "command"} <= manifest.keys():
        raise UserError(f"{path}: not a '{KIND}' manifest of schema {ladd.SCHEMA}; name a folder that python -m zimage.precompute --out made")
    return manifest


def look_at(folder, shard, made_of):
    """(what its .json says, its tensors by header) of a planned shard, or None where it is not there.

    UserError where it is foreign or cut off; the bytes themselves are `verify`'s. Running precompute again mends either.
    """
    path = Path(folder) / shard["name"]
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        tensors, size = adapter.header(path)
    except FileNotFoundError:
        return None                     # weights are renamed into place before their .json is: either alone is no shard
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: it or its .json is damaged or cut off ({type(error).__name__}); {MEND}") from error
    if not isinstance(about, dict) or about.get("schema") != ladd.SCHEMA or about.get("kind") != SHARD_KIND \
            or not {"sha256", "lengths"} <= about.keys():
        raise UserError(f"{path}: not a '{SHARD_KIND}' file of schema {ladd.SCHEMA}; {MEND}")
    if other := ladd.unlike(made_of, about.get("made_of") or {}) or ladd.unlike(shard, {k: about.get(k) for k in shard}):
        raise UserError(f"{path}: belongs to other data ({other[0][:200]}); {MEND}")
    if path.stat().st_size != size:
        raise UserError(f"{path}: cut off or damaged ({path.stat().st_size} bytes, not {size}); {MEND}")
    return about, tensors


def verify(path, about):
    """UserError where the file's bytes are not those that its .json vouches for."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != about["sha256"]:
        raise UserError(f"{path}: damaged (its checksum differs from its .json); {MEND}")


def whole(folder, shard, made_of):
    """Is this planned shard there, complete and undamaged? It is read through."""
    try:
        found = look_at(folder, shard, made_of)
        if found:
            verify(Path(folder) / shard["name"], found[0])
    except UserError:
        return False
    return found is not None


class Latents:
    """The teacher's samples for training. Opening checks that every shard is there and of its full size; a shard's checksum is
    checked when the first sample is read from it.

    about: of what the data is made. sizes: (h, w) of each sample's latent. lengths: tokens of its caption. vector_dim: D of the
    heads' condition, which is `vector`: qwen (the mean over the caption's tokens) or clip. UserError for whatever is wrong.
    """

    def __init__(self, folder, vector="qwen"):
        self.folder, self.vector = Path(folder), vector
        manifest = read_manifest(folder)
        self.about, self.shards = manifest["made_of"], manifest["shards"]
        if vector not in self.about["vectors"]:
            raise UserError(f"{folder}: holds no vector {vector!r}, only {', '.join(self.about['vectors'])}; take one of those, or "
                            f"precompute into another folder" + (" with --clip" if vector == "clip" else ""))
        found = [look_at(folder, shard, self.about) for shard in self.shards]
        if missing := [shard["name"] for shard, f in zip(self.shards, found) if f is None]:
            raise UserError(f"{folder}: {len(missing)} of {len(found)} shards are missing, {missing[0]} the first; go on with: "
                            f"{manifest['command']}")
        self.abouts, self.verified = [about for about, _ in found], set()
        self.vector_dim = found[0][1][f"vector.{vector}"]["shape"][1]
        self.places, self.sizes, self.lengths = {}, [None] * self.about["count"], [0] * self.about["count"]
        for s, shard in enumerate(self.shards):
            for k, i in enumerate(shard["indices"]):
                self.places[i] = s, k
                self.sizes[i] = (shard["height"] // adapter.PIXELS, shard["width"] // adapter.PIXELS)
                self.lengths[i] = self.abouts[s]["lengths"][k]
        self.order = None, []           # (its key, the batches of one epoch)

    def __len__(self):
        return self.about["count"]

    def check_model(self, fingerprint):
        """UserError where the data was not made by the model of this `adapter.model_fingerprint`."""
        if self.about["fingerprint"] != fingerprint:
            raise UserError(f"{self.folder}: made by another model ({self.about['model']}, {self.about['fingerprint'][:12]}; this one is "
                            f"{fingerprint[:12]}: other files in {', '.join(adapter.DECIDING)}); train that one, or precompute again with this one")

    def get(self, indices):
        """Samples by index, all of one size: x0 [n, 16, h, w], Prompts, and the noise [n, 16, h, w] each was made from.

        ValueError where the sizes differ. Only what is asked for is read, besides the one check of a shard's bytes.
        """
        from safetensors import safe_open
        indices = [int(i) for i in indices]
        sizes = {self.sizes[i] for i in indices}
        if len(sizes) != 1:
            raise ValueError(f"samples of one size are wanted, these have {sorted(sizes)} (h, w)")
        x0, captions, vectors = [], [], []
        for i in indices:
            s, k = self.places[i]
            path = self.folder / self.shards[s]["name"]
            if s not in self.verified:
                verify(path, self.abouts[s])
                self.verified.add(s)
            with safe_open(path, "pt") as f:
                x0.append(f.get_tensor(f"latent.{k}").float())
                captions.append(f.get_tensor(f"caption.{k}").clone())       # not a view of the mapped file
                vectors.append(f.get_slice(f"vector.{self.vector}")[k].clone())
        noise = [adapter.noise_for(self.about["seed"], i, *self.sizes[i]) for i in indices]
        return torch.stack(x0), adapter.Prompts(captions, torch.stack(vectors)), torch.stack(noise)

    def read(self, start, count, batch, seed):
        """`get` of the places start .. start + count - 1 of an endless reader, which has no state: place p lies in joint batch
        p // batch. All of a joint batch have one size, and one padded caption length where it does not straddle two.

        ValueError where the places lie in more than one joint batch.
        """
        number, place = divmod(start, batch)
        if count < 1 or place + count > batch:
            raise ValueError(f"places {start} .. {start + count - 1} lie in more than one joint batch of {batch}")
        return self.get(self.batch_at(number, batch, seed)[place:place + count])

    def batch_at(self, number, batch, seed):
        """The samples of joint batch `number`, counted through all epochs: [index] of length `batch`."""
        per_epoch = sum(-(-n // batch) for n in Counter(self.sizes).values())
        epoch, place = divmod(number, per_epoch)
        if self.order[0] != (epoch, batch, seed):
            self.order = (epoch, batch, seed), self.epoch_batches(epoch, batch, seed)
        return self.order[1][place]

    def epoch_batches(self, epoch, batch, seed):
        """The joint batches of one epoch, in order, keyed by (seed, epoch): every sample is in at least one of them."""
        gen, batches = ladd.generator(seed, epoch, "zimage reader"), []
        tie = torch.randperm(len(self), generator=gen).tolist()
        by_length = sorted(range(len(self)), key=lambda i: (adapter.padded_length(range(self.lengths[i])), tie[i]))
        for size in sorted(set(self.sizes)):
            mine = [i for i in by_length if self.sizes[i] == size]
            for start in range(0, len(mine), batch):            # the last one takes in some of the batch before it, of like length
                first = max(0, min(start, len(mine) - batch))
                batches.append([mine[(first + k) % len(mine)] for k in range(batch)])
        return [batches[b] for b in torch.randperm(len(batches), generator=gen).tolist()]
