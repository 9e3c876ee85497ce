"""Plant known faults in a copy of the project, one at a time, and see that the tests notice each.

    python tests/faults.py [--only 3,17] [--jobs 2]     plants all, or those by their numbers
    python tests/faults.py --list                       the faults with their numbers
    python tests/faults.py --write                      draws docs/faults.md

Each fault is a text that is replaced in a file, and the test that is expected to notice. Where that
test stays green the whole suite is run. The last line is `N of M noticed`.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", "runs", "data", "__pycache__", ".*_cache")
FAILED = 1  # pytest's exit code where a test has failed; others mean that no test could be run

# The ways in which LADD trainers have gone wrong, read off public code and reports.
DEFECTS = {
    1: "time passed as σ where the model wants 1 − σ; the output's sign missing",
    2: '"real" samples replaced by noise where a file is missing',
    3: "weights in bfloat16, whose updates round to nothing",
    4: "two models saved under one name",
    5: "a resume that does not load what was saved",
    6: "gradient accumulation that steps every time, or does not divide",
    7: "the same noise on every rank",
    8: "draws or the reader's place lost by a resume",
    9: "a condition dropped on one side",
    10: '"4 steps" that are 3, at times never trained',
    11: "noise left after the last step",
    12: "the teacher's samples without guidance, or guidance off by one",
    13: "a stop decided on one rank, while the others wait",
    14: "an evaluation that changes the run",
    15: "an evaluation from other noise each time, or the same on all ranks",
    16: "stale heads in the student's pass",
    17: "heads' gradients left from the student's pass",
    18: "warm-ups that count updates of the student; its first update against untrained heads",
    0: "others",
}


class Fault(NamedTuple):
    defect: int  # a key of DEFECTS
    what: str  # what is planted, for docs/faults.md
    file: str
    old: str  # stands exactly once in the file
    new: str
    test: str  # a pytest node, in tests/


FAULTS = [
    # 1: time as σ, sign
    Fault(
        1,
        "x̂0 = x_t + t v",
        "ladd.py",
        "return x_t - expand(t, x_t) * v",
        "return x_t + expand(t, x_t) * v",
        "test_method.py::test_flow_formulas_by_hand",
    ),
    Fault(
        1,
        "Z-Image is told t in place of 1 − t",
        "zimage/adapter.py",
        "1 - t.float(), captions",
        "t.float(), captions",
        "test_zimage.py::test_the_guided_teacher_is_the_stock_pipeline",
    ),
    Fault(
        1,
        "the sign of Z-Image's output missing",
        "zimage/adapter.py",
        "return -torch.stack(out)",
        "return torch.stack(out)",
        "test_zimage.py::test_the_guided_teacher_is_the_stock_pipeline",
    ),
    Fault(
        1,
        "the toy's network is told ln σ / 4 of σ = t",
        "toy_mnist/edm.py",
        "log_sigma = t.log() - torch.log1p(-t)",
        "log_sigma = t.log()",
        "test_toy.py::test_the_untrained_student_is_edms_denoiser_at_every_noise_level",
    ),
    # 2
    Fault(
        2,
        "the real side of a batch becomes noise",
        "ladd.py",
        '"real": real, **draws}',
        '"real": torch.randn_like(real), **draws}',
        "test_method.py::test_samples_conditions_and_noises_stay_paired",
    ),
    Fault(
        2,
        "latents of pure noise are not looked at",
        "zimage/world.py",
        'check(not noise, "--data: its',
        'check(True, "--data: its',
        "test_zimage.py::test_latents_of_pure_noise_and_a_lost_compiler_are_refused",
    ),
    # 3
    Fault(
        3,
        "the student is rounded to bfloat16 after each step",
        "ladd.py",
        "        opt.step()\n        if name ==",
        "        opt.step()\n        for p in model.parameters():\n"
        "            p.data.copy_(p.data.bfloat16())\n        if name ==",
        "test_method.py::test_tiny_steps_are_not_lost_to_rounding",
    ),
    Fault(
        3,
        "a LoRA in the dtype of the weights beside it",
        "zimage/lora.py",
        "p.data = p.data.float()",
        "p.data = p.data",
        "test_zimage.py::test_a_lora_student_starts_as_the_teacher_whose_weights_it_shares",
    ),
    # 4
    Fault(
        4,
        "a checkpoint holds the heads as the student",
        "ladd.py",
        '{"student": student, "heads": heads,',
        '{"student": heads, "heads": heads,',
        "test_run.py::test_killed_in_an_iteration_and_resumed_is_never_killed",
    ),
    Fault(
        4,
        "the best student is written over the last",
        "ladd.py",
        'world.save(student, run, "best")',
        "world.save(student, run)",
        "test_run.py::test_the_averaged_student_is_evaluated_and_the_best_is_kept",
    ),
    Fault(
        4,
        "every student is saved by one name",
        "ladd.py",
        'save_weights(Path(run) / f"{name}.safetensors"',
        'save_weights(Path(run) / "student.safetensors"',
        "test_run.py::test_the_averaged_student_is_evaluated_and_the_best_is_kept",
    ),
    # 5
    Fault(
        5,
        "the heads are not loaded",
        "ladd.py",
        "dcp.load(state_dict, ",
        'dcp.load({k: v for k, v in state_dict.items() if k != "heads"}, ',
        "test_run.py::test_killed_in_an_iteration_and_resumed_is_never_killed",
    ),
    Fault(
        5,
        "the average is left out of a checkpoint's loading",
        "ladd.py",
        '"ema": dict(enumerate(state.ema.mean))',
        '"ema": {k: m.clone() for k, m in enumerate(state.ema.mean)}',
        "test_run.py::test_killed_in_an_iteration_and_resumed_is_never_killed",
    ),
    Fault(
        5,
        "the count of skipped updates and the best score are not loaded",
        "ladd.py",
        'state.skipped, state.best = saved["skipped"], saved["best"]',
        "pass",
        "test_run.py::test_a_resume_knows_the_best_student_and_the_updates_that_were_skipped",
    ),
    # 6
    Fault(
        6,
        "losses are not divided by the micro-batches",
        "ladd.py",
        "        (loss * size / n).backward()",
        "        loss.backward()",
        "test_method.py::test_micro_batches_add_up_before_a_single_step",
    ),
    Fault(
        6,
        "metrics are not divided by the micro-batches",
        "ladd.py",
        "metrics.get(name, 0) + value.detach() * size / n",
        "metrics.get(name, 0) + value.detach()",
        "test_method.py::test_micro_batches_add_up_before_a_single_step",
    ),
    Fault(
        6,
        "a step after each micro-batch",
        "ladd.py",
        "value.detach() * size / n\n",
        "value.detach() * size / n\n"
        "        if size < n:\n"
        "            clip_and_step(state, recipe, i)\n",
        "test_method.py::test_micro_batches_add_up_before_a_single_step",
    ),
    # 7
    Fault(
        7,
        "draws keyed by the place on the rank",
        "ladd.py",
        "index = torch.arange(start, start + count)\n    draws",
        "index = torch.arange(count)\n    draws",
        "test_run.py::test_ranks_share_a_batch_and_take_the_gradients_of_one",
    ),
    Fault(
        7,
        "every rank takes the first part of a batch",
        "ladd.py",
        "starts = range(rank() * n, (rank() + 1) * n, size)",
        "starts = range(0, n, size)",
        "test_run.py::test_ranks_share_a_batch_and_take_the_gradients_of_one",
    ),
    # 8
    Fault(
        8,
        "the reader starts over at a resume",
        "ladd.py",
        "metrics = train_step(state, world, recipe, i,",
        "metrics = train_step(state, world, recipe, i - first,",
        "test_run.py::test_killed_in_an_iteration_and_resumed_is_never_killed",
    ),
    Fault(
        8,
        "draws from the global generator",
        "ladd.py",
        'gens = [generator(recipe.seed, iteration, k, "draw") for k in index.tolist()]',
        "gens = [None] * len(index)",
        "test_method.py::test_a_run_starts_from_the_teacher_and_repeats_bit_for_bit",
    ),
    Fault(
        8,
        "the reader forgets where in an epoch it stands",
        "ladd.py",
        "order[position[epoch == e] % n]",
        "order[: int((epoch == e).sum())]",
        "test_method.py::test_reader_gives_each_sample_once_an_epoch_from_any_position",
    ),
    # 9
    Fault(
        9,
        "no condition for the student",
        "ladd.py",
        "student(b.x_t, b.t, b.cond)",
        "student(b.x_t, b.t, 0 * b.cond)",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        9,
        "a neighbour's condition for the fakes",
        "ladd.py",
        "told_real, told_fake = (b.t_real, cond, b.t), (b.t_hat, cond, b.t)",
        "told_real, told_fake = (b.t_real, cond, b.t), (b.t_hat, cond.roll(1, 0), b.t)",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        9,
        "the first conditions in place of the rows' own on the student's way down",
        "ladd.py",
        "torch.full_like(b.t[rows], t), b.cond[rows])",
        "torch.full_like(b.t[rows], t), b.cond[: len(rows)])",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        9,
        "labels of the toy shuffled against its samples",
        "toy_mnist/world.py",
        "return x0[index], label[index], noise[index], real",
        "return x0[index], label[index.flip(0)], noise[index], real",
        "test_toy.py::test_a_batch_holds_samples_with_the_noise_that_leads_to_them",
    ),
    # 10
    Fault(
        10,
        "a sampler stops one evaluation short",
        "ladd.py",
        "enumerate(zip(times, [*times[1:], 0.0], strict=True), 1)",
        "enumerate(zip(times[:-1] or times, times[1:] or [0.0], strict=True), 1)",
        "test_method.py::test_samplers_land_on_x0_with_a_perfect_velocity",
    ),
    Fault(
        10,
        "few steps take the first of the student's times",
        "ladd.py",
        "times[k * len(times) // n]",
        "times[k]",
        "test_method.py::test_student_sampler_takes_its_steps_and_keys_each_samples_noise",
    ),
    # 11
    Fault(
        11,
        "Euler ends short of t = 0",
        "ladd.py",
        "[*times[1:], 0.0]",
        "[*times[1:], 0.002]",
        "test_method.py::test_samplers_land_on_x0_with_a_perfect_velocity",
    ),
    Fault(
        11,
        "re-noised after the last step",
        "ladd.py",
        "        if renoise and t_next > 0:\n",
        "        if renoise:\n            t_next = max(t_next, 0.002)\n",
        "test_method.py::test_samplers_land_on_x0_with_a_perfect_velocity",
    ),
    # 12
    Fault(
        12,
        "guidance pos + w (pos − neg)",
        "ladd.py",
        "neg + w * (pos - neg), pos)",
        "pos + w * (pos - neg), pos)",
        "test_method.py::test_guidance_by_hand",
    ),
    Fault(
        12,
        "the toy's samples without guidance",
        "toy_mnist/world.py",
        "return ladd.guided(velocity, null_cond, r.guidance,",
        "return ladd.guided(velocity, null_cond, 1,",
        "test_toy.py::test_the_teachers_samples_are_guided_as_the_recipe_says",
    ),
    Fault(
        12,
        "Z-Image's guidance off by one convention",
        "zimage/adapter.py",
        '"guidance_scale": guidance - 1',
        '"guidance_scale": guidance',
        "test_zimage_data.py::test_samples_without_guidance_by_another_seed",
    ),
    # 13
    Fault(
        13,
        "each rank stops on its own signs of collapse",
        "ladd.py",
        "return any_rank(signs)",
        "return bool(signs)",
        "test_run.py::test_trouble_on_one_rank_is_trouble_on_both",
    ),
    Fault(
        13,
        "votes are not counted over the ranks",
        "ladd.py",
        "    mean_over_ranks_([votes])\n",
        "",
        "test_run.py::test_trouble_on_one_rank_is_trouble_on_both",
    ),
    # 14
    Fault(
        14,
        "an evaluation leaves the averaged weights in place",
        "ladd.py",
        "        finally:\n            self.ema.swap(self.student.train())\n",
        "        finally:\n            pass\n",
        "test_run.py::test_evaluation_checkpoints_and_log_do_not_change_the_run",
    ),
    Fault(
        14,
        "an evaluation updates the average",
        "ladd.py",
        'signs = metrics.pop("collapse", [])',
        'signs = metrics.pop("collapse", [])\n        state.ema.update(student, step, 1)',
        "test_run.py::test_evaluation_checkpoints_and_log_do_not_change_the_run",
    ),
    # 15
    Fault(
        15,
        "noise of the toy's evaluation from the global generator",
        "toy_mnist/world.py",
        "return torch.randn(n, *SHAPE, generator=gen), shares",
        "return torch.randn(n, *SHAPE), shares",
        "test_toy.py::test_an_evaluation_repeats_whatever_was_drawn_before",
    ),
    Fault(
        15,
        "the grid's noise from the global generator",
        "toy_mnist/world.py",
        "noise = torch.randn(10 * rows, *SHAPE, generator=ladd.generator(self.recipe.seed, key))",
        "noise = torch.randn(10 * rows, *SHAPE)",
        "test_toy.py::test_an_evaluation_repeats_whatever_was_drawn_before",
    ),
    Fault(
        15,
        "one noise for all images",
        "ladd.py",
        "generator(*key, int(k), device=device) for k",
        "generator(*key, device=device) for k",
        "test_method.py::test_keyed_noise_is_each_samples_own",
    ),
    # 16
    Fault(
        16,
        "the heads step with the student, and are cleared before",
        "ladd.py",
        '    norms = {"heads_grad_norm": clip_and_step(state, recipe, i, "heads")}\n',
        "    norms = {}\n",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        16,
        "the student meets the heads of the first iteration",
        "ladd.py",
        "            backward(*loss_of_student(state, world, recipe, b, fake, x0_hat))\n",
        '            old = state.__dict__.setdefault("old", copy.deepcopy(state.heads))\n'
        "            newer, state.heads = state.heads, old.requires_grad_(False)\n"
        "            backward(*loss_of_student(state, world, recipe, b, fake, x0_hat))\n"
        "            state.heads = newer\n",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    # 17
    Fault(
        17,
        "the heads are not frozen in the student's pass",
        "ladd.py",
        "state.heads.requires_grad_(False)",
        "state.heads.requires_grad_(True)",
        "test_method.py::test_the_students_turn_leaves_the_heads_alone",
    ),
    Fault(
        17,
        "gradients are not cleared",
        "ladd.py",
        "    opt.zero_grad(set_to_none=True)\n    return norm",
        "    return norm",
        "test_method.py::test_the_students_turn_leaves_the_heads_alone",
    ),
    # 18
    Fault(
        18,
        "the learning rate's warm-up counts updates",
        "ladd.py",
        "scale = min(1.0, (i + 1) / max(recipe.lr_warmup, 1))",
        "scale = min(1.0, (i // recipe.gen_every + 1) / max(recipe.lr_warmup, 1))",
        "test_method.py::test_learning_rates_count_iterations",
    ),
    Fault(
        18,
        "the warm-up of the times counts updates",
        "ladd.py",
        "if iteration < recipe.warmup",
        "if iteration // recipe.gen_every < recipe.warmup",
        "test_method.py::test_times_follow_their_probabilities_and_the_warmup_counts_iterations",
    ),
    Fault(
        18,
        "the student is updated at iteration 0",
        "ladd.py",
        "return i > 0 and (i + 1)",
        "return (i + 1)",
        "test_method.py::test_schedule_of_the_students_updates",
    ),
    # others
    Fault(
        0,
        "the student's gradient is not clipped, the heads' twice",
        "ladd.py",
        "norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)",
        "norm = nn.utils.clip_grad_norm_(state.heads.parameters(), recipe.clip)",
        "test_method.py::test_each_network_is_clipped_by_its_own_norm",
    ),
    Fault(
        0,
        "an average that is never updated",
        "ladd.py",
        "            mean.lerp_(p, 1 - keep)",
        "            mean.lerp_(p, 0.0)",
        "test_method.py::test_a_step_updates_the_average_after_the_weights",
    ),
    Fault(
        0,
        "an average without its ramp",
        "ladd.py",
        "min(self.half_life, self.ramp * seen)",
        "self.half_life",
        "test_method.py::test_a_step_updates_the_average_after_the_weights",
    ),
    Fault(
        0,
        "a step with a gradient that is not finite",
        "ladd.py",
        "    if math.isfinite(norm):\n        opt.step()",
        "    if True:\n        opt.step()",
        "test_method.py::test_a_gradient_that_is_not_finite_skips_its_step_and_three_end_the_run",
    ),
    Fault(
        0,
        "an update of the heads alone clears the count of skipped ones",
        "ladd.py",
        'if not finite or "student_grad_norm" in norms:',
        "if True:",
        "test_method.py::test_a_gradient_that_is_not_finite_skips_its_step_and_three_end_the_run",
    ),
    Fault(
        0,
        "three skipped updates need not be in a row",
        "ladd.py",
        "state.skipped = 0 if finite else state.skipped + 1",
        "state.skipped += not finite",
        "test_method.py::test_a_gradient_that_is_not_finite_skips_its_step_and_three_end_the_run",
    ),
    Fault(
        0,
        "no gradient from the features to the guess",
        "ladd.py",
        "return x0_hat, world.features(interpolate(x0_hat, b.eps_hat",
        "return x0_hat, world.features(interpolate(x0_hat.detach(), b.eps_hat",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        0,
        "the heads' loss reaches the student",
        "ladd.py",
        "[f.detach() for f in fake])",
        "fake)",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        0,
        "a cut-off checkpoint is taken for whole",
        "ladd.py",
        'glob("checkpoints/step-*/.metadata")',
        'glob("checkpoints/step-*/*")',
        "test_run.py::test_a_cut_off_checkpoint_is_passed_over_aloud",
    ),
    Fault(
        0,
        "the newest checkpoints go, the oldest stay",
        "ladd.py",
        "list(checkpoints(run).values())[:-keep]",
        "list(checkpoints(run).values())[keep:]",
        "test_run.py::test_checkpoints_are_kept_as_asked",
    ),
    Fault(
        0,
        "files are written in place",
        "ladd.py",
        'part = path.with_name(f".{path.name}.{os.getpid()}.part")',
        "part = path",
        "test_run.py::test_killed_at_any_change_of_a_file_and_resumed_is_never_killed",
    ),
    Fault(
        0,
        "a failed write leaves half a file",
        "ladd.py",
        "finally:\n        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)",
        "finally:\n        pass",
        "test_run.py::test_a_failed_write_leaves_the_old_file_and_nothing_beside_it",
    ),
    Fault(
        0,
        "a run is not locked",
        "ladd.py",
        '        stack.enter_context(FileLock(run / ".lock", blocking=False))',
        "        pass",
        "test_run.py::test_a_live_run_is_not_resumed_beside_itself",
    ),
    Fault(
        0,
        "a resume under another recipe goes on",
        "ladd.py",
        'check(not words, f"--resume:',
        'check(True, f"--resume:',
        "test_run.py::test_a_run_that_exists_is_refused_or_resumed_under_the_same_recipe_and_data",
    ),
    Fault(
        0,
        "the log keeps the lines from after the checkpoint",
        "ladd.py",
        ' and json.loads(x)["iteration"] <= done',
        "",
        "test_run.py::test_killed_in_an_iteration_and_resumed_is_never_killed",
    ),
    Fault(
        0,
        "the benchmark judges the teacher, not the student",
        "toy_mnist/benchmark.py",
        "line = judged(toy, student,",
        "line = judged(toy, toy.teacher,",
        "test_benchmark.py::test_finished_runs_are_lines_and_are_not_run_again",
    ),
    Fault(
        0,
        "the curve is judged by the report's real images",
        "toy_mnist/world.py",
        "self.judge(x, label, curve=True)",
        "self.judge(x, label, curve=False)",
        "test_toy.py::test_signs_of_collapse",
    ),
    Fault(
        0,
        "an old folder is removed before the new one takes its place",
        "ladd.py",
        "os.replace(path, old) if path.is_dir()",
        "shutil.rmtree(path) if path.is_dir()",
        "test_run.py::test_a_folder_has_the_modes_of_the_umask_and_is_replaced_whole",
    ),
    Fault(
        0,
        "a full disk ends in a traceback",
        "ladd.py",
        "no_room = SafetensorError, dcp",
        "no_room = dcp",
        "test_run.py::test_a_full_disk_is_one_line_and_the_run_can_go_on",
    ),
    Fault(
        0,
        "SIGTERM ends a job without a word",
        "ladd.py",
        "for number in (signal.SIGINT, signal.SIGTERM):",
        "for number in (signal.SIGINT,):",
        "test_run.py::test_a_stopped_job_ends_with_one_line_and_130",
    ),
    Fault(
        0,
        "checkpoints change the run: no optimizer state from the start",
        "ladd.py",
        "        opt.state[p] = {k: torch.zeros_like(p) for",
        "        continue\n        opt.state[p] = {k: torch.zeros_like(p) for",
        "test_run.py::test_evaluation_checkpoints_and_log_do_not_change_the_run",
    ),
    Fault(
        0,
        "exact R1 averaged over the channels",
        "toy_mnist/settings.py",
        "g.square().sum(1), grads",
        "g.square().mean(1), grads",
        "test_benchmark.py::test_exact_r1_of_heads_with_a_known_slope",
    ),
    Fault(
        0,
        "hinge without its margin",
        "ladd.py",
        "F.relu(1 - real) + F.relu(1 + fake)",
        "F.relu(-real) + F.relu(fake)",
        "test_method.py::test_metrics_of_the_heads_by_hand",
    ),
    Fault(
        0,
        "the relativistic loss of the student turned round",
        "toy_mnist/settings.py",
        "lambda real, fake: F.softplus(real - fake)",
        "lambda real, fake: F.softplus(real + fake)",
        "test_benchmark.py::test_games_and_the_warm_up_of_their_weight_by_hand",
    ),
    Fault(
        0,
        "stored noise for the wrong share",
        "ladd.py",
        'torch.where(expand(draws["paired"], noise), noise, draws["eps"])',
        'torch.where(expand(draws["paired"], noise), draws["eps"], noise)',
        "test_method.py::test_paired_samples_get_their_stored_noise_and_lie_evenly",
    ),
    Fault(
        0,
        "a target for noise that says nothing of x0",
        "ladd.py",
        "return (error * known).mean()",
        "return error.mean()",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        0,
        "the distillation error times t to its power",
        "ladd.py",
        "/ b.t**recipe.distill_power",
        "* b.t**recipe.distill_power",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        0,
        "taps that stay",
        "ladd.py",
        "stack.enter_context(modules[name].register_forward_hook(hook))",
        "modules[name].register_forward_hook(hook)",
        "test_method.py::test_taps_are_removed_whatever_happens",
    ),
    Fault(
        0,
        "the last output of a tap counts",
        "ladd.py",
        "outputs.setdefault(module, output)",
        "outputs[module] = output",
        "test_method.py::test_the_first_output_of_a_tap_counts",
    ),
    Fault(
        0,
        "a norm that blinds the heads on small maps",
        "ladd.py",
        "h = self.conv1((f - self.mean) / self.std)",
        "h = self.conv1(F.instance_norm(f))",
        "test_method.py::test_heads_see_small_maps",
    ),
    Fault(
        0,
        "the highest score is the best",
        "ladd.py",
        'any_rank(score < state.best - metrics.get("score_error", 0.0))',
        "any_rank(score > state.best or state.best == math.inf)",
        "test_run.py::test_the_averaged_student_is_evaluated_and_the_best_is_kept",
    ),
    Fault(
        0,
        "gradients add up over the ranks",
        "ladd.py",
        "        t.div_(world_size())\n",
        "",
        "test_run.py::test_ranks_share_a_batch_and_take_the_gradients_of_one",
    ),
    Fault(
        0,
        "a step of backward simulation too few",
        "ladd.py",
        "mask = b.t < t\n",
        "mask = b.t + 0.3 < t\n",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        0,
        "a rank with nothing to do makes no call",
        "ladd.py",
        "mask.new_zeros(1, dtype=torch.long)",
        "mask.new_zeros(0, dtype=torch.long)",
        "test_method.py::test_network_calls_per_iteration",
    ),
    Fault(
        0,
        "the spread of t̂ is its square",
        "ladd.py",
        "recipe.renoise_mean + recipe.renoise_std * z",
        "recipe.renoise_mean + recipe.renoise_std**2 * z",
        "test_method.py::test_t_hat_is_log_normal_in_sigma",
    ),
    Fault(
        0,
        "a map of Z-Image that is not square comes out transposed",
        "zimage/adapter.py",
        '"b (h w) c -> b c h w", h=h)',
        '"b (w h) c -> b c h w", h=h)',
        "test_zimage.py::test_features_hold_image_tokens_alone_in_a_mixed_batch",
    ),
    Fault(
        0,
        "t in bfloat16",
        "zimage/adapter.py",
        "1 - t.float(), captions",
        "1 - t.to(self.dtype), captions",
        "test_zimage.py::test_time_stays_float32_where_bfloat16_computes",
    ),
    Fault(
        0,
        "an export keeps the base model's shift",
        "zimage/export.py",
        "FlowMatchEulerDiscreteScheduler(shift=1.0,",
        "FlowMatchEulerDiscreteScheduler(shift=3.0,",
        "test_zimage.py::test_stock_pipeline_samples_the_export_as_ladd_samples_the_student",
    ),
    Fault(
        0,
        "a run that is being made longer is taken for ended",
        "zimage/sample.py",
        " and done == recipe.iterations",
        "",
        "test_zimage.py::test_a_run_that_cannot_be_exported_is_refused",
    ),
    Fault(
        0,
        "images are drawn at one size whatever the data's",
        "zimage/sample.py",
        'run.made_of["latents.resolution"][0]',
        '"48"',
        "test_zimage_night.py::test_a_night_goes_on_where_it_was_stopped",
    ),
    Fault(
        0,
        "a Z-Image student is judged against its own noise's images",
        "zimage/evaluate.py",
        "others = [*wanted[teacher][1:], wanted[teacher][0]]",
        "others = wanted[teacher]",
        "test_zimage_data.py::test_figures_equal_independent_ones",
    ),
    Fault(
        0,
        "a kill in the teacher's shards goes unnoticed",
        "zimage/data.py",
        'return about == {"kind": SHARD_KIND, "made_of": made_of, **shard}',
        "return True",
        "test_zimage_data.py::test_a_restart_makes_what_is_missing_or_cut_off_alike_and_nothing_else",
    ),
    Fault(
        0,
        "the heads' constants left as each rank measured them",
        "ladd.py",
        "for v in self.heads.state_dict().values() if",
        "for v in self.heads.parameters() if",
        "test_run.py::test_every_rank_starts_with_the_heads_of_the_first",
    ),
    Fault(
        0,
        "TF32 under --dtype float32",
        "ladd.py",
        'allow_tf32 = options.dtype == "bfloat16"',
        "allow_tf32 = True",
        "test_run.py::test_float32_that_is_asked_for_is_exact_on_a_gpu[float32]",
    ),
    Fault(
        0,
        "--checkpointing student keeps the student's activations",
        "zimage/world.py",
        'if self.options.checkpointing in (role, "both")',
        'if self.options.checkpointing == "both"',
        "test_zimage_plan.py::test_the_plan_follows_checkpointing_of_student_and_teacher[0]",
    ),
    Fault(
        0,
        "the most memory of a GPU since the start, not since the last line",
        "ladd.py",
        "torch.cuda.reset_peak_memory_stats(device)",
        "pass",
        "test_run.py::test_the_log_has_the_most_memory_of_a_gpu_since_the_last_line",
    ),
    Fault(
        0,
        "a student that is better by chance replaces the best",
        "ladd.py",
        'state.best - metrics.get("score_error", 0.0)',
        "state.best",
        "test_run.py::test_the_averaged_student_is_evaluated_and_the_best_is_kept",
    ),
    Fault(
        0,
        "the samples to judge by are trained on",
        "zimage/data.py",
        "by_length = sorted(self.trained,",
        "by_length = sorted(range(len(self)),",
        "test_zimage_data.py::test_every_epoch_shows_every_sample_in_batches_of_one_size",
    ),
    Fault(
        0,
        "KID of each rank's first batch alone",
        "zimage/world.py",
        "batches[k % len(batches)]",
        "batches[ladd.rank() % len(batches)]",
        "test_zimage.py::test_feature_kid_equals_an_independent_one_on_any_ranks",
    ),
    Fault(
        0,
        "the teacher lies in memory twice while it is loaded",
        "zimage/fsdp.py",
        "weights.pop(name)",
        "weights[name]",
        "test_zimage.py::test_features_bear_sharding_checkpointing_and_a_cut",
    ),
    Fault(
        0,
        "the teacher of all ranks but the first stays empty",
        "zimage/fsdp.py",
        "dist.broadcast(w, 0)",
        "pass",
        "test_zimage.py::test_gradients_of_several_ranks_are_those_of_one",
    ),
    Fault(
        0,
        "KID of the toy in half precision",
        "toy_mnist/judge.py",
        "(tensors[k].float() for",
        "(tensors[k] for",
        "test_toy.py::test_shipped_judge_sees_bars_wrong_labels_and_one_colour",
    ),
    Fault(
        0,
        "a rehearsal takes any image for the stock pipeline's",
        "zimage/rehearse.py",
        "check(apart < (1 if",
        "check(apart < (256 if",
        "test_zimage_night.py::test_images_unlike_the_stock_pipelines_are_noticed",
    ),
    Fault(
        0,
        "a rehearsal kills torchrun and leaves its ranks alive",
        "zimage/rehearse.py",
        "*process.children(recursive=True)",
        "",
        "test_zimage_night.py::test_a_rehearsal_goes_the_whole_path[2-zimage-clip]",
    ),
    Fault(
        0,
        "a sweep keeps a setting that is better by less than the spread",
        "zimage/sweep.py",
        '"kept" if mean + spread < mark',
        '"kept" if mean < mark',
        "test_zimage_night.py::test_a_setting_is_kept_if_it_is_better_by_more_than_the_spread",
    ),
    # the terms of the game
    Fault(
        0,
        "the penalty on real features alone",
        "ladd.py",
        'penalty"] = r1 + r2',
        'penalty"] = r1 + 0 * r2',
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        0,
        "the penalty's noise not scaled by the features",
        "ladd.py",
        "recipe.penalty_std * head.std * noise",
        "recipe.penalty_std * noise",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        9,
        "misaligned pairs, for which the teacher sees the right condition",
        "ladd.py",
        "b.t_real), b.t_real, wrong)",
        "b.t_real), b.t_real, b.cond)",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        9,
        "misaligned pairs of equal conditions count too",
        "ladd.py",
        "F.softplus(w - r) * expand(differs, w)",
        "F.softplus(w - r)",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        0,
        "the anchor weighs by t",
        "ladd.py",
        "return ((1 - b.t) * (v - v_teacher)",
        "return (b.t * (v - v_teacher)",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
    Fault(
        0,
        "the toy's anchor is not guided as its samples are",
        "toy_mnist/world.py",
        "return self.guide(self.teacher)(x_t, t, label)",
        "return self.teacher(x_t, t, label)",
        "test_toy.py::test_the_teachers_samples_are_guided_as_the_recipe_says",
    ),
    Fault(
        0,
        "the heads' constants are not measured",
        "ladd.py",
        '"mean", f.mean((0, 2, 3), keepdim=True)[0]',
        '"mean", 0 * f.mean((0, 2, 3), keepdim=True)[0]',
        "test_method.py::test_a_state_standardises_its_heads",
    ),
    Fault(
        0,
        "the student's own end is one step short",
        "ladd.py",
        "b.x_t[rows], recipe.times, b.cond[rows])",
        "b.x_t[rows], recipe.times[:-1], b.cond[rows])",
        "test_method.py::test_the_iteration_against_an_independent_one",
    ),
]


def plant(fault, folder):
    """A copy of the project in `folder`, with the fault."""
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT, dirs_exist_ok=True)
    path = folder / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.what}: its old text stands {text.count(fault.old)} times")
    path.write_text(text.replace(fault.old, fault.new))


def pytest(folder, *options, limit):
    """The exit code of pytest in a copy of the project; a test that hangs has failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True, **quiet
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return FAILED
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def look(k):
    """Plant fault k and run the tests: (was it noticed?, what became of it in words)."""
    fault = FAULTS[k]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        plant(fault, folder)
        code = pytest(folder, "-n0", f"tests/{fault.test}", limit=300)
        if code == FAILED:
            return True, "noticed"
        if code:
            return False, f"BROKEN: pytest ended with {code}; is there such a test?"
        # test_readme.py looks for the old text, so that it would notice every fault.
        code = pytest(folder, "--ignore=tests/test_readme.py", limit=1200)
        if code == FAILED:
            return True, f"noticed, but not by {fault.test}"
        return False, f"NOT NOTICED (pytest ended with {code})"


