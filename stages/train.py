"""Train once per key, keep the best weights, record the run: `python -m stages.train`."""

from runkey import paths
from runkey.errors import report_errors
from runkey.identity.audit import watch_loader, watch_reads
from runkey.identity.key import make_recipe
from runkey.params import load_params
from runkey.pipeline.once import once
from runkey.progress import log_to_terminal
from runkey.training.ranks import is_follower, launched_by_torchrun, monitor_leader


def main() -> None:
    """Write model/, run.json, logs/ and metrics/train.json."""
    root = paths.workspace()
    watch_reads(root, "train")
    params = load_params(root / paths.PARAMS)
    if is_follower():
        monitor = monitor_leader()
        from runkey.pipeline.train import follow

        follow(params, root, monitor)
        return
    log_to_terminal()
    recipe = make_recipe("train", root, params)
    with once(params, root, recipe) as claim:
        if claim is None and not launched_by_torchrun():
            return
        # Imported here: a reused result needs no torch, whose import takes longer than that.
        from runkey.pipeline.train import train

        train(params, root, recipe, claim)


if __name__ == "__mp_main__":  # a loader process
    watch_loader(paths.workspace(), "train")
if __name__ == "__main__":
    with report_errors():
        main()
