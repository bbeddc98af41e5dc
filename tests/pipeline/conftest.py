"""The fixtures of this folder's tests, from tests/support."""

from tests.support.clones import address
from tests.support.mlflow_store import small_disk
