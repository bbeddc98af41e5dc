"""runkey: train a detector on COCO-format images, and find every run again by its key."""

from runkey.version import __version__ as __version__


def __getattr__(name: str) -> object:
    """Import `load`, `Model` and `Detections` when they are first used: torch takes seconds."""
    if name not in ("Detections", "Model", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from runkey import api

    return getattr(api, name)
