"""Build the documentation site once, with the command of `make docs`."""

from tests.support.site import build, site
