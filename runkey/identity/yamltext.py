"""YAML with every scalar left as the text that stands there.

For files that this package only quotes from (conda-lock.yml, dvc.yaml, *.dvc): no `1.10` becomes
1.1.  params.yaml, whose values have types, has its own reader in `runkey.params`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def parse_yaml_text(text: str) -> Any:
    """The tree of dicts, lists and strings in a YAML text; None if it is empty.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, _LOADER)


def read_yaml_text(path: Path) -> Any:
    """The tree of dicts, lists and strings in a YAML file; None if it is empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML in UTF-8; the text gives the line.
    """
    try:
        return parse_yaml_text(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"not YAML{where}") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
