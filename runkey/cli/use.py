"""`runkey predict`, `export-model`, `speed` and `promote`: the commands that use a model."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from runkey.cli import output
from runkey.cli.output import AsJson, Key
from runkey.errors import DataError, RegistryError, RunkeyError
from runkey.identity.key import ANY_SCHEMA, short_key
from runkey.progress import say
from runkey.registry.library import find_run, run_reader
from runkey.units import counted, format_seconds

if TYPE_CHECKING:
    from runkey.inference.predict import Summary

_SHOWN = 10
"""Skipped files that are named on the screen."""
_PARTS = {
    "json": "predictions.json",
    "results": "results.json",
    "csv": "predictions.csv",
    "yolo": "yolo/",
    "voc": "voc/",
    "labelme": "labelme/",
    "cvat": "cvat.xml",
    "images": "images/",
    "sheet": "sheet.jpg",
    "frames": "frames/",
}


_Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="Key of a run, folder (model/ or an export), exported file, models:/NAME@ALIAS.",
    ),
]
_SavedModel = Annotated[
    str, Argument(metavar="MODEL", help="Key of a run, folder model/, or what `get` wrote.")
]
_Sources = Annotated[
    list[str],
    Argument(
        metavar="SOURCES",
        help="Images, folders (with all below), globs, videos; - for a list on stdin.",
    ),
]
_Write = Annotated[
    str,
    Option(
        "--write",
        help="Of json, csv, images (drawn), sheet, yolo, voc, labelme, cvat, frames (of videos),"
        " results (COCO's, with --coco).",
    ),
]
_Score = Annotated[
    str,
    Option(
        "--score",
        help="Least score: a number, ball=0.4,cube=0.6 (others: auto), or auto: each class's score"
        " of best F1 on the run's val images.",
    ),
]
_Nms = Annotated[
    float | None,
    Option("--nms", help="Drop a box that overlaps a better one of its class by more (IoU)."),
]
_Tile = Annotated[
    str | None,
    Option(
        "--tile",
        help="For small objects in large images: tiles of that width in the image's pixels, or"
        " WIDTHxHEIGHT.",
    ),
]
_Overlap = Annotated[
    float, Option("--overlap", help="Of neighbouring tiles, as a fraction of their side.")
]
_Every = Annotated[int, Option("--every", min=1, help="Take each N-th frame of a video.")]
_Coco = Annotated[
    Path | None, Option("--coco", help="COCO file whose image ids are used.", dir_okay=False)
]
_Workers = Annotated[
    int | None, Option("--workers", min=0, max=256, help="Threads that decode and draw [cores].")
]
_Device = Annotated[
    str | None, Option("--device", help="cpu, cuda, cuda:1 [the GPU, if there is one].")
]
_Urls = Annotated[bool, Option("--allow-urls", help="Fetch sources that are http addresses.")]
_Images = Annotated[
    list[Path] | None,
    Option(
        "--images",
        help="Image or folder of images to compare on, instead of the run's val images; repeat it"
        " for several. fp32 only.",
    ),
]
_Trust = Annotated[
    bool, Option("--trust", help="Load a torch export, which can execute code that is in it.")
]


def predict(
    model: _Model,
    sources: _Sources,
    out: Annotated[Path, Option("--out", help="Folder to write.")] = Path("predictions"),
    write: _Write = "json,csv,images,sheet",
    score: _Score = "auto",
    nms: _Nms = None,
    tile: _Tile = None,
    overlap: _Overlap = 0.2,
    every: _Every = 1,
    coco: _Coco = None,
    batch_size: Annotated[int, Option("--batch-size", min=1, help="Images at once.")] = 8,
    workers: _Workers = None,
    device: _Device = None,
    allow_urls: _Urls = False,
    trust: _Trust = False,
    as_json: AsJson = False,
) -> None:
    """Detect objects in images and videos; write lists, labels and drawn images.

    Files that cannot be read are named, listed in OUT/skipped.csv, and the exit code is 3; it is 0
    if all were read, 1 after an error. Ctrl-C keeps what was written. OUT must be new or empty, or
    hold the files of an earlier predict, which are replaced.
    """
    from runkey.inference.options import Options, as_utf8, parse_score
    from runkey.inference.sources import find_sources
    from runkey.inference.tile import parse_tiling
    from runkey.pipeline.find_model import find_model

    options = Options(
        score=parse_score(score),
        nms=nms,
        tiling=parse_tiling(tile, overlap, 3, 4) if tile else None,
        batch_size=batch_size,
        workers=workers,
        every=every,
        kinds=[kind.strip() for kind in write.split(",") if kind.strip()],
        coco=coco,
        about={"model": as_utf8(model), "sources": list(map(as_utf8, sources))},
    )
    found = find_sources(sources, out=out, allow_urls=allow_urls, listed=sys.stdin)
    found.check()
    folder = find_model(model)
    # torch takes seconds to import: from here on, what was asked for is known to be right.
    from runkey.inference.model import load_model_folder
    from runkey.inference.predict import predict as predict_all

    loaded = load_model_folder(folder, device, trust=trust)
    if tile:
        sizes = loaded.card.sizes
        tiling = parse_tiling(tile, overlap, sizes.short_side, sizes.long_side)
        options = replace(options, tiling=tiling)
    summary = predict_all(loaded, found, out, options)
    if as_json and summary.images:
        output.print_json(_answer(summary))
    elif summary.images:
        _say_summary(summary, found.others)
    _finish(summary, found.base)


def _answer(summary: Summary) -> dict[str, Any]:
    return {
        "folder": str(summary.folder),
        "images": summary.images,
        "detections": dict(summary.objects),
        "skipped": [{"file": one.name, "reason": one.reason} for one in summary.skipped],
        "first_of_several": summary.first_of_several,
        "seconds": round(summary.seconds, 2),
    }


def _say_summary(summary: Summary, others: int) -> None:
    """Print what was done, and where it lies."""
    if summary.was_there:
        say(f"{summary.folder}/ held earlier predictions: files of the same name are replaced")
    if others:
        what = "that is neither an image nor a video"
        if others > 1:
            what = "that are neither images nor videos"
        say(f"left out: {counted(f'{others:,}', 'file')} {what}")
    if several := summary.first_of_several:
        what = "an animation or a file of several pages; its first image is taken"
        if len(several) > 1:
            what = f"and {len(several) - 1:,} more: animations or files of several pages; the first"
            what += " image of each is taken"
        say(f"{several[0]}: {what}" if len(several) == 1 else f"{several[0]} {what}")
    speed = summary.images / max(summary.seconds, 1e-9)
    total = summary.objects.total()
    line = f"{counted(f'{summary.images:,}', 'image')}, {counted(f'{total:,}', 'detection')}"
    say(f"{line} in {format_seconds(summary.seconds)} ({speed:.3g} images/s)")
    classes = [f"{name} {count:,}" for name, count in summary.objects.most_common(8)]
    more = len(summary.objects) - len(classes)
    if classes:
        output.print_beside(
            "  ", ", ".join(classes) + (f" and {more} more classes" if more else "")
        )
    parts = ", ".join(_PARTS[kind] for kind in summary.kinds if kind != "frames")
    output.print_beside(f"{summary.folder}/  ", parts)


def _finish(summary: Summary, base: Path) -> None:
    """Name the files that were skipped, and set the exit code."""
    for one in summary.skipped[:_SHOWN]:
        say(f"skipped {one.name}: {one.reason}", stderr=True)
    count, listed = len(summary.skipped), f"{summary.folder}/skipped.csv"
    more = f"; {count - _SHOWN:,} more are not shown" if count > _SHOWN else ""
    if count:
        say(f"skipped {counted(f'{count:,}', 'file')}{more}: {listed}", stderr=True)
    if not summary.images:
        raise DataError(f"{base}: nothing could be read; {listed} says why")
    if count:
        output.answer_no()


def export_model(
    model: _SavedModel,
    export: Annotated[
        Literal["onnx", "torch", "openvino"],
        Option("--format", help="torch: a program of torch.export (.pt2)."),
    ] = "onnx",
    precision: Annotated[
        Literal["fp32", "bf16", "int8"], Option("--precision", help="Number format.")
    ] = "fp32",
    out: Annotated[Path | None, Option("--out", help="Folder to make [FORMAT-PRECISION].")] = None,
    images: _Images = None,
    limit: Annotated[
        int | None, Option("--limit", min=1, help="Compare on so many of the val images.")
    ] = None,
    max_ap_loss: Annotated[
        float | None,
        Option(
            "--max-ap-loss",
            min=0,
            help="Take the fastest choice of `runkey speed` that loses at most so many points of"
            " AP, in place of --format and --precision.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model that runs without this project: ONNX, torch or OpenVINO.

    The folder holds the model, card.json, detect.py and parity.json. Before it is called done the
    export is compared with the model on the run's val images: in fp32 scores must agree within 1e-5
    and AP to three digits; bf16 and int8 may lose 0.2 points of AP. One that does not pass is left
    under OUT.refused, exit code 3. The result is recorded on the run.
    """
    from runkey.inference.sources import find_sources
    from runkey.pipeline.export import ExportChoice, describe, export_model
    from runkey.pipeline.find_model import find_model

    folder, choice = find_model(model), ExportChoice(export, precision)
    if max_ap_loss is not None:
        from runkey.pipeline.speed import fastest_export

        choice, name = fastest_export(folder, max_ap_loss)
        lost = counted(f"{max_ap_loss:g}", "point")
        say(f"{name}: the fastest of `runkey speed` that loses at most {lost}")
    found = find_sources(map(str, images)).sources if images else []
    done = export_model(
        folder,
        out or Path(choice.name),
        choice,
        store=_or_none(output.store),
        root=_or_none(output.workspace),
        images=[Path(one.place) for one in found if not one.is_video],
        limit=limit,
    )
    answer = {"folder": str(done.folder), "bytes": done.size, "recorded": done.recorded}
    parity = asdict(done.parity) | {"text": done.parity.text}
    output.print_answer(
        answer | {"parity": parity}, *describe(done), as_json=as_json, yes=done.parity.passed
    )


