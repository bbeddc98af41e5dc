"""The fixtures of this folder's tests, from tests/support."""

from tests.support.command_line import root, run
