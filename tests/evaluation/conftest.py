"""The fixtures of this folder's tests, from tests/support."""

from tests.support.detections import boxes, world
