"""`runkey preset`, `params`, `key`, `sample-data`, `summary`, `weights`: the repository as it is.

`runkey env` compares what is installed with the lock, and exports the lock of a recorded run.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import textwrap
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, TypedDict

from pydantic import FiniteFloat
from typer import Argument, BadParameter, Option, Typer

from runkey import paths
from runkey.cli import output
from runkey.cli.output import AsJson, Key
from runkey.errors import DataError, ModelError, ParamsError, RecipeError, RegistryError
from runkey.files import FormatError, expect, read_json, write_atomically
from runkey.identity.initial_weights import link_weights
from runkey.identity.inputs import Inputs
from runkey.identity.key import FILE_PARAMS, NO_FILE, make_recipe, short_key
from runkey.identity.key import explain as lines_of
from runkey.progress import say
from runkey.registry.library import find_run
from runkey.units import counted, format_bytes, format_score, format_seconds

if TYPE_CHECKING:
    from runkey.params import Params
    from runkey.registry.environment import EnvironmentComparison

_SAMPLE_MAKER = Path(__file__).parents[2] / "sample-data" / "make_sample.py"
_HINTS = 2
_NOT_RECORDED = "(this run was not recorded in MLflow)"
_PLACES = (
    (paths.MODEL, "what `runkey predict model FOLDER` detects objects with"),
    (paths.PREPARED / "contact_sheet.jpg", "the data with its boxes"),
    (paths.PLOTS / "report.html", "all of it on one page, for a browser"),
    (paths.PLOTS / "best.jpg", "images that went well, truth beside prediction"),
    (paths.PLOTS / "worst.jpg", "images that went badly"),
    (paths.PLOTS, "curves and tables; `dvc plots show` makes a page of them"),
)


def preset(
    name: Annotated[
        str, Argument(help="Name of the preset; auto: chosen for data/; none: list them.")
    ] = "",
    force: Annotated[
        bool, Option("--force", help="Overwrite changes that are not committed.")
    ] = False,
    minutes: Annotated[
        float,
        Option("--minutes", min=0.5, max=1e6, help="With auto: time to train, on this machine."),
    ] = 10.0,
    to_stdout: Annotated[
        bool, Option("--print", help="Print the params.yaml instead of writing it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a preset as a complete params.yaml; without a name, list them.

    auto looks at the data and the machine, runs some training steps, and proposes a preset, the
    image size, the epochs for the time and more, each with its reason.
    """
    from runkey.params import render  # 0.3 s

    if not name:
        about = {known: _about(render.describe_preset(known)) for known in render.preset_files()}
        about[_AUTO] = "chosen for the data in data/ and for this machine (--minutes 10)"
        rows = (f"{known:<16} {text}" for known, text in about.items())
        output.print_answer(about, *rows, as_json=as_json)
        return
    # The repository's, or a new one in a folder with stages/.
    root = Path().resolve() if Path("stages").is_dir() else output.workspace()
    answer: dict[str, Any] = {"preset": name}
    lines: list[output.Line] = []
    if name == _AUTO:
        if math.isnan(minutes):
            raise BadParameter("nan is no number of minutes", param_hint="'--minutes'")
        # What is not committed is refused before the steps are run.
        _check_kept(root, None, force=force or to_stdout)
        new, more, lines = _propose(root, minutes)
        answer |= more
    else:
        new = render.render_preset(name)
    if to_stdout:
        say(new.rstrip("\n"))
        return
    written = _check_kept(root, new.encode(), force=force)
    if written:
        write_atomically(root / paths.PARAMS, new)
    now = " already"
    if written:
        now = "" if name == _AUTO else f": {_about(render.describe_preset(name))}"
    lines.append(f"params.yaml is preset {name}{now}")
    output.print_answer(answer | {"written": written}, *lines, as_json=as_json)


_AUTO = "auto"


def _check_kept(root: Path, new: bytes | None, *, force: bool) -> bool:
    """Return True if params.yaml is not `new`; ParamsError if changes in it would be lost."""
    target = root / paths.PARAMS
    old = target.read_bytes() if target.is_file() else None
    if old == new and old is not None:
        return False
    if old is not None and not force and not _is_kept(old, target):
        raise ParamsError(
            "params.yaml: has changes that are not committed; commit them, or use --force to"
            " overwrite them"
        )
    return True


