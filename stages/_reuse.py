"""A finished run's outputs in place of a training: from this store, or from the team's server."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from runkey import paths
from runkey.errors import RegistryError, TrackingError
from runkey.identity.pipeline import covers, read_pipeline
from runkey.identity.record import Record, this_host, update_record
from runkey.params import Params
from runkey.progress import tell
from runkey.registry.download import download
from runkey.registry.library import Library
from runkey.registry.rest import RestClient
from runkey.registry.team.package import check, read_run, staging
from runkey.tracking.store import Store
from runkey.tracking.tags import set_tag


def reuse_own(
    library: Library, record: Record, root: Path, store: Store, params: Params, line: str
) -> None:
    """Put the outputs of a run of this store in the workspace, and leave a note on the run.

    Raises:
        RegistryError: a file is missing, is not what was recorded, or is none of the stage's
            outputs; nothing was put anywhere.
    """
    download(library, record, _outputs(record, root, params), root)
    told = f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} on {this_host()}: {line}"
    try:
        set_tag(store, record.run.run_id, "reused", told, RestClient(store.uri).post)
        if not store.is_server:
            tags = dict(sorted((record.run.tags | {"reused": told}).items()))
            update_record(store.home / paths.RECORDS, replace(record.run, tags=tags))
    except (TrackingError, RegistryError, OSError) as error:
        tell(f"warning: the reuse is not noted on its run: {error}")


def reuse_teams(team: Library, record: Record, root: Path, store: Store, params: Params) -> None:
    """Put the outputs of a run of the team's server in the workspace, and copy the run here.

    What comes from another machine is checked as `runkey fetch` checks it, and nothing but outputs
    of the stage is written.

    Raises:
        RegistryError: a file is missing, is not what was recorded, could run code, or is none of
            the stage's outputs; nothing was put anywhere.
        TrackingError: MLflow refuses.
    """
    # Here, for mlflow's import takes longer than all else of a reuse.
    from runkey.tracking.transfer import StoreRuns

    experiment = params.runtime.experiment
    outputs = _outputs(record, root, params)
    with staging(store.home, "reuse") as folder:
        files = read_run(StoreRuns(Store(team.place, None, store.home), experiment), record, folder)
        package = check(folder, record.key, f"{record.label} of {team.place}")
        if package.details.outputs != outputs:
            raise RegistryError(f"{record.label}: its record changed while it was read")
        for path in outputs:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files / path, root / path)
        StoreRuns(store, experiment).write(package.run)


def _outputs(record: Record, root: Path, params: Params) -> list[str]:
    """The files that a run gives back: a server's word does not write anywhere else.

    Raises:
        RegistryError: the record names a file that the stage does not write.
    """
    assert record.details
    stage = read_pipeline(root, params.flat())[record.details.stage]
    for path in record.details.outputs:
        if ".." in path.split("/") or not any(covers(out, path) for out in stage.outs):
            raise RegistryError(f"{record.label}: {path}: no output of the stage {stage.name}")
    return record.details.outputs
