"""Lets the tests and the processes that they start find ladd.py and the helpers from any folder.

One thread each: the models are tiny, and the files run side by side. GPUs are hidden. To measure on
one: CUDA_VISIBLE_DEVICES=0 python -m pytest -k gpu_measures
"""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
HERE = Path(__file__).resolve().parent
PLACES = [str(HERE.parent), str(HERE)]
sys.path[:0] = PLACES
os.environ["PYTHONPATH"] = os.pathsep.join(PLACES)


def pytest_collection_modifyitems(items):
    """The long files first: then the processes that share them end together."""
    long = "test_readme", "test_zimage", "test_zimage_night", "test_zimage_plan"
    items.sort(key=lambda item: item.path.stem not in long)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a tiny Z-Image pipeline."""
    import tiny_zimage

    return tiny_zimage.save(tmp_path_factory.mktemp("model"))
