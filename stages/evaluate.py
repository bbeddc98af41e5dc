"""Evaluate the trained model (COCO metrics): `python -m stages.evaluate`."""

from runkey import paths
from runkey.errors import report_errors
from runkey.identity.audit import watch_loader, watch_reads
from runkey.progress import log_to_terminal

if __name__ == "__mp_main__":  # a loader process
    watch_loader(paths.workspace(), "evaluate")
if __name__ == "__main__":
    with report_errors():
        log_to_terminal()
        root = paths.workspace()
        watch_reads(root, "evaluate")
        # Imported here: what modules read when they are imported is watched too.
        from runkey.pipeline.evaluate import evaluate

        evaluate(root)
