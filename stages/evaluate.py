"""Evaluate the trained model (COCO metrics): `python -m stages.evaluate`."""

from runkey import paths
from runkey.errors import report_errors
from runkey.identity.audit import watch_loader, watch_reads
from runkey.pipeline.evaluate import evaluate
from runkey.progress import log_to_terminal

if __name__ == "__mp_main__":  # a loader process
    watch_loader(paths.workspace(), "evaluate")
if __name__ == "__main__":
    with report_errors():
        log_to_terminal()
        root = paths.workspace()
        watch_reads(root, "evaluate")
        evaluate(root)
