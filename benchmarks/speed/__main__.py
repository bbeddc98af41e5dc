"""Speed against the peers, part by part, in processor time.

    make bench ARGS="--images COCO"                       # all parts, under 20 minutes
    python -m benchmarks.speed step metrics --label main   # some parts

Needs `make reference` and `make env-bench`.  Losses, scores or metrics are compared before anything
is timed; contestants run in turn; a ratio is that of one round.  results/speed.json keeps the
numbers by label, each as soon as it is measured; results/speed.md is the table of them.
Without `--images`, a folder with COCO's annotations/ and train2017/, the loader is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# ruff: noqa: E402
from benchmarks.speed.peers import find_packages

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, as in stages/
find_packages()

from benchmarks.inference import machine
from benchmarks.reference import COMMIT, Reference, open_reference
from benchmarks.speed.inference import measure_inference
from benchmarks.speed.loader import measure_loader
from benchmarks.speed.metrics import measure_metrics
from benchmarks.speed.pairs import Row
from benchmarks.speed.step import measure_losses, measure_steps

RESULTS = Path(__file__).parents[1] / "results"
JSON, TABLE = RESULTS / "speed.json", RESULTS / "speed.md"
PARTS = ("step", "losses", "loader", "inference", "metrics")
VERSIONS = (
    "torch", "torchvision", "transformers", "pycocotools", "faster-coco-eval", "hotcoco",
    "onnxruntime", "openvino", "Pillow",
)  # fmt: skip


def main() -> None:
    """Measure, and write the file and the table after each number."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS, "table"], default=[])
    parser.add_argument("--reference", type=Path, default=Path(".reference/detr"))
    parser.add_argument("--images", type=Path, help="COCO: annotations/ and train2017/")
    parser.add_argument("--label", default="now", help="column of the table")
    parser.add_argument("--quick", action="store_true", help="tiny: tries the script itself")
    chosen = parser.parse_args()
    commit = _commit()  # of what is measured, before the results change a file
    found = json.loads(JSON.read_text(encoding="utf-8")) if JSON.is_file() else {}
    if "table" in chosen.parts:
        TABLE.write_text(table(found), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        measures = parts(open_reference(chosen.reference, Path(folder)), chosen)
        for name in chosen.parts or PARTS:
            if name not in measures:
                print(f"{name}: left out; name COCO's folder with --images")
                continue
            start = time.perf_counter()
            for row in measures[name]():
                _print(row)
                if chosen.quick:
                    continue
                column = found.setdefault(chosen.label, {"rows": {}})
                column["rows"][row.name] = row.summary()
                column |= {"commit": commit, "machine": machine(VERSIONS)}
                JSON.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                TABLE.write_text(table(found), encoding="utf-8")
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


def parts(
    reference: Reference, chosen: argparse.Namespace
) -> dict[str, Callable[[], Iterator[Row]]]:
    """Return what measures each part, with its number of rounds."""
    quick = chosen.quick
    measures: dict[str, Callable[[], Iterator[Row]]] = {
        "step": partial(measure_steps, reference, 1 if quick else 9),
        "losses": partial(measure_losses, reference, 2 if quick else 15),
        "inference": partial(measure_inference, reference, 1 if quick else 5),
        "metrics": partial(measure_metrics, 1 if quick else 3, 100 if quick else 5000),
    }
    if chosen.images:
        measures["loader"] = partial(measure_loader, reference, chosen.images, 1 if quick else 8)
    return measures


def _print(row: Row) -> None:
    for contestant, numbers in row.summary().items():
        faster = "; ".join(f"{peer} {_ratio(of)}" for peer, of in numbers["times_faster"].items())
        print(f"{row.name}: {contestant}: {numbers['cpu_ms']:.4g} ms; {faster}", flush=True)


def _ratio(of: list[float]) -> str:
    low, middle, high = of
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def table(found: dict[str, Any]) -> str:
    """Return the page: a table for each measurement, columns for each label."""
    text = [
        "# Speed against the peers",
        "",
        "Written by `make bench` (`python -m benchmarks.speed`; [all numbers](speed.json)). Times"
        " are processor time; a ratio is the peer's time divided by the line's, in the same round:"
        " above 1, the line is faster. Medians of the rounds, quartiles in brackets. The peers are"
        f" the reference DETR (facebookresearch/detr {COMMIT}) and those of"
        " `environment/bench/requirements.in`. All have the same weights and inputs, train the same"
        " parameters, and had their losses, scores and metrics compared with runkey's before the"
        " clock started. With a load above 1 other programs ran beside it.",
        "",
    ]
    text += [_about(label, column) for label, column in found.items()]
    for name in dict.fromkeys(name for column in found.values() for name in column["rows"]):
        text += ["", f"## {name[0].upper()}{name[1:]}", "", *_rows(name, found)]
    return "\n".join([*text, ""])


def _about(label: str, column: dict[str, Any]) -> str:
    of = column["machine"]
    versions = ", ".join(
        f"{name} {of[name]}" for name in VERSIONS if of.get(name, "none") != "none"
    )
    return (
        f"- **{label}**: commit {column['commit']}, {of['date']}; {of['cores']} cores, {of['cpu']};"
        f" Python {of['python']}, {versions}; load {', '.join(map(str, of['load']))}"
    )


def _rows(name: str, found: dict[str, Any]) -> list[str]:
    columns = {label: column["rows"].get(name, {}) for label, column in found.items()}
    columns = {label: rows for label, rows in columns.items() if rows}
    some = next(iter(next(iter(columns.values())).values()))
    peers = list(some["times_faster"])
    heads = [
        f"{label}: {what}"
        for label in columns
        for what in ("CPU ms", *(f"against {peer}" for peer in peers))
    ]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for contestant in dict.fromkeys(one for rows in columns.values() for one in rows):
        cells = []
        for rows in columns.values():
            numbers = rows.get(contestant)
            if numbers is None:
                cells += [""] * (1 + len(peers))
                continue
            memory = f", +{numbers['peak_mib']:,} MiB" if "peak_mib" in numbers else ""
            cells.append(_digits(numbers["cpu_ms"]) + memory)
            faster = numbers["times_faster"]
            cells += ["1" if peer == contestant else _ratio(faster[peer]) for peer in peers]
        lines.append(f"| {contestant} | " + " | ".join(cells) + " |")
    return lines


def _digits(milliseconds: float) -> str:
    """Write three digits at least: 0.512, 24.1, 24,100."""
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


if __name__ == "__main__":
    main()
