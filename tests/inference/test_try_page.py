"""The page to try a model: its scripts compute what Python does, and it opens from a file."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import batched_nms

from runkey.data.augment import resized_size
from runkey.errors import LockError, ModelError
from runkey.files import WriteError
from runkey.inference import try_page
from runkey.inference.export import halve_weights, to_onnx
from runkey.inference.extras import import_extra
from runkey.inference.model import InferenceCard, Model, load_model_folder
from runkey.inference.module import EXPORTED, InferenceModule
from runkey.inference.try_page import TryPage, check_before, export_network, write_try_page
from runkey.model.detr import build_model
from runkey.model.weights import CardClass, ModelCard, Sizes, save_model
from runkey.params import Model as ModelParams
from tests.support.chromium import Page, open_chromium
from tests.support.tried import RUNTIME, detect

SCRIPTS = Path(try_page.__file__).parent
needs_runtime = pytest.mark.skipif(
    not RUNTIME.is_file(), reason="`make env-export` with npm installs ONNX Runtime for browsers"
)
CLASSES = (CardClass(0, 4, "ball"), CardClass(1, 9, "</script>cube"))
SHAPES = (
    *((192, 256), (100, 100), (50, 70), (333, 517), (7, 500), (1, 1), (33, 1), (600, 801)),
    (1200, 900),
)


def in_node(code: str) -> Any:
    """Run code after the page's functions in Node; `answer(value)` gives the result."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed; on Debian: apt-get install nodejs")
    script = (SCRIPTS / "try_pixels.js").read_text(encoding="utf-8")
    script += "\nconst answer = (value) => console.log(JSON.stringify(value));\n" + code
    done = subprocess.run(
        [node, "--input-type=module"], input=script, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_script_resizes_as_pillow_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for number, (height, width) in enumerate(SHAPES):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for new in ((120, 160), resized_size(height, width, 120, 160), (height, 30), (30, width)):
            (tmp_path / str(number)).write_bytes(np.dstack([image, image[..., :1]]).tobytes())
            cases.append((str(tmp_path / str(number)), height, width, *new, image))
    shown = json.dumps([case[:5] for case in cases])
    found = in_node(
        f"""
        import {{ readFileSync }} from 'node:fs';
        const read = (path) => new Uint8ClampedArray(readFileSync(path));
        const text = (planes) => Buffer.from(planes).toString('base64');
        answer({shown}.map(([path, ...sizes]) => text(resize(read(path), ...sizes))));
        """
    )
    for planes, (_, *_, new_height, new_width, image) in zip(found, cases, strict=True):
        resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
        got = np.frombuffer(base64.b64decode(planes), np.uint8).reshape(3, new_height, new_width)
        assert np.array_equal(got, np.asarray(resized).transpose(2, 0, 1)), image.shape


def test_the_script_chooses_the_size_that_python_does() -> None:
    rng = np.random.default_rng(1)
    sizes = [(h, w, *limits) for h, w in rng.integers(1, 5000, (500, 2)).tolist()
             for limits in ((120, 160), (480, 640), (800, 1333))]  # fmt: skip
    sizes += [(25, 16, 8, 12), (5, 2, 3, 5), (3, 1000, 120, 160)]
    found = in_node(f"answer({json.dumps(sizes)}.map((one) => resizedSize(...one)));")
    assert found == [list(resized_size(*one)) for one in sizes]


def test_the_script_drops_the_overlapping_boxes_that_torchvision_drops() -> None:
    rng = torch.Generator().manual_seed(2)
    corners, sides = torch.rand(200, 2, generator=rng) * 50, torch.rand(200, 2, generator=rng) * 40
    boxes = torch.cat([corners, corners + sides + 5], 1)
    labels = torch.randint(0, 3, (200,), generator=rng)
    scores = torch.linspace(1, 0, 200)
    pairs = zip(labels.tolist(), boxes.tolist(), strict=True)
    rows = [{"label": label, "box": box} for label, box in pairs]
    found = in_node(
        f"const rows = {json.dumps(rows)};"
        "answer([0.3, 0.5, 0.8].map((iou) => suppress(rows, iou).map((one) => rows.indexOf(one))));"
    )
    for iou, kept in zip((0.3, 0.5, 0.8), found, strict=True):
        assert kept == sorted(batched_nms(boxes, scores, labels, iou).tolist())


def test_a_model_that_cannot_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text("onnxruntime-web 1.0.0 sha512-\n")
    monkeypatch.setattr(try_page, "_RUNTIME", tmp_path)
    check_before(2_400_000, "rk2-0123")
    with pytest.raises(ModelError) as refused:
        check_before(166_000_000, "rk2-0123 baseline")
    assert str(refused.value) == (
        "rk2-0123 baseline: too large for a page to try, its weights alone are 166.0 MB of 8.0 MB;"
        " `runkey predict` detects with it"
    )
    page = TryPage(InferenceCard(CLASSES, Sizes(48, 80)), b"", "rk2-0123")
    for stop in (
        lambda: write_try_page(page, tmp_path / "page.html"),
        lambda: (tmp_path / "version").unlink() or check_before(1, "rk2-0123"),
    ):
        with pytest.raises(LockError, match=r"onnxruntime-web.*not installed.*`make env-export`"):
            stop()
    for name, size in (("ort.wasm.bundle.min.mjs", 10), ("ort-wasm-simd-threaded.wasm", 6_500_000)):
        (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(size))
    (tmp_path / "version").write_text("onnxruntime-web 1.0.0 sha512-\n")
    with pytest.raises(ModelError, match=r"rk2-0123: too large .* its page has 8\.7 MB of 8\.0 MB"):
        write_try_page(page, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_model_that_just_does_not_fit_gets_weights_in_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        onnx, runtime = import_extra("onnx"), import_extra("onnxruntime")
    except LockError as error:
        pytest.skip(str(error))
    params = ModelParams(hidden_dim=32, num_heads=2, feedforward_dim=48, num_queries=12)
    torch.manual_seed(0)
    module = InferenceModule(build_model(params, 2), EXPORTED)
    network = to_onnx(module)
    halved = halve_weights(network)
    assert len(halved) < 0.65 * len(network)  # the rest is the graph
    onnx.checker.check_model(onnx.load_from_string(halved), full_check=True)
    image = {"images": np.random.default_rng(0).integers(0, 256, (1, 3, 48, 80), dtype=np.uint8)}
    whole, half = (runtime.InferenceSession(one).run(None, image)[0] for one in (network, halved))
    assert 0 < np.abs(np.sort(whole) - np.sort(half)).max() < 2e-3

    (tmp_path / "version").write_text("onnxruntime-web 1.0.0 sha512-\n")
    monkeypatch.setattr(try_page, "_RUNTIME", tmp_path)
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        (tmp_path / name).write_bytes(b"")
    page = TryPage(InferenceCard(CLASSES, Sizes(48, 80)), network, "rk2-0123")
    path = tmp_path / "page.html"
    size = write_try_page(page, path).stat().st_size
    assert "half precision" not in path.read_text()
    monkeypatch.setattr(try_page, "MOST_BYTES", size - 1)
    assert write_try_page(page, path).stat().st_size < 0.7 * size
    assert ", weights in half precision. It finds" in path.read_text()


# The page itself.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A model of random weights, and its page."""
    params = ModelParams(hidden_dim=32, num_heads=2, feedforward_dim=48, num_queries=12)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "model"
    state = build_model(params, 2).state_dict()
    save_model(folder, state, ModelCard(params, CLASSES, Sizes(48, 80)))
    loaded = load_model_folder(folder, device="cpu")
    example = ("example.png", encoded(picture()))
    page = TryPage(loaded.card, export_network(folder), "rk2-0123 <b>", "AP 0.5", example)
    return loaded, write_try_page(page, folder.parent / "page.html")


def picture(height: int = 90, width: int = 120) -> Image.Image:
    rng = np.random.default_rng(height)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def test_a_full_disk_leaves_no_half_page(
    model: tuple[Model, Path], small_disk: Path, tmp_path: Path
) -> None:
    """The page has some 5 MB, the disk two."""
    folder = model[1].parent / "model"
    page = TryPage(model[0].card, export_network(folder), "rk2-0123", "", None)
    with pytest.raises(WriteError, match=r"page.html.*No space left on device") as full:
        write_try_page(page, small_disk / "page.html")
    assert "\n" not in str(full.value)
    assert not list(small_disk.iterdir())


def check_equal(page: Page, model: Model, content: bytes) -> None:
    """Compare the page's detections of an image file with the model's in Python."""
    found, expected = detect(page, content), model(content, score=0)
    assert (found["height"], found["width"]) == expected.image_size
    scores = np.array([one["score"] for one in found["detections"]])
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
    # Equal scores may be in another order.
    apart = np.diff(expected.scores, prepend=2, append=-1)
    clear = (apart[:-1] < -1e-4) & (apart[1:] < -1e-4)
    assert clear.sum() > 5
    boxes = np.array([one["box"] for one in found["detections"]])
    np.testing.assert_allclose(boxes[clear], expected.boxes_xyxy[clear], atol=0.01)
    labels = np.array([one["label"] for one in found["detections"]])
    assert (labels[clear] == expected.labels[clear]).all()


@pytest.mark.slow
@needs_runtime
def test_the_page_detects_what_the_model_does(model: tuple[Model, Path], tmp_path: Path) -> None:
    loaded, path = model
    assert path.stat().st_size < 8_000_000
    with open_chromium(tmp_path) as page:
        page.open(path.as_uri())
        page.wait_for("Ready.", "</script>cube", "rk2-0123 <b>")
        for one in ((90, 120), (300, 200), (31, 257)):
            check_equal(page, loaded, encoded(picture(*one)))
        check_equal(page, loaded, encoded(picture(301, 417), "JPEG", quality=85))
        check_equal(page, loaded, encoded(picture().convert("L")))
        check_equal(page, loaded, encoded(picture().convert("P")))
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            check_equal(page, loaded, encoded(picture(160, 120), "JPEG", exif=exif))
            check_equal(page, loaded, encoded(picture(160, 120), exif=exif))
            turned = encoded(picture(160, 120), "WEBP", exif=exif, lossless=True)
            check_equal(page, loaded, turned)
        assert page.errors == []
        # The file itself, and the runtime that the page holds.
        assert [one.partition(":")[0] for one in page.requests] == ["file", "blob"]


@pytest.mark.slow
@needs_runtime
def test_the_controls(model: tuple[Model, Path], tmp_path: Path) -> None:
    loaded, path = model
    with open_chromium(tmp_path, 1200, 900) as page:
        page.open(path.as_uri())
        page.wait_for("Ready.")
        press(page, "Tab", "Tab", "Enter")  # from the file input to the example
        page.wait_for("example.png: ", " ms (network")
        set_slider(page, "score", 0)
        assert "24 objects" in page.text()
        assert page.evaluate("document.querySelectorAll('#rows tr').length") == 24
        page.evaluate("document.getElementById('nms').click()")
        set_slider(page, "iou", 0.3)
        kept = len(loaded(encoded(picture()), score=0, nms=0.3))
        assert page.evaluate("document.querySelectorAll('#rows tr').length") == kept
        page.evaluate("document.getElementById('nms').click()")
        choose = "const e = document.getElementById('class'); e.value = '1';"
        page.evaluate(f"{choose} e.dispatchEvent(new Event('change'))")
        set_slider(page, "score", 1)
        assert "cube" not in page.evaluate("document.getElementById('rows').textContent")
        page.evaluate("document.getElementById('auto').click()")
        assert page.evaluate("document.getElementById('score-text').textContent") == "0.50"
        drop(page, encoded(picture(50, 200)), "dropped.png")
        page.wait_for("dropped.png: ")
        drop(page, b"no image", "notes.txt")
        page.wait_for("notes.txt: no image that this browser reads")
        drop(page, encoded(Image.new("I;16", (20, 20))), "wide.png")
        page.wait_for("wide.png: grey with 16 bits")
        for width in (390, 320):
            page.resize(width, 800)
            time.sleep(0.2)
            assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.errors == []
        # Nothing gets out, whatever a script tries.
        page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0); new Image().src = '//a.b/c'")
        time.sleep(0.3)
        assert [one for one in page.requests if one.startswith("http")] == []


def press(page: Page, *keys: str) -> None:
    codes = {"Tab": 9, "Enter": 13}
    for key in keys:
        event = {"key": key, "windowsVirtualKeyCode": codes[key]}
        if key == "Enter":
            event["text"] = "\r"
        page.call("Input.dispatchKeyEvent", type="keyDown", **event)
        page.call("Input.dispatchKeyEvent", type="keyUp", **event)


def set_slider(page: Page, name: str, value: float) -> None:
    page.evaluate(
        f"(() => {{ const one = document.getElementById('{name}'); one.value = {value};"
        " one.dispatchEvent(new Event('input')); })()"
    )


def drop(page: Page, content: bytes, name: str) -> None:
    text = base64.b64encode(content).decode()
    page.evaluate(
        f"""(() => {{
        const data = Uint8Array.from(atob('{text}'), (c) => c.charCodeAt(0));
        const files = new DataTransfer();
        files.items.add(new File([data], '{name}'));
        document.dispatchEvent(new DragEvent('drop', {{ dataTransfer: files, cancelable: true }}));
        }})()"""
    )
