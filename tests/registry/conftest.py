"""The fixtures of this folder's tests, from tests/support."""

from tests.support.claims import claims, other, said
from tests.support.clones import address
from tests.support.collectable import gone, house
from tests.support.command_line import root, run
from tests.support.mlflow_store import empty_database
from tests.support.recorded_checkout import checkout, made
from tests.support.repository import repository
from tests.support.run_package import archive, colleague, package, ready, store
