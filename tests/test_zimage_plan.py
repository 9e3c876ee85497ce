"""zimage/plan.py: FLOPs against a count by hand, memory to the byte, activations as torch saves."""

import dataclasses
import math

import pytest
import tiny_zimage
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ladd
from zimage import adapter, fsdp, lora, plan, world

CONFIG = {**tiny_zimage.CONFIG, "n_layers": 2, "n_refiner_layers": 1}
D, FF, IMAGE, TEXT = 48, 128, 64, plan.CAPTION  # widths, and tokens of 128x128 pixels
RECIPE = world.ZImageRecipe(batch=16, taps=("0",), head_width=8)


def options(words):
    parser = ladd.Parser()
    world.add_arguments(parser)
    ladd.add_fields(parser, ladd.Options())
    return parser.parse_args(["--gpus", "2", *words.split()])


def trace(recipe=RECIPE, n=4, student_turn=True, words="--resolution 128"):
    torch.distributed.init_process_group("fake", store=plan.FakeStore(), rank=0, world_size=2)
    found = plan.trace(recipe, options(words), n, student_turn, CONFIG)
    torch.distributed.destroy_process_group()
    return found


def block(tokens, weights=1, scores=1):
    """FLOPs of a block for one sample: so often its weights, and its attention."""
    return weights * 2 * tokens * (4 * D * D + 3 * D * FF) + scores * 4 * tokens**2 * D


def forward(layers=2, text=TEXT):
    embed = 2 * IMAGE * 64 * D + 2 * text * 32 * D + 2 * 256 * 1024 + 2 * 1024 * D
    blocks = block(IMAGE) + block(text) + layers * block(IMAGE + text)
    return embed + blocks + (1 + layers) * 8 * D * D + 2 * D * D + 2 * (IMAGE + text) * D * 64


def test_flops_of_an_iteration_are_those_of_a_count_by_hand():
    first = 2 * 64 * 9 * D * 8, 2 * 96 * 16  # a head's layers whose input takes no gradient,
    of_map = first[0] + 2 * 64 * 9 * 8 * 8 + 2 * 64 * 8  # its convolutions,
    head = of_map + first[1] + 2 * 16 * 16 + 2 * 16 * 32  # and all of it
    found = trace(student_turn=False)
    assert found.forward == forward()
    assert found.flops == forward() + 2 * forward(1) + 2 * (3 * head - sum(first))
    # A student update: the blocks run twice; weights and inputs take gradients; attention 2.5.
    student = sum(block(n, 3, 3.5) for n in (IMAGE, TEXT, *[IMAGE + TEXT] * 2)) + 9 * 8 * D * D
    student += 2 * IMAGE * 64 * D + 4 * TEXT * 32 * D + 2 * 256 * 1024 + 4 * 1024 * D
    student += 4 * D * D + 4 * (IMAGE + TEXT) * D * 64
    # Through the frozen teacher up to its tap: its blocks run twice; inputs alone take gradients.
    teacher = sum(block(n, 2, 3.5) for n in (IMAGE, IMAGE + TEXT))
    teacher += 2 * 8 * D * D + 2 * IMAGE * 64 * D
    once = found.flops + student + teacher + head + of_map
    assert trace(n=8).flops == once
    assert trace(n=4).flops == once + forward() + forward(1)  # of several micro-batches, again


def test_flops_of_the_students_own_steps_and_of_the_anchor_are_means():
    plain = dataclasses.replace(RECIPE, taps=("1",))
    own = {"distill_weight": 1.0, "distill_own": True, "paired_share": 0.5}
    more = dataclasses.replace(plain, backward_simulation=True, anchor_weight=1.0, **own)
    # Of t under 1, .75, .5; of fresh noise at t = 1, four steps. None: one row.
    shares = 0.3, 0.2, 0.1, *[0.35] * 4
    found = [p + (1 - p) ** 4 / 4 for p in shares]
    steps, ends = sum(found[:3]) * forward(), sum(found[3:]) * forward()
    anchor = found[0] * (forward() + forward(text=32))  # guided
    for turn, wanted in ((False, steps), (True, steps + ends + anchor)):
        found = trace(more, student_turn=turn).flops - trace(plain, student_turn=turn).flops
        assert found == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("rank", [0, 4])
def test_memory_of_what_stays_is_right_to_the_byte(rank):
    groups = trace(dataclasses.replace(RECIPE, lora_rank=rank), n=1, words="--resolution 16").groups
    net = fsdp.skeleton(CONFIG)
    shapes = [p.shape for p in net.parameters()]
    own = sum(math.ceil(s[0] / 2) * math.prod(s[1:]) for s in shapes)  # half of each weight
    own, count = (lora.size(net, rank), 2 * 4 * len(lora.LAYERS)) if rank else (own, len(shapes))
    sizes = {"student": own, "gradients": own, "average": own, "optimizer": 2 * own + count}
    assert {name: groups[name] for name in sizes} == {k: 4 * n for k, n in sizes.items()}
    # DTensor's own fakes, of the weights' whole size, are no activations.
    assert groups["activations"] < 4 * sum(map(math.prod, shapes))
    del net.layers[1]  # which lies behind the last tap
    assert groups["teacher"] == 2 * sum(p.numel() for p in net.parameters())
    sizes = [p.numel() for p in ladd.Heads([torch.zeros(2, D, 2, 2)], 32, 8).parameters()]
    # Weights, moments, steps, constants; their gradients are gone by then.
    assert groups["heads"] == 4 * (3 * sum(sizes) + len(sizes) + 2 * D)


