"""`python -m stages.train`: train, keep the best weights, record the run; once per key."""

from __future__ import annotations

from runkey import paths
from runkey.errors import report_errors
from runkey.identity.key import make_recipe
from runkey.params import load_params
from runkey.pipeline.once import once
from runkey.progress import log_to_terminal
from runkey.training.ranks import is_follower, launched_by_torchrun, watch_leader


def main() -> None:
    """Write model/, run.json, logs/ and metrics/train.json."""
    log_to_terminal()
    root = paths.workspace()
    params = load_params(root / paths.PARAMS)
    if is_follower():
        watch = watch_leader()
        from runkey.pipeline.ranks import follow

        follow(params, root, watch)
        return
    recipe = make_recipe("train", root, params)
    with once(params, root, recipe) as turn:
        if turn is not None:
            # Here, for a result that is reused needs no torch, whose import takes longer than that.
            from runkey.pipeline.train import train

            train(params, root, recipe, turn)
        elif launched_by_torchrun():
            from runkey.pipeline.ranks import dismiss

            dismiss(params)


if __name__ == "__main__":
    with report_errors():
        main()
