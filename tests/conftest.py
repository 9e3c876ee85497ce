"""Lets the tests find ladd.py and their helpers from any folder.

One thread each: the models are tiny, and the files run side by side.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
