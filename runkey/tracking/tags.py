"""Set a tag on a recorded run without importing mlflow: that would take longer than all else.

For the one line that a reused result leaves on its run.  In MLflow's database a run's tags are one
table with the primary key (key, run_uuid); its REST call is `runs/set-tag`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing

from runkey.errors import TrackingError
from runkey.tracking.store import Store

_BUSY_SECONDS = 20.0


def set_tag(
    store: Store, run_id: str, name: str, value: str, post: Callable[[str, dict[str, str]], object]
) -> None:
    """Set a tag over an earlier value.

    Args:
        store: a server or a sqlite database; nothing is done in another kind of database.
        run_id: the run.
        name: of the tag.
        value: its text.
        post: sends a JSON object to an address below the server's `api/2.0/mlflow/`.

    Raises:
        TrackingError: the database cannot be written.
        RegistryError: from `post`.
    """
    if store.is_server:
        post("runs/set-tag", {"run_id": run_id, "key": name, "value": value})
    elif store.database:
        try:
            with (
                closing(sqlite3.connect(store.database, timeout=_BUSY_SECONDS)) as database,
                database,
            ):
                database.execute(
                    "INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)"
                    " ON CONFLICT (key, run_uuid) DO UPDATE SET value = excluded.value",
                    (name, value, run_id),
                )
        except sqlite3.Error as error:
            raise TrackingError(f"{store.database}: {error}") from None
