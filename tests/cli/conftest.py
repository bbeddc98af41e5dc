"""The fixtures of this folder's tests, from tests/support."""

from tests.support.command_line import root, run
from tests.support.mlflow_store import empty_database, store
from tests.support.small_model import small_model_folder
