from runkey.api import Detections as Detections
from runkey.api import Model as Model
from runkey.api import load as load
from runkey.version import __version__ as __version__
