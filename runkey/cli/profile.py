"""`runkey profile`: where the time of a training step goes, and what would make it faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from runkey import paths
from runkey.cli import output
from runkey.cli.memory import Changes, parse_changes
from runkey.cli.output import AsJson
from runkey.progress import say
from runkey.units import counted

if TYPE_CHECKING:
    from runkey.pipeline.profile_step import Part, StepProfile


def profile(
    steps: Annotated[
        int, Option(min=1, help="Steps to time, and as many again under torch's profiler.")
    ] = 20,
    trace: Annotated[
        Path | None,
        Option(help="Also write a JSON trace, for https://ui.perfetto.dev or chrome://tracing."),
    ] = None,
    changes: Changes = None,
    as_json: AsJson = False,
) -> None:
    """Run some training steps on the prepared data; show where their time goes.

    The steps are those of a training with params.yaml, five to warm up and one to count
    arithmetic beside those asked for. It keeps no weights and no run. `dvc repro prepare`
    must have run.
    """
    from runkey.params import load_params, override

    root = output.workspace()
    params = override(load_params(root / paths.PARAMS), parse_changes(changes or []))
    from runkey.pipeline.profile_step import find_verdict, profile_steps

    found = profile_steps(params, root, steps=steps, trace=trace)
    hint = find_verdict(found, params)
    if as_json:
        output.print_json(asdict(found) | {"verdict": asdict(hint)})
        return
    _print(found)
    if trace is not None:
        say("", f"the trace: {trace}; open it at https://ui.perfetto.dev")
    say("")
    output.print_beside("verdict: ", f"{hint.seen}; {hint.change}")


def _print(found: StepProfile) -> None:
    on_gpu = found.gpu_busy is not None
    passes = f"in {found.passes:.3g} forward passes" if found.passes > 1 else "in one forward pass"
    threads = "" if on_gpu else f", {counted(found.threads, 'thread')}"
    say(
        f"A training step of {found.images:.3g} images, {passes}, takes {_ms(found.seconds)} ms:"
        f" {found.images / found.seconds:.3g} images/s.",
        f"{found.device}{threads}, {found.precision}; the mean of"
        f" {counted(found.steps, 'step')} after warming up",
        "",
    )
    columns = ["", "ms", "share", "CPU ms", *(["GPU ms"] if on_gpu else []), "arithmetic", "memory"]
    rows = [_row(one, found) for one in _with_sums(found)]
    output.print_table(columns, rows, right=columns[1:])
    say("")
    for label, text in _legend(found).items():
        output.print_beside(f"{label:<12}", text)
    if on_gpu:
        say(
            "",
            f"The GPU is busy {found.gpu_busy:.0%} of the time. The training process waits for it"
            f" {found.syncs:.3g} times a step, {_ms(found.sync_seconds or 0)} ms altogether.",
        )


def _legend(found: StepProfile) -> dict[str, str]:
    return {
        "ms": "wall time of the training process",
        "CPU ms": "time of all its threads; processes that load images are not included",
        "backward": "divided as under torch's profiler, with which a step takes"
        f" {_ms(found.profiled_seconds)} ms",
        "arithmetic": "matrix products, convolutions and attention, over the part's"
        f" {'CPU' if found.gpu_busy is None else 'GPU'} ms; the percentage is of the"
        f" {found.peak_flops / 1e9:,.0f} GFLOP/s that a large matrix product reaches here",
        "memory": "what all operators read and write; the percentage is of the"
        f" {found.peak_bytes / 1e9:,.1f} GB/s that a large copy reaches here, more if caches help",
    }


def _with_sums(found: StepProfile) -> Iterator[Part]:
    """Yield the parts, each pass after its sum, and the sum of all at the end."""
    from runkey.pipeline.profile_step import total

    before = ""
    for part in found.parts:
        if part.of and part.of != before:
            yield total(part.of, [one for one in found.parts if one.of == part.of])
        before = part.of
        yield part
    yield total("a step", found.parts)


def _row(part: Part, found: StepProfile) -> list[str]:
    cells = [f"  {part.name}" if part.of else part.name, _ms(part.seconds)]
    cells += [f"{part.seconds / found.seconds:.0%}", _ms(part.cpu_seconds)]
    if found.gpu_busy is not None:
        cells.append(_ms(part.gpu_seconds))
    seconds = part.busy_seconds
    rates = [(part.flops, found.peak_flops, "GFLOP/s"), (part.bytes, found.peak_bytes, "GB/s")]
    for amount, peak, unit in rates:
        rate = amount / seconds if seconds else 0.0
        cells.append(f"{rate / 1e9:,.3g} {unit} {rate / peak:4.0%}" if amount and seconds else "")
    return cells


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:,.1f}"
