"""The fixtures of this folder's tests, from tests/support."""

from tests.support.site import build, site
