"""Tensors of one state dict into a detector of perhaps other classes, queries or preset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from runkey.errors import ModelError
from runkey.model.coco_names import NUM_COCO_IDS, coco_names
from runkey.model.detector import Detector

# Tensors with a row per class, and with a row per query.
_CLASS_ROWS = ("class_embed.weight", "class_embed.bias", "label_embed.weight")
_QUERY_ROWS = ("query_embed.weight", "query_content.weight")
# Where the two presets compute the same thing under the same name.
_COMMON = ("backbone.", "transformer.encoder.")


@dataclass(frozen=True, slots=True)
class Source:
    """Weights to start from."""

    name: str
    """How messages call it."""
    state: dict[str, Tensor]
    class_names: list[str] | None
    """Classes 0..K-1 of its heads, where it says."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Where every tensor of a detector comes from."""

    source: str
    loaded: tuple[str, ...]
    """Names taken over, with how many rows where not all were."""
    dropped: tuple[str, ...]
    """Names of the source that found no place, and why."""
    new: tuple[str, ...]
    """Names that keep their random start."""
    warnings: tuple[str, ...] = ()
    """Settings that train badly without saying so."""

    def lines(self) -> list[str]:
        """The report for people: counts by part of the model, drops in full, warnings."""
        lines = [f"initial weights: {self.source}"]
        if self.loaded:
            lines.append(f"  loaded {len(self.loaded)}: {_by_part(self.loaded)}")
            lines += [f"    {entry}" for entry in self.loaded if " " in entry]
        if self.dropped:
            lines.append(f"  dropped {len(self.dropped)}: {_by_part(self.dropped)}")
            lines += [f"    {entry}" for entry in self.dropped[:_MOST_DROPS]]
            if len(self.dropped) > _MOST_DROPS:
                lines.append(f"    and {len(self.dropped) - _MOST_DROPS} more")
        # Of a model that starts from nothing, the parts that are new are all there are.
        if self.new and (self.loaded or self.dropped):
            lines.append(f"  new {len(self.new)}: {_by_part(self.new)}")
        return lines + [f"  warning: {warning}" for warning in self.warnings]


_MOST_DROPS = 12


def transfer(
    detector: Detector, source: Source, class_names: Sequence[str], warnings: tuple[str, ...]
) -> LoadReport:
    """Copy what fits into `detector`, in place.

    Args:
        detector: with its random start, which is kept where nothing fits.
        source: the weights.
        class_names: the detector's classes 0..K-1.
        warnings: passed on to the report.

    Returns:
        The report.

    Raises:
        ModelError: nothing fits.
    """
    target = detector.state_dict()  # the parameters themselves, so copying into them is loading
    theirs = _theirs(source, "proposal_head.class_embed.weight" in target)
    loaded, dropped, new = [], list(theirs.refused), []
    for name, ours in target.items():
        if name.endswith("num_batches_tracked"):
            continue
        found = theirs.state.get(name)
        note = None if found is None else _copy(name, ours, found, theirs.class_names, class_names)
        if found is None or note is None:
            new.append(name)
            if found is not None:
                dropped.append(f"{name}: {_why(name, ours, found, theirs.class_names)}")
        else:
            loaded.append(f"{name}{note}")
    dropped += [
        f"{name}: this model has none"
        for name in theirs.state
        if name not in target and not name.endswith("num_batches_tracked")
    ]
    if not loaded:
        raise ModelError(
            f"{source.name}: none of its {len(source.state)} tensors fits this model"
            f" (its first is {next(iter(source.state))}, ours {next(iter(target))})"
        )
    return LoadReport(source.name, tuple(loaded), tuple(dropped), tuple(new), warnings)


@dataclass(frozen=True, slots=True)
class _Theirs:
    state: dict[str, Tensor]
    class_names: list[str] | None
    refused: tuple[str, ...]


def _theirs(source: Source, target_is_fast: bool) -> _Theirs:
    """What of the source means the same in this preset, and what its classes are called."""
    state, refused = source.state, []
    is_fast = any(name.startswith("proposal_head.") for name in state)
    is_detector = any(name.startswith("class_embed.") for name in state)
    if is_detector and is_fast != target_is_fast:
        reason = f"preset {'fast' if is_fast else 'detr'} computes something else with it"
        refused = [f"{name}: {reason}" for name in state if not name.startswith(_COMMON)]
        state = {name: tensor for name, tensor in state.items() if name.startswith(_COMMON)}
    names = source.class_names
    head = source.state.get("class_embed.weight")
    if names is None and head is not None and not is_fast and len(head) == NUM_COCO_IDS + 1:
        names = coco_names()
    return _Theirs(state, names, tuple(refused))


def _copy(
    name: str, ours: Tensor, found: Tensor, their_names: Sequence[str] | None, names: Sequence[str]
) -> str | None:
    """Copy `found` into `ours` as far as it fits; a note on rows, "" for all, None for nothing."""
    if name.endswith(_CLASS_ROWS):
        return _copy_classes(ours, found, their_names, names)
    if name.endswith(_QUERY_ROWS) and ours.shape[1:] == found.shape[1:]:
        rows = min(len(ours), len(found))
        ours[:rows] = found[:rows]
        return "" if len(ours) == len(found) else f" (queries 1 to {rows} of {len(ours)})"
    if ours.shape != found.shape:
        return None
    ours.copy_(found)
    return ""


def _copy_classes(
    ours: Tensor, found: Tensor, their_names: Sequence[str] | None, names: Sequence[str]
) -> str | None:
    """Rows of classes that both name, and no-object's, which is the last of a softmax head."""
    if their_names is None or ours.shape[1:] != found.shape[1:]:
        return None
    extra = len(found) - len(their_names)
    if extra not in (0, 1) or len(ours) - len(names) != extra:
        return None
    rows = {_plain(name): row for row, name in enumerate(their_names) if name}
    common = [(row, rows[_plain(name)]) for row, name in enumerate(names) if _plain(name) in rows]
    for row, their_row in common:
        ours[row] = found[their_row]
    if extra:
        ours[-1] = found[-1]
    if not common and not extra:
        return None
    if len(common) == len(names) == len(their_names):
        return ""
    missing = [name for name in names if _plain(name) not in rows]
    also = " and no-object" if extra else ""
    note = f" ({len(common)} of {len(names)} classes{also}"
    return f"{note}; new: {', '.join(missing)})" if missing else f"{note})"


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


def _why(name: str, ours: Tensor, found: Tensor, their_names: Sequence[str] | None) -> str:
    """Why a tensor of the right name was not taken."""
    if name.endswith(_CLASS_ROWS) and ours.shape[1:] == found.shape[1:]:
        return "it does not say its classes" if their_names is None else "no class in common"
    return f"shape {list(found.shape)}, here {list(ours.shape)}"


def _by_part(names: Sequence[str]) -> str:
    """`backbone 120, transformer 60, class_embed 2`."""
    parts = Counter(name.split(".", 1)[0] for name in names)
    return ", ".join(f"{part} {count}" for part, count in parts.items())
