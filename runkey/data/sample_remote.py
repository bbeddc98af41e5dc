"""Whether data.dvc holds the sample data or somebody's own, and what that means for `dvc push`.

`dvc add data` keeps the lines `remote: seed` and `push: false` of the sample's data.dvc.  So images
of one's own are never pushed into the repository by surprise; nor are they pushed anywhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from runkey.errors import DataError

DATA_DVC = Path("data.dvc")
SEED_FOLDER = Path("sample-data")


def own_data_note(root: Path) -> str | None:
    """A line for users whose own data would not be pushed; None where there is nothing to say.

    Args:
        root: the workspace; data.dvc and sample-data/ are looked for there.

    Raises:
        DataError: data.dvc is there and cannot be read.
    """
    path = root / DATA_DVC
    if not path.is_file():
        return None
    try:
        tree: Any = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        out = tree["outs"][0]
        md5 = str(out["md5"])
    except (YAMLError, LookupError, TypeError, UnicodeDecodeError):
        raise DataError(f"{DATA_DVC}: unreadable; `dvc add data` writes it anew") from None
    if out.get("remote") != "seed":
        return None
    if (root / SEED_FOLDER / "files" / "md5" / md5[:2] / md5[2:]).is_file():
        return None
    return (
        f"note: {DATA_DVC} holds your own images and still says `remote: seed` and `push: false`; "
        "take both lines out, and `dvc push` sends the images to your remote"
    )
