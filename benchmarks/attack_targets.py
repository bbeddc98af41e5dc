"""What `benchmarks.attack` attacks: files of a checkout, and the commands that read each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A file, what it holds, and the commands that read it."""

    path: str
    """Below the checkout; KEY and OTHER stand for the two keys, * for any of several files."""
    kind: str
    """One of those of `tests.support.odd_files.odd_content`."""
    reads: str
    """Commands of `runkey`, separated by `; `; `stage:NAME` or `read:NAME` for other code."""

    @property
    def commands(self) -> list[str]:
        """The commands; one that is there twice is drawn twice as often."""
        return self.reads.split("; ")


_RECORDS = "list; show KEY; gc; list --where AP>0.1; verify KEY; show OTHER; diff KEY ."
_CLAIMS = "list; gc; list --where AP>0.1; show OTHER"
_DVC = "key; key --explain; diff . KEY"
_YOLO = "convert yolo there --format yolo; convert yolo there --format yolo --drop"
_VOC = "convert voc there --format voc; convert voc there --format voc --drop"
_ARTIFACTS = "mlartifacts/*/artifacts"
GROUPS: dict[str, tuple[int, tuple[Target, ...]]] = {
    # Weight, targets.
    "data": (
        26,
        (
            Target("data/annotations/instances_train.json", "json", "stage:prepare"),
            Target("data/annotations/instances_val.json", "json", "stage:prepare"),
            Target("data/train/*", "image", "stage:prepare"),
        ),
    ),
    "labels": (
        6,
        (
            Target("yolo/labels/*/*", "rows", _YOLO),
            Target("yolo/data.yaml", "yaml", _YOLO),
            Target("yolo/images/train/*", "image", _YOLO),
            Target("voc/Annotations/*", "xml", _VOC),
            Target("voc/ImageSets/Main/*", "rows", _VOC),
        ),
    ),
    "params": (
        20,
        (
            Target("params.yaml", "yaml", "params; params; params; key; summary"),
            Target("presets/sample.yaml", "yaml", "read:preset"),
        ),
    ),
    "records": (
        18,
        (
            Target("run.json", "json", "summary; read:manifest; verify KEY"),
            Target("model/key.json", "json", "read:predictor"),
            Target("metrics/*", "json", "summary"),
            Target(".runkey/claims/*", "json", _CLAIMS),
            Target(".runkey/OTHER/run_id", "json", "gc; read:pointer; replay OTHER"),
            Target(".runkey/OTHER/description.json", "json", "replay OTHER"),
            Target(f"{_ARTIFACTS}/record.json", "json", "index; verify KEY"),
            Target(f"{_ARTIFACTS}/model/key.json", "json", "verify KEY; diff KEY ."),
            Target(f"{_ARTIFACTS}/run.json", "json", "verify KEY; diff KEY .; get KEY --to there"),
            Target(
                f"{_ARTIFACTS}/evaluation/resampled.json", "json", "diff KEY KEY; report KEY KEY"
            ),
            Target(".runkey/runs.sqlite", "sqlite", _RECORDS),
            Target(".runkey/runs.sqlite", "bytes", _RECORDS),
        ),
    ),
    "dvc": (
        12,
        (
            Target("dvc.yaml", "yaml", _DVC),
            Target("data.dvc", "yaml", f"{_DVC}; stage:own_data_note; read:dataset"),
            Target("dvc.lock", "yaml", "diff . KEY"),
            Target("conda-lock.yml", "yaml", "key; env check"),
            Target("requirements.txt", "bytes", "env check"),
            Target(".dvc/config", "bytes", "read:part"),
            Target(".dvc/cache/files/md5/*/*.dir", "json", "read:part"),
        ),
    ),
    "logs": (
        4,
        (
            Target("logs/train.jsonl", "jsonl", "read:curves; report; summary"),
            Target("logs/system.jsonl", "jsonl", "read:curves; report"),
            Target(".runkey/OTHER/train.jsonl", "jsonl", "watch OTHER; report OTHER; read:resume"),
            Target("evaluation/*", "json", "read:evaluation; read:evaluation; report"),
            Target("prepared/*.json", "json", "read:prepared; read:evaluation; report"),
        ),
    ),
    "archives": (6, (Target("run.zip", "zip", "import run.zip"),)),
    "weights": (
        4,
        (
            Target("model/weights.safetensors", "weights", "read:model; read:check"),
            Target("model/model.json", "json", "read:model"),
            Target(".runkey/OTHER/*.pt", "bytes", "read:checkpoint"),
        ),
    ),
    "exports": (
        6,
        (
            Target("evaluation/thresholds.json", "json", "read:thresholds"),
            Target("export/card.json", "json", "read:export"),
            Target("export/model.onnx", "bytes", "read:export; read:onnx"),
            Target("export/model.onnx", "onnx", "read:onnx"),
        ),
    ),
    "answers": (4, ()),
}
