"""The fixtures of this folder's tests, from tests/support."""

from tests.support.mlflow_store import small_disk
from tests.support.small_model import small_model_folder
