"""Run by a stage inside DVC's temporary folder: snapshot of the current folder."""

import os
import sys
from pathlib import Path

from runkey.identity.key import make_recipe
from runkey.registry.snapshot import take_snapshot

if __name__ == "__main__":
    here = Path.cwd()
    recipe = make_recipe("train", here)
    oid = take_snapshot(here, Path(os.environ["DVC_ROOT"]), recipe)
    sys.stdout.write(f"snapshot {recipe.key} {oid} {here}\n")
