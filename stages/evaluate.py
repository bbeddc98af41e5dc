"""Evaluate the trained model (COCO metrics): `python -m stages.evaluate`."""

from runkey import paths
from runkey.errors import report_errors
from runkey.pipeline.evaluate import evaluate
from runkey.progress import log_to_terminal

if __name__ == "__main__":
    with report_errors():
        log_to_terminal()
        evaluate(paths.workspace())
