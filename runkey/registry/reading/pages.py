"""Addresses of MLflow's pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import urlencode

from runkey.identity.record import LoggedRun
from runkey.registry.rest import RestClient, RestError

# A browser that comes for the first time would show the menu of generative AI.
_KIND = {"workflowType": "machine_learning"}


def list_page(client: RestClient, server: str, experiment: str, view: str) -> str:
    """The page that lists an experiment's runs, in a shared view of its columns.

    Args:
        client: of the server.
        server: its address.
        experiment: name of the experiment; if there is none, the start page is what remains.
        view: name of the view, which is left out where the experiment has none of that name.

    Raises:
        RegistryError: the server does not answer, or refuses.
    """
    try:
        found = client.get("experiments/get-by-name", {"experiment_name": experiment})["experiment"]
    except RestError as error:
        if error.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return server
    tags = {tag["key"] for tag in found.get("tags", ())}
    shared = {"viewStateShareKey": view} if f"mlflow.sharedViewState.{view}" in tags else {}
    return f"{server}/#/experiments/{found['experiment_id']}/runs?{urlencode(shared | _KIND)}"


def run_page(server: str, run: LoggedRun) -> str:
    """The page of one run."""
    return f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}?{urlencode(_KIND)}"


def comparison_page(server: str, runs: Sequence[LoggedRun]) -> str:
    """The page that compares runs."""
    ids = json.dumps([run.run_id for run in runs])
    experiments = json.dumps(sorted({run.experiment_id for run in runs}))
    query = urlencode({"runs": ids, "experiments": experiments} | _KIND)
    return f"{server}/#/compare-runs?{query}"
