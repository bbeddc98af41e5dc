"""Which columns MLflow's list of runs shows at once.

A browser remembers the columns that its user chose, and a new one shows almost none.  MLflow also
keeps *shared views*: tags of the experiment, which its pages offer in a menu and an address can
name.  Ours is written where an experiment is first used; one that people changed is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

VIEW = "runkey"
"""Its name in addresses and in the menu."""
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
# To be counted up with every change of the columns (milliseconds, as MLflow has it).
_VERSION_MS = 1_795_600_000_001

_COLUMNS = {
    "duration": 80,
    "metrics.`eval/AP`": 85,
    "metrics.`eval/AP50`": 85,
    "metrics.`eval/AP75`": 85,
    "metrics.`eval/loss`": 85,
    "params.`lr`": 80,
    "params.`training.epochs`": 125,
    "params.`training.batch_size`": 150,
    "params.`seed`": 60,
    "params.`key.code`": 90,
    "params.`key.params`": 100,
    "params.`key.data`": 90,
    "params.`key.environment`": 140,
    "tags.`key`": 90,
    "tags.`device`": 100,
    "attributes.`Models`": 150,
    "attributes.`Dataset`": 200,
}
"""Width in pixels by column, from the left, after name and time; MLflow's names for them."""


def view_text() -> str:
    """The tag's value: a named view as MLflow's pages save one, and what it holds as JSON text."""
    state = {
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": list(_COLUMNS),
        "columnOrder": list(_COLUMNS),
        "columnWidths": _COLUMNS,
    }
    view = {"name": VIEW, "createdAt": _VERSION_MS, "updatedAt": _VERSION_MS}
    return json.dumps(view | {"state": json.dumps(state)})


def is_due(tags: Mapping[str, str]) -> bool:
    """Whether an experiment with these tags lacks the view, or has an older one that nobody edited.

    MLflow's pages set `updatedAt` when a view is overridden.
    """
    try:
        kept = json.loads(tags[VIEW_TAG])
        return bool(kept["createdAt"] == kept["updatedAt"] < _VERSION_MS)
    except KeyError:
        return True
    except (TypeError, ValueError):
        return False


def offer_view(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> None:
    """Write the view to an experiment where that is due.

    Args:
        client: of the store.
        experiment: its id.
        tags: those that it has.
    """
    from mlflow.exceptions import MlflowException

    # Two processes may write it at once, and a server may let only some people do so: the view is
    # a convenience, not worth a run.
    with suppress(MlflowException):
        if is_due(tags):
            client.set_experiment_tag(experiment, VIEW_TAG, view_text())
