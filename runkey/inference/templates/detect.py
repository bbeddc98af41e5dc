"""Detect objects in image files; print a line of JSON for each.

    python detect.py a.jpg b.png                         # each class's best threshold (card.json)
    python detect.py --score 0.3 --draw drawn/ *.jpg     # one threshold; drawn images

Needs numpy, pillow and what runs the model: onnxruntime, openvino or torch ("export" in card.json).
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageOps

CARD = json.loads(Path(__file__).with_name("card.json").read_text(encoding="utf-8"))
SIZES, CLASSES, LIMITS = CARD["sizes"], CARD["classes"], CARD["thresholds"]


def load_network(path):
    """Return what maps uint8 images [1, 3, h, w] to scores, labels, boxes (xyxy, fractions)."""
    if CARD["export"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})
    if CARD["export"] == "openvino":
        import openvino

        hint = {"INFERENCE_PRECISION_HINT": "f32" if CARD["precision"] == "fp32" else "bf16"}
        model = openvino.Core().compile_model(path, "CPU", hint)
        return lambda images: [model([images])[index] for index in range(3)]
    import torch

    warnings.filterwarnings("ignore", "The given buffer is not writable")  # of torch.export.load
    program = torch.export.load(path).module()
    return lambda images: [answer.numpy() for answer in program(torch.from_numpy(images))]


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
    short, low, high = SIZES["short_side"], min(image.size), max(image.size)
    if high / low * short > SIZES["long_side"]:
        short = max(1, round(SIZES["long_side"] * low / high))
    long = min(int(short * high / low), max(SIZES["long_side"], short))
    size = (long, short) if image.height <= image.width else (short, long)
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    answers = [answer[0] for answer in network(np.ascontiguousarray(pixels)[None])]
    found = []
    for value, label, box in zip(*answers, strict=True):
        name, id_ = CLASSES[label]["name"], CLASSES[label]["id"]
        limit = LIMITS.get(name, LIMITS.get(f"{name} ({id_})", 0.5)) if score is None else score
        if value >= limit:
            box_xyxy = (box * np.float32(image.size * 2)).tolist()
            found.append({"class": name, "id": id_, "score": float(value), "box_xyxy": box_xyxy})
    return found


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
            chosen.draw.mkdir(parents=True, exist_ok=True)
            for one in found:
                text, pen = f"{one['class']} {one['score']:.2f}", ImageDraw.Draw(image)
                pen.rectangle(one["box_xyxy"], outline="red", width=2)
                pen.rectangle(pen.textbbox(one["box_xyxy"][:2], text), fill="red")
                pen.text(one["box_xyxy"][:2], text, fill="white")
            image.save(chosen.draw / f"{path.stem}.png")
    sys.exit(failed)
