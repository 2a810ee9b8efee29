"""Makes `python experiments/NAME.py` work: whoever imports `experiments` there finds this file.

It stands for the package, this folder, and lets the files of the folder above be imported.
"""

import sys
from pathlib import Path

__path__ = [str(Path(__file__).parent)]
sys.path.insert(0, str(Path(__file__).parents[1]))
