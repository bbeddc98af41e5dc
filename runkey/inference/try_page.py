"""A page to try a model: one HTML file with the network, its runtime and a drop zone for images.

    write_try_page(page, Path("try.html"))

It opens from a file: its content policy forbids any request. ONNX Runtime's WebAssembly build,
which `make env-export` gets, and the model are in it, gzipped and in base64. The scripts
`try_pixels.js` and `try_page.js` do what `preprocess`, `Model` and `Detections` do.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import ImageColor

from runkey.errors import LockError, ModelError
from runkey.files import write_atomically
from runkey.inference.draw import class_colour
from runkey.inference.export import halve_weights, to_onnx
from runkey.inference.model import InferenceCard
from runkey.inference.module import EXPORTED, InferenceModule
from runkey.inference.thresholds import DEFAULT_SCORE, class_keys
from runkey.model.weights import load_model
from runkey.units import counted, format_bytes
from runkey.version import __version__

MOST_BYTES = 8_000_000
"""Of the page: what a phone opens and an e-mail carries."""
_HERE = Path(__file__).parent
_RUNTIME = Path(__file__).parents[2] / ".venv-export" / "onnxruntime-web"
_CODE, _WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
_SCRIPTS = ("try_pixels.js", "try_page.js")
_LICENCE = """MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software
and associated documentation files (the "Software"), to deal in the Software without
restriction, including without limitation the rights to use, copy, modify, merge, publish,
distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING
BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


@dataclass(frozen=True, slots=True)
class TryPage:
    """What is on a page."""

    card: InferenceCard
    network: bytes
    """ONNX: uint8 images [1, 3, h, w] to scores, labels and boxes, see `InferenceModule`."""
    title: str
    about: str = ""
    """A sentence without a full stop, such as the run's AP."""
    example: tuple[str, bytes] | None = None
    """Name and bytes of an image file that is in the page."""


def check_before(weights: int, what: str) -> None:
    """Check what would stop a page, before any work: float32 weights hardly compress.

    Args:
        weights: bytes of the weights file.
        what: name of the model, for the message.

    Raises:
        LockError: ONNX Runtime for browsers is not installed.
        ModelError: the page would be larger than `MOST_BYTES`.
    """
    _read_runtime("version")
    if weights > MOST_BYTES:
        raise _too_large(what, f"its weights alone are {format_bytes(weights)}")


def export_network(folder: Path) -> bytes:
    """Return a saved model as ONNX, whose batch and image size are free.

    Raises:
        ModelError: the folder holds no model, or a damaged one.
        LockError: ONNX is not installed.
    """
    return to_onnx(InferenceModule(load_model(folder)[0], EXPORTED))


def write_try_page(page: TryPage, path: Path) -> Path:
    """Write a page; if it would be too large, with weights in half precision.

    Raises:
        LockError: ONNX Runtime for browsers is not installed.
        ModelError: the page would be larger than `MOST_BYTES`.
        WriteError: the file cannot be written.
    """
    data = _render(page, page.network)
    if len(data) > MOST_BYTES and page.network:
        data = _render(page, halve_weights(page.network), ", weights in half precision")
    if len(data) > MOST_BYTES:
        raise _too_large(page.title, f"its page has {format_bytes(len(data))}")
    write_atomically(path, data)
    return path


def _render(page: TryPage, network: bytes, note: str = "") -> bytes:
    runtime = {name: _read_runtime(name) for name in (_CODE, _WASM)}
    script = "".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    card = page.card
    text = environment.get_template("try_page.html.jinja").render(
        title=page.title,
        about=_about(page),
        classes=card.classes,
        thresholds=_thresholds(card),
        made=f"Made by runkey {__version__}"
        + (f" of {card.key}" if card.key else "")
        + f", with ONNX Runtime {_read_runtime('version').decode().split()[1]}{note}",
        licence=_LICENCE,
        card=_json(_card(page)),
        runtime=_packed(runtime[_CODE]),
        wasm=_packed(runtime[_WASM]),
        model=_packed(network),
        picture=page.example and base64.b64encode(page.example[1]).decode(),
        script=script,
        script_hash=f"sha256-{digest}",
    )
    return text.encode()


def _too_large(what: str, why: str) -> ModelError:
    return ModelError(
        f"{what}: too large for a page to try, {why} of {format_bytes(MOST_BYTES)};"
        " `runkey predict` detects with it"
    )


def _read_runtime(name: str) -> bytes:
    try:
        return (_RUNTIME / name).read_bytes()
    except FileNotFoundError:
        raise LockError(
            "onnxruntime-web, which the page needs, is not installed; install npm if it is missing,"
            " then `make env-export`"
        ) from None


def _about(page: TryPage) -> str:
    sizes = page.card.sizes
    resized = f"images are resized to at most {sizes.short_side} x {sizes.long_side} pixels"
    return ", ".join(filter(None, [page.about, counted(len(page.card.classes), "class"), resized]))


def _thresholds(card: InferenceCard) -> str:
    if not card.thresholds:
        return f"The run has no thresholds of its own: {DEFAULT_SCORE} for every class."
    return "At first each class has its own: that of the best F1 on the run's validation images."


def _card(page: TryPage) -> dict[str, Any]:
    card = page.card
    classes = []
    for one, key in zip(card.classes, class_keys(card.classes), strict=True):
        colour = class_colour(one.index)
        is_light = ImageColor.getcolor(colour, "L") > 140  # type: ignore[operator]
        classes.append(
            {
                "name": one.name,
                "colour": colour,
                "ink": "#222222" if is_light else "#FFFFFF",
                "score": card.thresholds.get(key, DEFAULT_SCORE),
            }
        )
    return {
        "classes": classes,
        "short_side": card.sizes.short_side,
        "long_side": card.sizes.long_side,
        "example": page.example and page.example[0],
    }


def _json(value: Mapping[str, Any]) -> str:
    """Return JSON that may stand in a script element: no `<` ends it."""
    return json.dumps(value).replace("<", "\\u003c")


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()
