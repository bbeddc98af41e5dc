"""The prepare stage: check the data set, split it, index it, draw a contact sheet."""

from __future__ import annotations

import logging
from pathlib import Path

from runkey import paths
from runkey.data.index import index_file, read_classes, read_index
from runkey.data.prepare import prepare
from runkey.errors import DataError
from runkey.identity.dvc_yaml import read_yaml_text
from runkey.identity.inputs import Inputs
from runkey.identity.key import make_recipe
from runkey.params import load_params
from runkey.plots.sheets import contact_sheet
from runkey.progress import want_bars
from runkey.units import counted

logger = logging.getLogger(__name__)


def prepare_data(root: Path) -> None:
    """Write prepared/ of a workspace.

    Raises:
        DataError: the data are not there, or a check stops.
        RecipeError: they are not what their .dvc file says.
    """
    params = load_params(root / paths.PARAMS)
    want_bars(params.runtime.progress)
    out, home = root / paths.PREPARED, paths.home_of(paths.store_root())
    inputs = Inputs(root, params, make_recipe("prepare", root, params), home)
    inputs.begin_prepare()
    prepare(params.data, root, out, params.model.num_queries)
    records, classes = read_index(index_file(out, "train")), read_classes(out / "classes.json")
    contact_sheet(records, classes, root / params.data.path, out / "contact_sheet.jpg")
    inputs.end_prepare()
    logger.info(f"{counted(len(classes), 'class')}; see prepared/contact_sheet.jpg")
    note = own_data_note(root)
    if note is not None:
        logger.info(note)


def own_data_note(root: Path) -> str | None:
    """Return a note for users whose own data `dvc push` would skip; None if there are none.

    `dvc add data` keeps the lines `remote: seed` and `push: false` of the sample's data.dvc, so
    own images are not pushed into the repository by accident, and not to another remote either.
    Raises DataError if data.dvc cannot be read.
    """
    path = root / "data.dvc"
    if not path.is_file():
        return None
    try:
        out = read_yaml_text(path)["outs"][0]
        md5 = str(out["md5"])
    except (ValueError, LookupError, TypeError):
        raise DataError("data.dvc: unreadable; `dvc add data` writes it anew") from None
    shipped = root / "sample-data" / "files" / "md5" / md5[:2] / md5[2:]
    if out.get("remote") != "seed" or shipped.is_file():
        return None
    return (
        "note: data.dvc holds your own images and still says `remote: seed` and `push: false`; "
        "take both lines out, and `dvc push` sends the images to your remote"
    )
