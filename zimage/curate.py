"""Prompts for Z-Image's training: written by a grammar of our own, or a user's own files cleaned.

    python -m zimage.curate --write 10000 --out train.txt     and train-heldout.txt beside it
    python -m zimage.curate mine.csv more.jsonl --out train.txt

Duplicates, near-duplicates, over-long prompts and those with control characters go;
of your own files train.dropped.tsv says which and why. The same command writes the same files.
"""

import csv
import math
import random
import re
import sys
import tomllib
import unicodedata
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import ladd
from zimage import data

GRAMMAR = Path(__file__).parent / "prompts" / "grammar.toml"
LIMIT = 512 - 16  # tokens that the text encoder reads, less those of the chat template
NO_TEXT = "Cc", "Cs", "Co", "Cn"  # control, halves of characters, private, unassigned
ALIKE = 0.7  # share of `features` in common from which two prompts are one
HELD_OUT = 8  # one in so many pairs of subject and setting is held out


def write_prompt(grammar, rng):
    """A random prompt of the grammar, and its pair of subject and setting."""
    kinds = grammar["kinds"]
    kind = rng.choices(list(kinds.values()), [k["weight"] for k in kinds.values()])[0]
    lists, chosen = {**grammar["shared"], **kind}, defaultdict(list)

    def entry(found):
        name, optional = found.groups()
        if optional and rng.random() < 0.5:
            return ""
        rest = [word for word in lists[name] if word not in chosen[name]]  # no word comes twice
        chosen[name].append(rng.choice(rest))
        return chosen[name][-1]

    text = re.sub(r"\{(\w+)(\?)?\}", entry, rng.choice(kind["forms"]))
    text = re.sub(r"\(n\)(?= (?!uni|one|eu)[aeiou])", "n", unify(text)).replace("(n)", "")
    return text[0].upper() + text[1:], (chosen["subject"][0], chosen["setting"][0])


def write(count, held_out, seed):
    """(training prompts, held-out prompts) of these numbers, all unlike, no pair in both."""
    grammar = tomllib.loads(GRAMMAR.read_text(encoding="utf-8"))
    rng = random.Random(f"{seed} curate")  # a text seeds it alike on every machine
    wanted = {"held out": held_out, "training": count}
    drawn = {side: [] for side in wanted}
    while any(len(drawn[side]) < 1.3 * wanted[side] for side in wanted):  # some will go again
        text, pair = write_prompt(grammar, rng)
        # To which side a pair belongs depends on the pair alone: no two runs can mix them up.
        held = zlib.crc32("|".join(pair).encode()) % HELD_OUT == 0
        drawn["held out" if held else "training"].append(text)
    texts = [(side, text) for side in wanted for text in drawn[side][: int(1.3 * wanted[side])]]
    kept, _ = clean(texts)
    found = {side: [text for s, text in kept if s == side][:n] for side, n in wanted.items()}
    enough = all(len(found[side]) == n for side, n in wanted.items())
    ladd.check(enough, f"--write {count}: the grammar has fewer that differ enough; ask for fewer")
    return found["training"], found["held out"]


def unify(text):
    """One line in Unicode's composed form, with single blanks."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def features(text):
    """Its pairs of neighbouring words, ends included; a Chinese or Japanese sign is a word. So one
    word changed in 11 makes near-duplicates, and two that change places in 15 do not."""
    words = re.findall(r"[\u3040-\u30ff\u4e00-\u9fff]|[^\W_]+", text.casefold()) or list(text)
    return set(zip(["", *words], [*words, ""], strict=True))


def clean(texts):
    """[(place, text or None)] -> kept [(place, unified text)], dropped [(place, why, text)].

    Of two that are alike the first stays. Alike: the intersection of their `features` is ALIKE of
    the union. Then they share one of their rarest features (all but ALIKE of each): only such pairs
    are compared.
    """
    kept, dropped = [], []
    sets = [features(unify(text or "")) for _, text in texts]
    often = Counter(feature for some in sets for feature in some)
    index = defaultdict(list)  # of a feature: the kept prompts that have it among their rarest
    for k, (place, text) in enumerate(texts):
        plain, found = unify(text or ""), sets[k]
        rare = sorted(found, key=lambda feature: (often[feature], feature))
        rare = rare[: len(rare) - math.ceil(ALIKE * len(rare)) + 1]
        twins = dict.fromkeys(j for feature in rare for j in index[feature])
        # About how many tokens, rather too many: four letters each, other characters one each.
        tokens = sum(math.ceil(len(piece) / 4) for piece in re.findall(r"[a-zA-Z]+|\S", plain))
        alike = (j for j in twins if len(found & sets[j]) >= ALIKE * len(found | sets[j]))
        if not plain:
            why = "no prompt"
        elif any(unicodedata.category(c) in NO_TEXT for c in plain):
            why = "control characters"
        elif tokens > LIMIT:
            why = "too long"
        elif (twin := next(alike, None)) is not None:
            why = f"much the same as {texts[twin][0]}"
        else:
            kept.append((place, plain))
            for feature in rare:
                index[feature].append(k)
            continue
        dropped.append((place, why, text))
    return kept, dropped


def main(argv=None):
    parser = ladd.Parser("python -m zimage.curate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help=f"ending in {', '.join(data.ENDINGS)}")
    add("--write", type=int, default=0, metavar="N", help="write so many prompts, from no file")
    add("--held-out", type=int, default=1000, metavar="N", help="held-out ones beside OUT (1000)")
    add("--seed", type=int, default=0, help="of --write (0)")
    add("--out", required=True, type=Path, metavar="FILE", help="a new .txt, one prompt per line")
    options = parser.parse_args(argv)
    out = options.out
    beside = out.with_name(f"{out.stem}-heldout.txt")
    ok = out.suffix == ".txt" and not out.exists() and not (options.write and beside.exists())
    ladd.check(ok, f"--out {out}: give a .txt file that does not exist yet")
    ladd.check(bool(options.files) != (options.write > 0), "give files to clean, or --write N")
    if options.write:
        train, held_out = write(options.write, options.held_out, options.seed)
        save(out, train)
        return save(beside, held_out)
    texts = [(f"{path}:{n}", text) for path in options.files for n, text in data.read_texts(path)]
    kept, dropped = clean(texts)
    ladd.check(kept, f"{options.files[0]}: no prompt is left of {len(dropped)}: {dropped[:1]}")
    save(out, [text for _, text in kept])
    report = out.with_suffix(".dropped.tsv")
    settings = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with ladd.replacing(report) as part, open(part, "w", **settings) as f:
        csv.writer(f, "excel-tab").writerows([("place", "why", "prompt"), *dropped])
    for why, n in Counter(why.split(" as ")[0] for _, why, _ in dropped).most_common():
        print(f"{n:,} dropped: {why}")
    print(f"{report} names each")


def save(path, prompts):
    with ladd.replacing(path) as part:
        part.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    print(f"{path}: {len(prompts):,} prompts")


if __name__ == "__main__":
    sys.exit(ladd.run_command_line(main))
