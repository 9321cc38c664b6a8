"""CHASSIS: a frozen base model as a universal port; experts plug in through adapters that are solved for."""

from .adapter import Adapter, fit
from .errors import ChassisError
from .experts import SyntheticExpert, load_expert
from .harvest import Activations, harvest, harvest_splits
from .metrics import evaluate
from .models import LanguageModel, bundled, load
from .probes import Probes, passages, probe_set
from .records import Records, read_records
from .solve import Gram, ridge

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "Adapter",
    "ChassisError",
    "Gram",
    "LanguageModel",
    "Probes",
    "SyntheticExpert",
    "bundled",
    "evaluate",
    "fit",
    "harvest",
    "harvest_splits",
    "load",
    "load_expert",
    "passages",
    "probe_set",
    "ridge",
    "Records",
    "read_records",
]
