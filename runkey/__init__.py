"""runkey: train a detector on COCO-format images, and find every run again by its key."""

from runkey.version import __version__ as __version__