def _propose(root: Path, minutes: float) -> tuple[str, dict[str, Any], list[output.Line]]:
    """Return a proposal's params.yaml, its values for JSON, and its reasons."""
    from runkey.params import load_params, render
    from runkey.pipeline.propose import propose
    from runkey.pipeline.survey import measure_speed, survey_data, survey_machine

    target = root / paths.PARAMS
    now = load_params(target if target.is_file() else render.preset_files()["sample"])
    facts = survey_data(root, now)  # its errors come before torch is imported
    found = propose(facts, survey_machine(root, now), now, minutes, measure_speed)
    width = max(len(subject) for subject, _ in found.reasons)
    lines: list[output.Line] = [(f"{s:<{width}}  ", reason) for s, reason in found.reasons]
    lines += [(f"{'but':<{width}}  ", warning) for warning in found.warnings]
    if missing := _missing_weights(found.params.model.backbone_weights):
        lines.append((f"{'next':<{width}}  ", missing))
    head = [f"# auto: {found.preset} for {minutes:g} minutes, by `runkey preset auto`.", "#"]
    for subject, reason in [*found.reasons, *(("but", warning) for warning in found.warnings)]:
        head += textwrap.wrap(
            f"{subject}: {reason}", 98, initial_indent="# ", subsequent_indent="#   ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    answer = {
        "from": found.preset,
        "changes": found.changes,
        "reasons": [{"subject": subject, "reason": reason} for subject, reason in found.reasons],
        "warnings": found.warnings,
    }
    return render.render(found.params, "\n".join(head)), answer, lines


def _missing_weights(name: str) -> str:
    """Say how to get published weights that are not here yet; empty if nothing is missing."""
    from runkey.identity.pinned_weights import find_pinned
    from runkey.registry.weights import is_here

    with suppress(LookupError):
        wanted = find_pinned(name)
        if not is_here(wanted, output.checkout()):
            return f"`make weights` gets {wanted.name} ({format_bytes(wanted.size or 0)})"
    return ""


def show(
    as_json: AsJson = False,
    markdown: Annotated[
        bool, Option("--markdown", help="Print the reference page of all parameters instead.")
    ] = False,
    check: Annotated[
        bool, Option("--check", help="Print nothing, but what would stop `dvc repro`.")
    ] = False,
) -> None:
    """Check params.yaml; print every value, defaults filled in."""
    if markdown:
        from runkey.params.render import reference

        say(reference().rstrip("\n"))
        return
    from runkey.model.backbones import check as check_body
    from runkey.params import load_params

    root = output.workspace()
    if check:
        _check(root)
        return
    params = load_params(root / paths.PARAMS)
    values = params.flat(runtime=True)
    check_body(params.model)
    _check_weights(params, root)
    lines = (f"{name} = {json.dumps(value)}" for name, value in values.items())
    output.print_answer(values, *lines, as_json=as_json)


def _check_weights(params: Params, root: Path) -> None:
    if any(value not in NO_FILE for n, value in params.flat().items() if n in FILE_PARAMS):
        from runkey.pipeline.initial_weights import check_initial_weights

        check_initial_weights(params, root)


def _check(root: Path) -> None:
    """Raise what would stop a later stage, whose outputs DVC removes before it runs."""
    from runkey.model.backbones import check as check_body
    from runkey.params import load_params

    try:
        params = load_params(root / paths.PARAMS)
        make_recipe("train", root, params)
        check_body(params.model)
        _check_weights(params, root)
        output.store()
        link_weights(params.flat(), root)
    except (ParamsError, RecipeError, ModelError) as error:
        way_out = ""
        if "DVC_EXP_NAME" in os.environ and root == output.checkout():
            way_out = (
                "; `dvc exp run -S` has written it into params.yaml: give another value with -S, or"
                " write one there"
            )
        raise type(error)(f"{error}{way_out}") from None


def _is_kept(text: bytes, target: Path) -> bool:
    """Return True if git's HEAD or a preset still has this params.yaml."""
    from runkey.params import render
    from runkey.registry.snapshot import git_bytes

    with suppress(RegistryError):
        if git_bytes(target.parent, "show", f"HEAD:./{paths.PARAMS}") == text:
            return True
    return any(render.render_preset(name).encode() == text for name in render.preset_files())


def _about(text: str) -> str:
    return textwrap.shorten(text, 78, placeholder=" ...")


