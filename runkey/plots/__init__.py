"""Pictures, tables and reports of a run, drawn from its files."""
