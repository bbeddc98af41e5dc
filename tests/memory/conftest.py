"""The fixtures of this folder's tests, from tests/support."""

from tests.support.small_prediction import make_record, prediction, prepared, small_params
from tests.support.traced import build, in_order_fixture, trace_fixture, training
