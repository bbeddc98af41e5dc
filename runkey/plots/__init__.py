"""Pictures and tables of a run, drawn from the files that it left.  Nothing here trains."""
