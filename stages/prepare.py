"""`python -m stages.prepare`: check the data set, index it, draw a sheet of it."""

from __future__ import annotations

from runkey import paths
from runkey.data.index import read_classes, read_index
from runkey.data.prepare import prepare
from runkey.data.sample import own_data_note
from runkey.errors import report_errors
from runkey.params import load_params
from runkey.plots.sheets import contact_sheet
from runkey.progress import log_to_terminal, tell, want_bars


def main() -> None:
    """Write prepared/."""
    log_to_terminal()
    root = paths.workspace()
    params = load_params(root / paths.PARAMS)
    want_bars(params.runtime.progress)
    out = root / paths.PREPARED
    prepare(params.data, params.seed, root, out, params.model.num_queries)
    records, classes = read_index(out / "train.json"), read_classes(out / "classes.json")
    contact_sheet(records, classes, root / params.data.path, out / "contact_sheet.jpg")
    tell(f"{len(classes)} classes; see prepared/contact_sheet.jpg")
    note = own_data_note(root)
    if note is not None:
        tell(note)


if __name__ == "__main__":
    with report_errors():
        main()
