"""A finished run's outputs in place of a training: from this store, or from the team's server."""

from __future__ import annotations

import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

from runkey import paths
from runkey.errors import RegistryError, TrackingError
from runkey.identity.pipeline import covers, read_pipeline
from runkey.identity.record import Record, update_record
from runkey.params import Params
from runkey.registry.download import download
from runkey.registry.library import Library
from runkey.registry.rest import RestClient
from runkey.registry.team.package import check, read_run, staging
from runkey.tracking.store import Store
from runkey.tracking.tags import set_tag


def reuse_own(library: Library, record: Record, root: Path, store: Store, line: str) -> None:
    """Put the outputs of a run of this store in the workspace, and leave a note on the run.

    Raises:
        RegistryError: a file is missing or is not what was recorded; nothing was put anywhere.
    """
    assert record.details
    download(library, record, record.details.outputs, root)
    told = f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} on {socket.gethostname()}: {line}"
    try:
        set_tag(store, record.run.run_id, "reused", told, RestClient(store.uri).post)
        if not store.is_server:
            tags = dict(sorted((record.run.tags | {"reused": told}).items()))
            update_record(store.home / paths.RECORDS, replace(record.run, tags=tags))
    except (TrackingError, RegistryError, OSError) as error:
        print(f"warning: the reuse is not noted on its run: {error}")


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

    assert record.details
    experiment = params.runtime.experiment
    stage = read_pipeline(root, params.flat())[record.details.stage]
    for path in record.details.outputs:
        if not any(covers(out, path) for out in stage.outs):
            raise RegistryError(f"{record.label}: {path}: no output of the stage {stage.name}")
    with staging(store.home, "reuse") as folder:
        files = read_run(StoreRuns(Store(team.place, None, store.home), experiment), record, folder)
        package = check(folder, record.key, f"{record.label} of {team.place}")
        for path in package.details.outputs:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(files / path, root / path)
        StoreRuns(store, experiment).write(package.run)
