"""The fixtures of this folder's tests, from tests/support."""

from tests.support.clones import address, team
from tests.support.mlflow_store import empty_database, store
from tests.support.project import first_repro, project
from tests.support.ray_nodes import ray_cluster
from tests.support.repository import repository
from tests.support.slurm import slurm
