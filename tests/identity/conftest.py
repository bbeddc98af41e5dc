"""The fixtures of this folder's tests, from tests/support."""

from tests.support.identity_project import project
