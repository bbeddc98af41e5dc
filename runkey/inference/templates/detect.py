"""Detect objects in image files; print a line of JSON for each.

    python detect.py a.jpg b.png                         # each class's best threshold (card.json)
    python detect.py --score 0.3 --draw drawn/ *.jpg     # one threshold; drawn images

Needs onnxruntime, numpy and pillow; of onnxruntime's own dependencies it needs numpy alone:
pip install --no-deps onnxruntime numpy pillow
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageOps

CARD = json.loads(Path(__file__).with_name("card.json").read_text(encoding="utf-8"))
SIZES, BEST = CARD["sizes"], CARD["thresholds"]
CLASSES = [{"class": one["name"], "id": one["id"]} for one in CARD["classes"]]
LIMITS = [BEST.get(one["class"], BEST.get("{class} ({id})".format(**one), 0.5)) for one in CLASSES]


def load_network(path):
    """Return what maps uint8 images [1, 3, h, w] to scores, labels, boxes (xyxy, fractions)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def read_image(path):
    """Read an image upright by EXIF, as 8-bit RGB, transparent pixels white."""
    stored = Image.open(path)
    stored.load()
    image = ImageOps.exif_transpose(stored)
    if image.mode[0] in "IF":  # grey of more than 8 bits
        black, white = SIZES["intensity_range"] or (0, 65535)
        values = (np.asarray(image).astype(np.float64) - black) * (255 / (white - black))
        image = Image.fromarray((np.nan_to_num(values.clip(0, 255)) + 0.5).astype(np.uint8))
    elif "A" in image.mode.upper() or "transparency" in image.info:
        clear = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    elif image.mode == "CMYK" and stored.format == "JPEG" and "adobe" not in stored.info:
        image = ImageChops.invert(image)
    return image.convert("RGB")


def detect(network, image, score=None):
    """Return the detections of an image, best first; boxes in its pixels."""
    low, high = min(image.size), max(image.size)
    short = min(SIZES["short_side"], max(1, round(SIZES["long_side"] * low / high)))
    long = min(int(short * high / low), max(SIZES["long_side"], short))
    size = (long, short) if image.height <= image.width else (short, long)
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    scores, labels, boxes = (answer[0] for answer in network(np.ascontiguousarray(pixels)[None]))
    found = zip(scores, labels, boxes * np.float32(image.size * 2), strict=True)
    return [
        {**CLASSES[label], "score": float(value), "box_xyxy": box.tolist()}
        for value, label, box in found
        if value >= (LIMITS[label] if score is None else score)
    ]


def draw(image, found):
    """Draw boxes and names into an image."""
    pen = ImageDraw.Draw(image)
    for one in found:
        box, text = one["box_xyxy"], f"{one['class']} {one['score']:.2f}"
        pen.rectangle(box, outline="red", width=2)
        pen.rectangle(pen.textbbox(box[:2], text), fill="red")
        pen.text(box[:2], text, fill="white")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Detect objects; a line of JSON for each file.")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--score", type=float, help="least score [each class's best]")
    parser.add_argument("--draw", type=Path, help="folder for drawn images")
    chosen, failed = parser.parse_args(), 0
    network = load_network(str(Path(__file__).with_name(CARD["file"])))
    for path in chosen.images:
        try:
            image = read_image(path)
        except Exception as error:  # PIL raises almost any type
            print(f"{path}: cannot be read ({error})", file=sys.stderr)
            failed = 1
            continue
        found = detect(network, image, chosen.score)
        print(json.dumps({"file": str(path), "detections": found}, ensure_ascii=False))
        if chosen.draw:
            draw(image, found)
            chosen.draw.mkdir(parents=True, exist_ok=True)
            image.save(chosen.draw / f"{path.stem}.png")
    sys.exit(failed)
