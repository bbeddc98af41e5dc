"""Where a trial fits: upper bounds of its memory, from the memory.json of its pipeline."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from runkey import paths
from runkey.files import FormatError, read_text
from runkey.hashing import canonical_json
from runkey.identity.dvc_yaml import read_pipeline
from runkey.memory.choose import plan_memory
from runkey.memory.measure import CALIBRATION, memory_budget
from runkey.memory.predict import MODEL
from runkey.memory.trace.gpu import Gpu
from runkey.params import Params
from runkey.params.load import parse_yaml
from runkey.registry.snapshot import git
from runkey.sweep.trial import Place
from runkey.training.device import choose_device

_STAGE = "profile_memory"


class Placement:
    """Memory of trainings on this machine's device; those of the same model and batch share it."""

    def __init__(self, place: Place, params: Params) -> None:
        """Read the device that the parameters name."""
        self._place, self._prefix = place, git(place.root, "rev-parse", "--show-prefix")
        self._device, _ = choose_device(params.runtime.device)
        self._outside = 0
        if self._device.type == "cuda":
            self._outside = Gpu(torch.cuda.get_device_capability(self._device)).context_bytes
        self.devices = self._budgets()
        """What all trials may take together on each device, by its name in CUDA_VISIBLE_DEVICES."""
        self._bounds: dict[str, int] = {}

        cores, threads = len(os.sched_getaffinity(0)), params.training.cpu_threads
        at_once = cores // threads if isinstance(threads, int) else 1
        self.jobs = cores if self._device.type == "cuda" else max(1, at_once)
        """Trainings that the cores are enough for."""

    def _budgets(self) -> dict[str, int]:
        count = torch.cuda.device_count() if self._device.type == "cuda" else 1
        if count == 1:
            return {"": memory_budget("device", self._device, 0).bytes}
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = named.split(",") if named else map(str, range(count))
        devices = (torch.device("cuda", index) for index in range(count))
        return {n: memory_budget("device", d, 0).bytes for n, d in zip(names, devices, strict=True)}

    def bound(self, params: Params, key: str) -> int | None:
        """Return the most bytes that a training takes on the device; None: not predicted yet.

        That is read from the checkout's memory.json if it is of these parameters, else from that of
        the trial's own worktree.

        Raises:
            StoppedError: not even one image fits; names the parameters that would make it fit.
        """
        group = canonical_json(self._group(params))
        if group not in self._bounds:
            trees = (self._place.root, self._place.folder(key) / "tree" / self._prefix)
            tree = next((one for one in trees if is_of(one, params)), None)
            if tree is None:
                return None
            trials = self._place.store.home / CALIBRATION
            plan = plan_memory(params, tree / paths.MEMORY, self._device, trials=trials)
            self._bounds[group] = plan.needed_bytes + self._outside
        return self._bounds[group]

    def _group(self, params: Params) -> dict[str, object]:
        """Return the values that the memory of a step depends on."""
        flat = params.flat()
        stages = read_pipeline(self._place.root, flat)
        names = {*stages[_STAGE].params, *stages["prepare"].params, "training"}
        return {n: v for n, v in flat.items() if n in names or n.split(".")[0] in names}


def is_of(folder: Path, params: Params) -> bool:
    """Return True if the memory.json of a workspace was made with these parameters."""
    if not (folder / paths.MEMORY / MODEL).is_file():
        return False
    try:
        stages = parse_yaml(read_text(folder / "dvc.lock"))["stages"]
        locked = stages[_STAGE]["params"][paths.PARAMS.name] | {}
        locked |= stages["prepare"]["params"][paths.PARAMS.name]
    except (FileNotFoundError, FormatError, KeyError, TypeError):
        return False
    return all(_at(params, n) == _without_budget(value) for n, value in locked.items())


def _at(params: Params, name: str) -> object:
    value: object = params.written()
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return _without_budget(value)


def _without_budget(section: object) -> object:
    """Leave out `memory.budget_gib`, which the prediction is compared with."""
    if isinstance(section, dict):
        return {name: value for name, value in section.items() if name != "budget_gib"}
    return section
