"""Every kind of bad data set, each with the one line that a user reads about it."""

from tests.support.bad_data import annotations, image_entries, image_files, json_files, splits

CASES = [
    *json_files.CASES,
    *image_entries.CASES,
    *image_files.CASES,
    *annotations.CASES,
    *splits.CASES,
]
