"""params.yaml: its schema, its only reader, and the presets.

The file is YAML 1.2, as DVC reads it: PyYAML would read the `5e-05` that `dvc exp run -S lr=5e-5`
writes as a string.
"""

from __future__ import annotations

from runkey.params.load import as_text as as_text
from runkey.params.load import changed_params as changed_params
from runkey.params.load import load_params as load_params
from runkey.params.load import override as override
from runkey.params.load import parse_params as parse_params
from runkey.params.schema import Augment as Augment
from runkey.params.schema import Checks as Checks
from runkey.params.schema import Clip as Clip
from runkey.params.schema import Data as Data
from runkey.params.schema import EarlyStopping as EarlyStopping
from runkey.params.schema import Model as Model
from runkey.params.schema import Optimizer as Optimizer
from runkey.params.schema import Params as Params
from runkey.params.schema import Runtime as Runtime
from runkey.params.schema import Schedule as Schedule
from runkey.params.schema import Training as Training
