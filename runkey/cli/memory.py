"""`runkey memory`: what a training step takes, predicted; no GPU is needed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from runkey import paths
from runkey.cli.memory_text import as_dict, print_memory
from runkey.cli.output import AsJson, print_json
from runkey.cli.place import workspace
from runkey.errors import DataError, ParamsError

if TYPE_CHECKING:
    from runkey.memory.predict import Surroundings
    from runkey.params import Params

# Without data: as many objects and classes as COCO's crowded images have.
_OBJECTS = 60
_CLASSES = 80


def memory(
    changes: Annotated[
        list[str] | None,
        typer.Option("--set-param", "-S", help="NAME=VALUE instead of params.yaml's; repeatable."),
    ] = None,
    shape: Annotated[
        str, typer.Option(help="Padded HEIGHTxWIDTH of every batch; needs no prepared data.")
    ] = "",
    batch: Annotated[
        int, typer.Option(min=0, help="Images of a forward pass; 0: as many as fit the budget.")
    ] = 0,
    picture: Annotated[
        Path | None, typer.Option(help="Folder for timeline.png and timeline.svg.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the memory of a training step: by class, by module, on common GPUs."""
    from runkey.params import load_params, override

    root = workspace()
    params = override(load_params(root / paths.PARAMS), _parsed(changes or []))
    if batch > params.training.batch_size:
        params = override(params, {"training.batch_size": batch})
    # A prediction is the same with and without a GPU as long as torch sees none.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    around = _around(params, root, shape)
    # Seconds of import, and seconds of work.
    from runkey.memory.cards import shown_images
    from runkey.memory.predict import predict
    from runkey.one_step import lender

    prediction = predict(params, around, lambda other: lender(other, around.num_classes))
    budget = params.memory.budget_gib
    budget_gib = None if budget == "device" else budget
    images = batch or shown_images(prediction.model, budget_gib)
    if picture is not None:
        from runkey.plots.memory import draw_step

        draw_step(prediction, images, picture, budget_gib)
    if as_json:
        print_json(as_dict(prediction, images))
    else:
        print_memory(prediction, images)


def _parsed(changes: list[str]) -> dict[str, Any]:
    """NAME=VALUE by name; values are YAML 1.2, as in `dvc exp run -S`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not (name and equals):
            raise ParamsError(f"-S {change}: not NAME=VALUE, such as model.backbone=resnet101")
        try:
            values[name] = YAML(typ="safe", pure=True).load(text)
        except YAMLError:
            raise ParamsError(f"-S {change}: the value is not YAML") from None
    return values


def _around(params: Params, root: Path, shape: str) -> Surroundings:
    """The batches of the prepared data, or of one shape.

    Raises:
        DataError: there are no prepared data.
        ParamsError: the shape is none.
    """
    from runkey.memory.profile import prepared_surroundings, single_shape_surroundings

    if not shape:
        prepared = root / paths.PREPARED
        if not (prepared / "train.json").is_file():
            raise DataError(
                f"{prepared / 'train.json'}: not found; run `dvc repro prepare`, or name a shape: "
                "`runkey memory --shape 800x1333`"
            )
        return prepared_surroundings(params, prepared)
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
    if not found:
        raise ParamsError(f"--shape {shape}: not HEIGHTxWIDTH in pixels, such as 800x1333")
    size = int(found[1]), int(found[2])
    objects = min(_OBJECTS, params.model.num_queries)
    return single_shape_surroundings(params, size, objects=objects, num_classes=_CLASSES)
