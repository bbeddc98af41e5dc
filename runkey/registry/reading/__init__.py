"""Runs looked up: in a local store's records and on a server; lists, pages, one run."""
