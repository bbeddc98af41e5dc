"""Addresses of MLflow's pages."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Sequence

from runkey.identity.record import LoggedRun


def run_page(server: str, run: LoggedRun) -> str:
    """The page of one run."""
    return f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}"


def comparison_page(server: str, runs: Sequence[LoggedRun]) -> str:
    """The page that compares runs."""
    ids = json.dumps([run.run_id for run in runs])
    experiments = json.dumps(sorted({run.experiment_id for run in runs}))
    query = urllib.parse.urlencode({"runs": ids, "experiments": experiments})
    return f"{server}/#/compare-runs?{query}"
