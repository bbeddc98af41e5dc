"""A small repository of its own: two stages, a library, data, parameters, a lock."""

from pathlib import Path

import pytest

from tests.support.repository import NUMPY_IN_LOCK

FILES = {
    "params.yaml": "lr: 1e-4\nseed: 1\nmodel:\n  num_queries: 20\n",
    "data.dvc": "outs:\n- md5: 0123abcd.dir\n  path: data\n",
    "dvc.yaml": """\
stages:
  prepare:
    cmd: python -m stages.prepare
    deps: [data, runkey/data, stages/prepare.py, conda-lock.yml]
    params: [seed, data]
    outs: [prepared]
  train:
    cmd: >-
      python -m
      stages.train
    deps: [prepared/train.json, runkey, stages/train.py, conda-lock.yml]
    params: [lr, seed, model, optimizer]
    outs:
    - model
    metrics:
    - metrics/train.json: {cache: false}
  evaluate:
    cmd: python -m stages.evaluate
    deps: [model, prepared]
    params: [evaluate]
""",
    "stages/__init__.py": "",
    "stages/prepare.py": "import runkey.data.coco\n",
    "stages/train.py": """\
import json
import torch
from runkey.model import net
from runkey.tracking import log

def late():
    from runkey import late as module
    return module
""",
    "stages/evaluate.py": "from runkey.model.net import width\n",
    "runkey/__init__.py": "",
    "runkey/late.py": "",
    "runkey/unused.py": "",
    "runkey/data/__init__.py": "",
    "runkey/data/coco.py": "from . import boxes\n",
    "runkey/data/boxes.py": "from ..late import *\n",
    "runkey/model/__init__.py": "",
    "runkey/model/net.py": "from .deep.layer import width\n",
    "runkey/model/deep/__init__.py": "",
    "runkey/model/deep/layer.py": "width = 3\n",
    "runkey/tracking/__init__.py": "",
    "runkey/tracking/log.py": "import runkey.unused\n",
    "tests/test_net.py": "import runkey.model.net\n",
    "README.md": "# A repository\n",
    "conda-lock.yml": """\
version: 1
metadata:
  content_hash: {linux-64: '00', osx-arm64: '00'}
package:
"""
    + NUMPY_IN_LOCK
    + """\
  optional: false
- name: libjpeg-turbo
  version: 3.1.2
  manager: conda
  platform: linux-64
  dependencies: {}
  url: https://channel.example/linux-64/libjpeg-turbo-3.1.2-h_1.tar.bz2
  hash: {md5: '33'}
  category: main
  optional: false
- name: numpy
  version: 2.10
  manager: conda
  platform: osx-arm64
  dependencies: {python: ''}
  url: https://channel.example/osx-arm64/numpy-2.10-py312_7.conda
  hash: {md5: '44', sha256: '55'}
  category: main
  optional: false
""",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path