def weights(
    names: Annotated[
        list[str] | None, Argument(help="Weights to download; none: list all that are known.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download published weights, checked by hash; without a name, list them."""
    from runkey.identity.pinned_weights import all_pinned, find_pinned
    from runkey.registry.weights import get_weights, is_here

    main = output.checkout()
    try:
        wanted = [find_pinned(name) for name in names or ()]
    except LookupError as error:
        raise RegistryError(f"runkey weights: {' '.join(names or ())}: {error.args[0]}") from None
    for row in wanted:
        get_weights(row, main)
    answer = [asdict(row) | {"is_here": is_here(row, main)} for row in wanted or all_pinned()]
    columns = ("weights", "MB", "licence", "file in .weights/")
    rows = [
        (
            str(row["name"]),
            f"{row['size'] / 1e6:.1f}" if row["size"] else "",
            str(row["licence"]),
            str(row["file"]) if row["is_here"] else "",
        )
        for row in answer
    ]
    if as_json:
        output.print_json(answer)
    else:
        output.print_table(columns, rows, right=("MB",), whole=columns)


def key(
    stage: Annotated[str, Argument(help="Stage of dvc.yaml.")] = "train",
    explain: Annotated[
        bool,
        Option("--explain", help="List every file, parameter, hash and package in it."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the key of a stage for the working tree; nothing needs to have run."""
    recipe = make_recipe(stage, output.workspace())
    lines = lines_of(recipe) if explain else [recipe.key]
    output.print_answer(recipe.as_dict(), *lines, as_json=as_json)


def sample_data(
    out: Annotated[
        Path | None, Argument(help="Target folder; default: data/ of the repository.")
    ] = None,
    force: Annotated[bool, Option("--force", help="Overwrite existing sample data.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw the sample data, numbered balls, from scikit-learn's digits and photos."""
    target = out or output.workspace() / "data"
    if not force and target.exists() and any(target.iterdir()):
        raise DataError(f"{target}: is not empty; name another folder, or use --force")
    if not _SAMPLE_MAKER.is_file():
        raise DataError(f"{_SAMPLE_MAKER}: not found; it is in runkey's repository, not in a wheel")
    counts = runpy.run_path(str(_SAMPLE_MAKER))["make_sample"](target)
    drawn = (
        f"{split}: {counted(images, 'image')}, {counted(balls, 'ball')}"
        for split, (images, balls) in counts.items()
    )
    about = f"written to {target}/; annotations are COCO's, LICENSE.txt names the authors"
    output.print_answer({"folder": str(target)}, *drawn, about, as_json=as_json)


def summary(as_json: AsJson = False) -> None:
    """Show the result of the last pipeline, and where to look next."""
    root = output.workspace()
    trained = _read(root, paths.METRICS / "train.json", _Trained)
    evaluated = _read(root, paths.METRICS / "evaluate.json", _Evaluated)
    run = _read(root, paths.RUN_JSON, _Run)
    if as_json:
        output.print_json({"key": run["key"], "run": run["run_id"]} | trained | evaluated)
        return
    ap, ap50, ap75 = (f"{n} {format_score(evaluated, n)}" for n in ("AP", "AP50", "AP75"))
    val = evaluated.get("val")
    split_name = "test" if evaluated.get("split") == "test" else "held-out"
    took = format_seconds(min(trained["seconds"], 1e9))
    key = short_key(str(run["key"]))
    rows = [
        ("result", f"{ap}   (COCO, on the {split_name} images)"),
        ("", f"{ap50}   {ap75}"),
        *([("on val", f"AP {format_score(val, 'AP')}")] if val else []),
        ("training", f"{took}, weights of epoch {trained['best_epoch']}"),
        ("key", f"{key}   (runkey show {key})"),
        *((str(place), text) for place, text in _PLACES if (root / place).exists()),
        ("make ui", "MLflow's pages on all runs" if run.get("run_id") else _NOT_RECORDED),
        *_next(root),
    ]
    if note := output.tree_note() or _data_note(root):
        rows.append(("but", note))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        output.print_beside(f"  {name:<{width}}  ", text)


def _data_note(root: Path) -> str:
    """Say which input of the stages is not what the key says; empty if all are."""
    from runkey.params import load_params

    try:
        params = load_params(root / paths.PARAMS)
        Inputs(root, params, make_recipe("train", root, params), output.store().home).check()
    except RecipeError as error:
        return str(error)
    return ""


def _next(root: Path) -> list[tuple[str, str]]:
    """Return what to try next: the changes of hints that still hold, and an experiment.

    The report shows what the hints are about.
    """
    from runkey.params import load_params
    from runkey.plots.hints import lasting_hints
    from runkey.plots.log import read_log

    log, params = root / paths.TRAIN_LOG, load_params(root / paths.PARAMS)
    hints = lasting_hints(read_log(log), params.flat(runtime=True)) if log.is_file() else []
    changes = [f"{hint.change}   (hint: {hint.kind})" for hint in hints[:_HINTS]]
    # On the sample the first gives AP +0.03 (docs/guide/schedules.md), and after it more steps do.
    longer = f"training.epochs={2 * params.training.epochs}"
    change = longer if params.schedule.name == "constant" else "schedule.name=constant"
    changes.append(f"dvc exp run -S {change}, then runkey list, make ui or dvc metrics diff")
    return list(zip(["try", *[""] * _HINTS], changes, strict=False))


class _Trained(TypedDict):
    seconds: FiniteFloat
    best_epoch: int


class _Scores(TypedDict):
    AP: float | None
    AP_low: NotRequired[float | None]
    AP_high: NotRequired[float | None]
    AP50: float | None
    AP50_low: NotRequired[float | None]
    AP50_high: NotRequired[float | None]
    AP75: float | None


class _Evaluated(_Scores):
    split: NotRequired[Literal["val", "test"]]
    val: NotRequired[_Scores]


class _Run(TypedDict):
    key: str
    run_id: str | None


def _read(root: Path, name: Path, form: Any) -> dict[str, Any]:
    """Read a result of the pipeline; what `form` does not name is left as it is."""
    try:
        content: dict[str, Any] = read_json(root / name, dict[str, Any])
        content |= expect(form, content)
    except FileNotFoundError:
        raise DataError(f"{name}: not found; `make repro` makes it") from None
    except FormatError as error:
        raise DataError(f"{name}: {error}; `dvc checkout {name}` restores it") from None
    return content


env = Typer(help="Compare what is installed with the lock; get a run's lock.")


@env.command()
def check(as_json: AsJson = False) -> None:
    """Compare what is installed with what is locked.

    In a conda environment all packages with their builds against conda-lock.yml, else Python
    packages, and the CUDA that torch is built for, against requirements.txt. Exit code 3 if a
    package is missing or of another version or build; those that are not locked are listed and
    are no fault.
    """
    from runkey.registry.environment import compare_environment

    found = compare_environment(output.workspace())
    output.print_answer(found.as_dict(), *_env_lines(found), as_json=as_json, yes=found.agrees)


@env.command()
def export(
    key: Key,
    to: Annotated[
        Path | None,
        Option("--to", help="Folder to write to; else one named as the key is."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's conda-lock.yml and requirements.txt, from its snapshot."""
    from runkey.registry.environment import export_environment

    record = find_run(output.library(), key)
    target = to or Path(f"{record.label}-environment")
    lock, requirements = export_environment(output.workspace(), record, target)
    output.print_answer(
        {"key": record.key, "files": [str(lock), str(requirements)]},
        ("", f"the environment of {record.label}: {lock}, {requirements}"),
        ("with conda: ", f"conda-lock install --name {record.label} {lock}"),
        ("without: ", f"uv venv --python 3.12 ENV; uv pip sync --python ENV {requirements}"),
        as_json=as_json,
    )


def _env_lines(found: EnvironmentComparison) -> list[str]:
    patch = "" if found.python == found.locked_python else f" (the lock has {found.locked_python})"
    torch = f"torch for CUDA {found.cuda}" if found.cuda else "torch for the CPU"
    lines = [
        f"{found.environment} against {found.against}",
        f"Python {found.python}{patch}, {torch}",
        f"{found.same} as locked, {len(found.missing)} missing, {len(found.other)} of another"
        f" version, {len(found.extra)} extra",
    ]
    lines += [f"  missing  {d.name} {d.locked}" for d in found.missing]
    lines += [
        f"  other    {d.name}: locked {d.locked}, installed {d.installed}" for d in found.other
    ]
    lines += [f"  extra    {d.name} {d.installed}" for d in found.extra]
    if not found.agrees:
        lines.append(f"to mend it: {found.way_out}")
    return lines
