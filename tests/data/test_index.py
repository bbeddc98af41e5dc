"""The index of a split: what is written comes back, is shared, and is refused if damaged."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest
import safetensors.numpy

from runkey.data.index import Index, read_index, write_index
from runkey.errors import DataError


@pytest.fixture
def records(make_record):
    odd = {
        "rotate": 90,
        "mirror": True,
        "intensity_range": (0.0, 4095.0),
        "file": "a/f\u00fcr \u202f.png",
    }
    crowds = {"crowd": (True, False, True)}
    return [
        make_record(7, boxes=2),
        make_record(-3, boxes=0, **odd),
        make_record(5, boxes=3, **crowds),
    ]


@pytest.fixture
def path(tmp_path, records):
    write_index(tmp_path / "train.safetensors", records)
    return tmp_path / "train.safetensors"


def test_records_come_back(path, records):
    index = read_index(path)
    assert list(index) == records
    assert index[-1] == records[2]
    assert index[1:] == records[1:]
    assert list(Index.of(records)) == records
    assert index.object_counts().tolist() == [2, 0, 1]
    boxes, labels = index.objects(2)
    (x, y, w, h), width, height = records[2].boxes_xywh[1], records[2].width, records[2].height
    assert boxes.tolist() == [[x / width, y / height, (x + w) / width, (y + h) / height]]
    assert labels.tolist() == [1]
    with pytest.raises(IndexError):
        index[3]


def test_an_index_without_images_or_without_boxes(tmp_path, make_record):
    for records in ([], [make_record(1, boxes=0)]):
        write_index(tmp_path / "a.safetensors", records)
        assert list(read_index(tmp_path / "a.safetensors")) == records
        assert read_index(tmp_path / "a.safetensors").object_counts().tolist() == [0] * len(records)


def test_other_programs_read_it(path, records):
    columns = safetensors.numpy.load_file(path)
    assert columns["ids"].tolist() == [record.id for record in records]
    assert columns["boxes_xywh"].shape == (5, 4)


def test_a_worker_process_gets_the_name_of_the_file(path, records):
    message = pickle.dumps(read_index(path))
    assert len(message) < 500
    assert list(pickle.loads(message)) == records  # noqa: S301
    assert list(pickle.loads(pickle.dumps(Index.of(records)))) == records  # noqa: S301


def test_every_damaged_byte_is_refused_or_gives_records(path):
    """No other error, and no read beyond the file."""
    content, rng = path.read_bytes(), random.Random(0)
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(300):
        broken = bytearray(content)
        at = rng.choice([rng.randrange(length), rng.randrange(length, len(content))])
        broken[at] = rng.randrange(256)
        path.write_bytes(broken)
        with suppress(DataError):
            list(read_index(path))
    for kept in (0, 5, 100, length, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(DataError, match="not an index"):
            read_index(path)


@pytest.mark.parametrize(
    ("column", "at", "value"),
    [
        ("starts", 1, 9),
        ("sizes", 0, 0),
        ("labels", 0, -1),
        ("boxes_xywh", 0, np.nan),
        ("crowd", 0, 7),
    ],
)
def test_columns_that_cannot_be_are_refused(path, column, at, value):
    content = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    entry = json.loads(content[8:length])[column]
    kind = {"I64": np.int64, "F64": np.float64, "BOOL": np.uint8}[entry["dtype"]]
    start, stop = (length + offset for offset in entry["data_offsets"])
    values = np.frombuffer(memoryview(content)[start:stop], kind)
    values[at] = value
    path.write_bytes(content)
    with pytest.raises(DataError, match="`dvc repro -f prepare` writes it again"):
        read_index(path)


def test_opening_the_index_of_coco_costs_little(tmp_path):
    """118,287 images and 860,000 boxes: under a second and 200 MB in each process."""
    write_index(tmp_path / "train.safetensors", synthetic(118_287, 860_000))
    start = time.process_time()
    index = read_index(tmp_path / "train.safetensors")
    assert time.process_time() - start < 1
    assert len(index) == 118_287
    assert index.object_counts().sum() == 860_000
    code = (
        "import resource, sys; from pathlib import Path; from runkey.data.index import read_index;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = peak(); index = read_index(Path(sys.argv[1])); print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "train.safetensors")]
    kib = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert kib < 200_000


def synthetic(images: int, boxes: int) -> Index:
    """An index of COCO's shape."""
    rng = np.random.default_rng(0)
    names = [f"train2017/{i:012}.jpg".encode() for i in range(images)]
    ends = np.sort(rng.integers(0, boxes + 1, images - 1))
    return Index(
        ids=np.arange(images),
        sizes=rng.integers(300, 641, (images, 2)),
        turns=np.zeros((images, 2), np.int64),
        ranges=np.full((images, 2), np.nan),
        names=np.frombuffer(b"".join(names), np.uint8),
        name_starts=np.cumsum([0, *map(len, names)]),
        starts=np.concatenate(([0], ends, [boxes])),
        boxes_xywh=rng.uniform(1, 100, (boxes, 4)),
        labels=rng.integers(0, 80, boxes),
        areas=rng.uniform(1, 10_000, boxes),
        crowd=np.zeros(boxes, np.bool),
        annotation_ids=np.arange(boxes),
    )
