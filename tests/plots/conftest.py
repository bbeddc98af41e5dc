"""The fixtures of this folder's tests, from tests/support."""

from tests.support.logs import any_log, image_set, log_of
from tests.support.report_runs import a_run, an_interrupted_run, checkout
