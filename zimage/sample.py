"""Teacher, student and untrained student side by side, from the same noise, in one picture:

    python -m zimage.sample RUN

The untrained student is the base model run in the student's steps, without guidance: what the
student was before its training.
"""

import sys
from pathlib import Path

import torch

import ladd
from ladd import check
from zimage import sampling
from zimage.data import read_prompts
from zimage.world import draw_grid


def main(argv=None):
    parser = sampling.parser_for("sample", __doc__)
    what = parser.add_mutually_exclusive_group()
    text = "a .txt with one prompt a line, .jsonl or .csv (default: the held-out prompts)"
    what.add_argument("--prompts", default=sampling.PROMPTS, metavar="FILE", help=text)
    what.add_argument("--prompt", metavar="TEXT", help="one prompt, from --count different noises")
    text = "rows of the picture (default: %(default)s)"
    parser.add_argument("--count", type=sampling.positive, default=8, metavar="N", help=text)
    parser.add_argument("--seed", default=0, type=int, help="of the noise (default: %(default)s)")
    parser.add_argument("--out", metavar="PNG", help="the picture (default: RUN/sample.png)")
    sampling.add_sampling_arguments(parser)
    options = parser.parse_args(argv)
    run = sampling.open_run(options.run, options.model)
    sampling.fill_in(options, run)
    out = Path(options.out or run.folder / "sample.png").expanduser()
    ok = out.suffix.lower() == ".png" and out.parent.is_dir()
    check(ok, f"--out {out}: give a .png file in a folder that exists")
    prompts = [options.prompt] * options.count
    if options.prompt is None:
        prompts = read_prompts(options.prompts)[: options.count]

    steps = options.steps
    ways = sampling.compared(steps, options.teacher_steps, options.guidance, steps)
    keys = [(options.seed, index) for index in range(len(prompts))]
    made = {way: {} for way in ways}
    jobs = [(way, keys) for way in ways]
    for way, group, shown in sampling.images(run, jobs, prompts, options):
        made[way].update(zip(group, shown, strict=True))
    columns = {}
    for way, shown in made.items():
        title = f"{way.name}\n{way.nfe} evaluation{'s' * (way.nfe > 1)}"
        columns[title] = torch.stack([shown[key] for key in keys])
    draw_grid(out, columns, prompts)
    print(out)


if __name__ == "__main__":
    sys.exit(ladd.run_command_line(main))
