"""Teacher, student and untrained student side by side, from the same noise and prompts, in one labelled picture:

    python -m zimage.sample RUN

The untrained student is the base model run in the student's steps, without guidance: what the student was before its training.
"""

import os
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ladd import UserError
from zimage.data import read_prompts
from zimage.sampling import (DTYPES, PROMPTS, add_sampling_arguments, at_least, check_sampling, command, compared, images, open_run,
                             parser_for, to_bytes)

CELL, GAP = 160, 4      # pixels: the least side of a cell, and between cells


def layout(side):
    """For images of so many pixels: (enlargement, side of a cell, size of the letters, height of the head, width of the prompts)."""
    scale = -(-CELL // side)
    cell = scale * side
    letters = max(13, cell // 24)
    return scale, cell, letters, 3 * letters, max(cell, 16 * letters) * 2 // 3


def draw(path, columns, prompts):
    """A picture: a row per prompt, a column per way. columns: {(title, line beneath): images uint8 [N, H, W, 3]}.

    Small images are enlarged. UserError where it can't be written.
    """
    scale, cell, letters, head, left = layout(next(iter(columns.values())).shape[1])
    picture = Image.new("RGB", (left + len(columns) * (cell + GAP), head + len(prompts) * (cell + GAP)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(letters)
    per_line, lines = int(left / letters * 1.8), int(cell / letters / 1.3)
    for row, prompt in enumerate(prompts):
        text = textwrap.wrap(prompt, per_line, max_lines=lines, placeholder=" ...")
        pen.multiline_text((GAP, head + row * (cell + GAP)), "\n".join(text), "black", font, spacing=letters // 4)
    for k, ((title, beneath), shown) in enumerate(columns.items()):
        x = left + k * (cell + GAP)
        pen.multiline_text((x, GAP), f"{title}\n{beneath}", "black", font, spacing=letters // 4)
        for row, image in enumerate(shown):
            enlarged = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
            picture.paste(enlarged, (x, head + row * (cell + GAP)))
    part = path.with_name(path.name + ".part")
    try:
        picture.save(part, "PNG")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"--out {path}: can't be written ({error.strerror or error}); name another file") from error


def run_command(argv):
    parser = parser_for("sample", __doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompts", default=PROMPTS, metavar="FILE",
                      help="a .txt with one prompt a line, .jsonl or .csv (default: the held-out prompts)")
    what.add_argument("--prompt", metavar="TEXT", help="one prompt, from --count different noises")
    parser.add_argument("--count", default=8, type=int, metavar="N", help="rows of the picture (default %(default)s)")
    parser.add_argument("--seed", default=0, type=int, help="of the noise (default %(default)s)")
    parser.add_argument("--out", metavar="PNG", help="the picture (default: RUN/sample.png)")
    add_sampling_arguments(parser)
    options = parser.parse_args(argv)
    run = open_run(options.run, options.model)
    check_sampling(options, run)
    at_least("--count", options.count, 1)
    at_least("--seed", options.seed, 0)
    out = Path(options.out or run.folder / "sample.png")
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise UserError(f"--out {out}: give a .png file in a folder that exists")
    prompts = [options.prompt] * options.count if options.prompt is not None else read_prompts(options.prompts)[:options.count]

    ways = compared(run, options.steps, options.teacher_steps, options.guidance, options.steps)
    keys = [(options.seed, index) for index in range(len(prompts))]
    made = {way: {} for way in ways}
    for way, group, shown, _ in images(run, [(way, keys) for way in ways], prompts, options.resolution, options.batch, options.device,
                                       DTYPES[options.dtype]):
        made[way].update(zip(group, to_bytes(shown)))
    title = lambda way: (way.name, f"{way.nfe} evaluation{'s' * (way.nfe > 1)}")
    draw(out, {title(way): np.stack([made[way][key] for key in keys]) for way in ways}, prompts)
    print(out)


def main(argv=None):
    """The command line; returns the exit code. Bad input is one line on stderr and 2."""
    return command("sample", run_command, argv)


if __name__ == "__main__":
    sys.exit(main())
