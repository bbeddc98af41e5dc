"""The prepare stage: check the data set, split it, index it, draw a contact sheet."""

from __future__ import annotations

import logging
from pathlib import Path

from runkey import paths
from runkey.data.index import read_classes, read_index
from runkey.data.prepare import prepare
from runkey.data.sample import own_data_note
from runkey.params import load_params
from runkey.plots.sheets import contact_sheet
from runkey.progress import want_bars

logger = logging.getLogger(__name__)


def prepare_data(root: Path) -> None:
    """Write prepared/ of a workspace.

    Raises:
        DataError: the data set is not there, or a check stops.
    """
    params = load_params(root / paths.PARAMS)
    want_bars(params.runtime.progress)
    out = root / paths.PREPARED
    prepare(params.data, params.seed, root, out, params.model.num_queries)
    records, classes = read_index(out / "train.json"), read_classes(out / "classes.json")
    contact_sheet(records, classes, root / params.data.path, out / "contact_sheet.jpg")
    logger.info(f"{len(classes)} classes; see prepared/contact_sheet.jpg")
    note = own_data_note(root)
    if note is not None:
        logger.info(note)
