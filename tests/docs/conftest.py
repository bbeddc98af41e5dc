"""The documentation site, built once by the command of `make docs`, a store, and a model."""

from tests.support.mlflow_store import empty_database, store
from tests.support.site import build, site
from tests.support.small_model import small_model_folder