def speed(
    model: _SavedModel,
    max_ap_loss: Annotated[
        float, Option("--max-ap-loss", min=0, help="Points of AP that a choice may lose.")
    ] = 0.2,
    limit: Annotated[
        int, Option("--limit", min=0, help="Measure AP on so many of the val images; 0: all.")
    ] = 500,
    batch: Annotated[int, Option("--batch", min=1, help="Images of a timed forward pass.")] = 1,
    threads: Annotated[int, Option("--threads", min=1, help="Cores that each way uses.")] = 1,
    seconds: Annotated[
        float, Option("--seconds", min=0, help="Wall time to spend on timing.")
    ] = 60.0,
    runtimes: Annotated[
        str | None,
        Option(
            "--runtimes",
            help="Of torch, compiled (torch.compile; minutes), onnx, openvino, tensorrt (GPU)"
            " [a CPU: torch,onnx,openvino; a GPU: torch,compiled,onnx,tensorrt].",
        ),
    ] = None,
    device: _Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure AP and time of each way to run a model: runtime, number format, layers.

    Nothing is trained. Networks run in turn, and medians of their times are compared. The table,
    speed.json and a picture go into speed/ beside the model, and to its run.
    """
    from runkey.pipeline import speed as measuring
    from runkey.pipeline.find_model import find_model

    folder = find_model(model)
    options = measuring.SpeedOptions(
        limit=limit or None,
        batch=batch,
        threads=threads,
        seconds=seconds,
        runtimes=measuring.parse_runtimes(runtimes),
    )
    report = measuring.measure_speed(folder, _or_none(output.workspace), options, device)
    recorded = measuring.save_speed(report, folder, _or_none(output.store))
    if as_json:
        output.print_json(measuring.as_dict(report, max_ap_loss) | {"recorded": recorded})
        return
    columns, rows = measuring.table(report)
    output.print_table(columns, rows, right=columns[1:], whole=columns[1:])
    for line in [*measuring.describe(report, model, max_ap_loss), recorded]:
        output.print_beside("", line)


def _or_none[T](ask: Callable[[], T]) -> T | None:
    """What there is of the repository; None outside of one."""
    try:
        return ask()
    except RunkeyError:
        return None


_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)
_CLAIM = re.compile(rf"{ANY_SCHEMA}-[0-9a-f]{{64}}")
"""Registered models of such names are claims, see `runkey.registry.claims`."""


def promote(
    key: Key,
    alias: Annotated[
        str, Option("--alias", help="Name for the version, such as production or staging.")
    ] = "production",
    name: Annotated[
        str | None, Option("--name", help="Of the registered model [that of the experiment].")
    ] = None,
    remove: Annotated[bool, Option("--remove", help="Take the alias away from the run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Register a run's model in MLflow, and point an alias at its version.

    `models:/NAME@ALIAS` then names it in MLflow, in `runkey.load` and in `runkey predict`.
    """
    from runkey.tracking.logged_model import promote as promote_run
    from runkey.tracking.logged_model import withdraw

    for text, flag in ((alias, "--alias"), (name or "-", "--name")):
        if not _NAME.fullmatch(text) or _CLAIM.match(text):
            raise RegistryError(
                f"{flag} {text}: letters, digits, `_`, `-` and `.` only, and no key"
            )
    record = find_run(output.library(), key)
    done = (withdraw if remove else promote_run)(output.store(), record, alias, name)
    address = f"models:/{done.name}@{done.alias}"
    label = f"{record.label}: {done.name} version {done.version}"
    lines = [f"{label} is {address}"]
    if remove:
        lines = [f"{label} is no longer {address}"]
    elif done.before:
        lines.append(f"before: version {done.before[0]}, {_label_of(done.before[1])}")
    answer = {
        **{"key": record.key, "run": done.run_id, "name": done.name, "version": done.version},
        **{"alias": None if remove else done.alias, "address": address, "before": done.before},
    }
    output.print_answer(answer, *lines, as_json=as_json)


def _label_of(run_id: str) -> str:
    """The key of an MLflow run, for messages."""
    read = run_reader(output.store().full_uri)
    run = read(run_id) if read else None
    return short_key(run.key) if run else f"run {run_id[:8]}"
