"""Pictures, tables and reports of a run, drawn from its files."""

import os
from pathlib import Path

# Before matplotlib is imported: a matplotlibrc that cannot be read, and the back end of a notebook
# where that is not installed, end the import. No window is opened here.
os.environ["MPLBACKEND"] = "agg"
os.environ["MATPLOTLIBRC"] = str(Path(__file__).with_name("figures.mplstyle"))