def page():
    """docs/faults.md."""
    lines = [
        "# Ways in which LADD trainers have gone wrong, and the test that notices each",
        "",
        "Drawn by `python tests/faults.py --write`. `python tests/faults.py` plants each fault in",
        "a copy of the project and sees that the test named here fails.",
    ]
    for defect, title in DEFECTS.items():
        lines += ["", f"## {defect}. {title}" if defect else "## Others", ""]
        lines += ["| planted | in | noticed by |", "|---|---|---|"]
        for fault in FAULTS:
            if fault.defect == defect:
                test = fault.test.replace("::", " ").replace(".py", "")
                lines.append(f"| {fault.what} | {fault.file} | `{test}` |")
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="numbers of faults, with commas between them")
    parser.add_argument("--jobs", type=int, default=2, help="copies at once (default 2)")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--write", action="store_true", help="draw docs/faults.md and end")
    options = parser.parse_args(argv)
    if options.write:
        (ROOT / "docs" / "faults.md").write_text(page())
        return 0
    numbers = range(len(FAULTS))
    if options.only:
        numbers = [int(word) for word in options.only.split(",")]
    if options.list:
        for k in numbers:
            print(k, FAULTS[k].what)
        return 0
    # A test that fails without a fault would notice anything.
    tests = {f"tests/{FAULTS[k].test}" for k in numbers}
    if pytest(ROOT, "-n", str(options.jobs), "--dist=loadfile", *sorted(tests), limit=1200):
        print("a test fails without any fault, or is not there; mend that first")
        return 1
    noticed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for k, (good, words) in zip(numbers, pool.map(look, numbers), strict=True):
            noticed += good
            print(f"{k}: {FAULTS[k].what}: {words}", flush=True)
    print(f"{noticed} of {len(numbers)} noticed")
    return 0 if noticed == len(numbers) else 1


if __name__ == "__main__":
    sys.exit(main())
