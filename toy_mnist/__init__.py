"""Color-MNIST, the small world in which every claim about ladd is measured."""

import sys

from tqdm import tqdm


def progress(items, words, **settings):
    """The items, with a progress bar where there is a terminal to show it."""
    return tqdm(items, words, disable=None if sys.stderr else True, **settings)
