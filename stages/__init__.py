"""The stages of dvc.yaml, one file each: read parameters, call the library, write outputs."""
