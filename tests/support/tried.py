"""A page to try a model, steered in a real Chromium."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tests.support.chromium import Page

RUNTIME = Path(__file__).parents[2] / ".venv-export/onnxruntime-web/version"
"""There if `make env-export` found npm."""


def detect(page: Page, content: bytes) -> dict[str, Any]:
    """What the page finds in an image file: height, width, detections, milliseconds."""
    code = (
        "(async (text) => { const data = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));"
        " const { picture, ...found } = await runkey.detect(new Blob([data]));"
        f" return found; }})('{base64.b64encode(content).decode()}')"
    )
    result = page.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
    assert "exceptionDetails" not in result, result["exceptionDetails"]
    return dict(result["result"]["value"])
