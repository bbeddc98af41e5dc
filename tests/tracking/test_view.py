"""The columns of MLflow's run list: written once, renewed, never over what people chose."""

from __future__ import annotations

import json
from typing import Any

from runkey.tracking.store import VIEW_TAG, Store, experiment_id, is_due, open_client, view_text


def test_an_experiment_has_the_view_and_keeps_one_that_was_edited(store: Store) -> None:
    client = open_client(store)
    number = experiment_id(client, store, "detection")
    assert client.get_experiment(number).tags[VIEW_TAG] == view_text()

    edited = changed(updatedAt=2**42)
    client.set_experiment_tag(number, VIEW_TAG, edited)
    assert experiment_id(client, store, "detection") == number
    assert client.get_experiment(number).tags[VIEW_TAG] == edited


def test_only_an_older_view_that_nobody_edited_is_replaced() -> None:
    assert is_due({})
    assert not is_due({VIEW_TAG: view_text()})
    assert is_due({VIEW_TAG: changed(createdAt=1, updatedAt=1)})
    assert not is_due({VIEW_TAG: changed(createdAt=1)})
    assert not is_due({VIEW_TAG: "deflate;what a page of another version wrote"})
    assert not is_due({VIEW_TAG: "[]"})


def changed(**values: Any) -> str:
    return json.dumps(json.loads(view_text()) | values)
