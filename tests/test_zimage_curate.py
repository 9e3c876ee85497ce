"""zimage/curate.py: the grammar, held-out pairs, near-duplicates, and a user's own files."""

import random
import re
import tomllib

import tiny
from zimage import curate, data

GRAMMAR = tomllib.loads(curate.GRAMMAR.read_text(encoding="utf-8"))


def test_written_prompts_are_many_unlike_and_share_no_pair_with_the_held_out_ones():
    train, held_out = curate.write(600, 100, seed=0)
    assert len(train) == 600 and len(held_out) == 100
    assert curate.write(600, 100, seed=0) == (train, held_out)
    assert len(set(curate.write(600, 100, seed=1)[0]) & set(train)) < 30
    assert not curate.clean(list(enumerate(train + held_out)))[1]
    rng = random.Random("0 curate")  # the same draws: their pairs of subject and setting
    pairs = dict(curate.write_prompt(GRAMMAR, rng) for _ in range(3000))
    assert not {pairs[text] for text in train} & {pairs[text] for text in held_out}


def test_every_slot_of_the_grammar_can_be_filled_and_leaves_no_mark():
    for name, kind in GRAMMAR["kinds"].items():
        lists = {**GRAMMAR["shared"], **kind}
        for form in kind["forms"]:
            slots = re.findall(r"\{(\w+)\??\}", form)
            assert {"subject", "setting"} <= {*slots} <= {*lists}, (name, form)
    rng = random.Random(1)
    texts = [curate.write_prompt(GRAMMAR, rng)[0] for _ in range(5000)]
    for text in texts:
        assert not re.search(r"[{}?]|\(n\)|  |\.\.|,,|\b[Aa] a\b", text), text
        assert curate.clean([(0, text)]) == ([(0, text)], []), text
    # Texts in the image, Chinese, counts; lengths from a line to a paragraph.
    for pattern, least in ((r'"', 200), ("[\u4e00-\u9fff]", 200), (r"^(Two|Three|Nine) ", 40)):
        assert sum(bool(re.search(pattern, text)) for text in texts) > least
    lengths = sorted(len(text.split()) for text in texts)
    assert lengths[len(lengths) // 2] < 20 and lengths[-1] > 40
    kind = {"weight": 1, "forms": ["a(n) {subject} {setting}"], "setting": ["here"]}
    for word, wanted in (("owl", "An owl here"), ("unicorn", "A unicorn here")):
        own = {"shared": {}, "kinds": {"bird": {**kind, "subject": [word]}}}
        assert curate.write_prompt(own, rng) == (wanted, (word, "here"))


def test_near_duplicates_are_those_of_a_comparison_of_all_pairs():
    rng = random.Random(2)
    words = [f"w{k}" for k in range(60)]
    texts, wanted, sets = [], [], []
    for _ in range(300):  # each again with a word or two changed
        first = rng.choices(words, k=rng.randint(3, 40))
        second = [rng.choice(words) if rng.random() < 0.06 else word for word in first]
        texts += [" ".join(first), " ".join(second)]
    for text in texts:
        found = curate.features(text)
        if not any(len(found & s) >= curate.ALIKE * len(found | s) for s in sets):
            wanted.append(text)
            sets.append(found)
    kept, dropped = curate.clean(list(enumerate(texts)))
    assert [text for _, text in kept] == wanted and 100 < len(dropped) < 300


def test_what_is_dropped_and_why():
    texts = ["A  fox in\tsnow ", "A fox in snow", "a fox in snow!", "an\x00owl", "w " * 600, None]
    texts += ["\ud800", "雪地里的一只狐狸", "雪地里的一只狐狸。", "cafe\u0301", "café", "🦊"]
    texts += ["a red cube to the left of a blue ball", "a blue cube to the left of a red ball"]
    kept, dropped = curate.clean(list(enumerate(texts)))
    places = [place for place, _ in kept]
    assert places == [0, 7, 9, 11, 12, 13] and kept[2][1] == "café" and kept[0][1] == texts[1]
    why = {1: "much the same as 0", 2: "much the same as 0", 3: "control characters"}
    why |= {4: "too long", 5: "no prompt", 6: "control characters"}
    why |= {8: "much the same as 7", 10: "much the same as 9"}
    assert {place: reason for place, reason, _ in dropped} == why


def test_files_of_every_kind_become_one(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\ufeffA fox.\n\nAn owl.\nA fox.\n", encoding="utf-8")
    rows = ['{"prompt": "A hen."}', "{", '{"caption": "A cat."}', '{"prompt": "\\ud800"}']
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    (tmp_path / "c.csv").write_text('id,prompt\n1,"A red, red\nrose."\n2,A fox\n3\n')
    (tmp_path / "d.tsv").write_text("text\tid\nA dog.\t1\n")
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.csv", "d.tsv")]
    assert tiny.start(curate.main, *files, "--out", tmp_path / "out.txt") == 0
    wanted = ["A fox.", "An owl.", "A hen.", "A cat.", "A red, red rose.", "A dog."]
    assert data.read_prompts(tmp_path / "out.txt") == wanted
    report = (tmp_path / "out.dropped.tsv").read_text(encoding="utf-8")
    assert f"{files[0]}:4\tmuch the same as {files[0]}:1\tA fox." in report
    assert f"{files[1]}:2\tno prompt" in report and "\\ud800" in report
    assert "2 dropped: no prompt" in capsys.readouterr().out
    code = tiny.start(curate.main, *files, "--out", tmp_path / "out.txt")
    tiny.refused(capsys, code, "does not exist yet")