def run(net, side=16):
    text = torch.zeros(96, 32, dtype=torch.bfloat16, device=net.device)
    x_t = torch.zeros(2, 16, side, side, device=net.device)
    cond = adapter.Prompts([text] * 2, torch.zeros(2, 1))
    return adapter.ZImageVelocity(net)(x_t, torch.ones(2, device=net.device), cond)


def network(checkpointing, device="cpu", **changes):
    """A network that has run once, which fills its cache of positions."""
    net = torch.nn.Module.to(fsdp.skeleton({**CONFIG, **changes}), torch.bfloat16)
    net.enable_gradient_checkpointing() if checkpointing else None
    run(net.to_empty(device=device))
    return net


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_the_bytes_that_torch_saves(checkpointing):
    net, saved = network(checkpointing), {}
    known = [s._cdata for s in plan.storages([*net.parameters(), *net.rope_embedder.freqs_cis])]
    hooks = lambda t: saved.setdefault(t.untyped_storage()._cdata, t), lambda t: t
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        out = run(net)
    with FakeTensorMode(allow_non_fake_inputs=True), plan.Trace() as found:
        net = network(checkpointing)
        before = {s._cdata for s in found.live}
        out = run(net)
    made = sum(s.nbytes() for s in found.live if s._cdata not in before)
    real = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in known)
    assert made - out.untyped_storage().nbytes() == real


@pytest.mark.parametrize("rank", [0, 4])
def test_the_plan_follows_checkpointing_of_student_and_teacher(rank):
    recipe, found = dataclasses.replace(RECIPE, lora_rank=rank), []
    for which in ("both", "student", "none"):
        found.append(trace(recipe, 8, words=f"--resolution 128 --checkpointing {which}"))
    both, student, none = (f.groups["activations"] for f in found)
    assert both < student < none
    # What each keeps is not computed again: the blocks up to the teacher's tap, or all of them.
    teacher = sum(block(tokens) for tokens in (IMAGE, IMAGE + TEXT)) + 2 * 8 * D * D
    blocks = teacher + block(TEXT) + block(IMAGE + TEXT) + 8 * D * D
    blocks += 2 * 3 * (IMAGE + TEXT) * lora.size(fsdp.skeleton(CONFIG), rank) / 4
    assert [found[0].flops - found[1].flops, found[1].flops - found[2].flops] == [teacher, blocks]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; see tests/conftest.py")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_what_a_gpu_measures(checkpointing):
    wide = {"dim": 1536, "n_heads": 12, "n_kv_heads": 12, "axes_dims": [32, 48, 48]}
    with FakeTensorMode(allow_non_fake_inputs=True), plan.Trace() as found:
        net = network(checkpointing, **wide)
        found.peak = 0
        run(net, 64).sum().backward()
    net = network(checkpointing, "cuda", **wide)
    torch.cuda.reset_peak_memory_stats()
    run(net, 64).sum().backward()
    assert torch.cuda.max_memory_allocated() == pytest.approx(found.peak, rel=0.1)


def test_the_page_adds_up_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "JUDGED", 10**9)  # or they would round to nothing
    monkeypatch.setattr(plan, "WEIGHTS", 0)  # whose disk would be all of it
    words = "--resolution 128 --micro-batch 4 --prompts 1000000000 --price 3 --hours 3"
    words = options(f"{words} --evaluate-every 500 --checkpoint-every 100 --disk 1e-6")
    page = "\n".join(plan.plan(RECIPE, words, CONFIG))
    rows = {line[:34].strip(): line[34:].replace(",", "").split() for line in page.split("\n")}
    prompts, money = float(rows["1,000,000,000 prompts"][1]), float(rows["money at 3 an hour"][0])
    assert prompts == pytest.approx(1e11 * forward() / (0.4 * 312e12) / 3600, abs=0.01)
    judged = float(rows["3 judged points"][1])
    assert judged == pytest.approx(prompts * 3 * 64 * 1e9 / 1e11, rel=5e-3)
    assert money == pytest.approx(3 * float(rows["together"][1]), abs=0.02)
    assert rows["micro-batch 4 fits; largest:"] == ["8"] and not list(tmp_path.iterdir())
    whole = 16 * sum(p.numel() for p in fsdp.skeleton(CONFIG).parameters())  # in both parts
    checkpoints = 2 * 20 * whole / 1e3 / 3600  # GPU-hours for 20, at a KB/s
    assert float(rows["20 checkpoints"][1]) == pytest.approx(checkpoints, rel=0.02)
    for wrong in ("--gpus 3", "--gpus 16", "--prompts 0"):
        with pytest.raises(ladd.UserError, match=rf"{wrong}( an even number|: give at least 1)"):
            next(plan.plan(RECIPE, options(wrong), CONFIG))
