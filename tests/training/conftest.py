"""The fixtures of this folder's tests, from tests/support."""

from tests.support.checkpoint_kit import open_checkpoints, small_disk
from tests.support.events import events
from tests.support.logged import lines
from tests.support.start_ranks import results, start, train
from tests.support.torch_state import restore_torch
