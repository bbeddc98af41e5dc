"""Runs handed on: to the team's remotes and server, by one file, and from them."""
