"""Check the data set, index it, draw a sheet of it: `python -m stages.prepare`."""

from runkey import paths
from runkey.errors import report_errors
from runkey.identity.audit import watch_reads
from runkey.progress import log_to_terminal

if __name__ == "__main__":
    with report_errors():
        log_to_terminal()
        root = paths.workspace()
        watch_reads(root, "prepare")
        # Imported here: what modules read when they are imported is watched too.
        from runkey.pipeline.prepare import prepare_data

        prepare_data(root)
