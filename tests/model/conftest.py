"""The fixtures of this folder's tests, from tests/support."""

from tests.support.reference_detr import detr_params, formula, reference
