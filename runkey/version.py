"""The version of this package, stated here only: pyproject.toml and `runkey --version` read it.

A file of its own, because keys do not cover it: a new version alone trains nothing again.
"""

__version__ = "0.2.0"
