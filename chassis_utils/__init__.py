"""CHASSIS: a frozen base model as a universal port; experts plug in through adapters that are solved for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import Activations, harvest
    from .adapter import Adapter, fit
    from .api import ApiExpert
    from .bridge import Bridge, Bridged
    from .errors import ChassisError
    from .experts import BiasExpert, SyntheticExpert, load_expert
    from .features import Features
    from .foreign import ForeignExpert
    from .metrics import choose_rank, evaluate, interval
    from .models import LanguageModel, bundled, load
    from .probes import Probes, passages, probe_set, written
    from .records import Records, read_records
    from .solve import Gram, ridge
    from .statistics import Statistics, gather
    from .tokens import token_bytes

__version__ = "0.1.0"

_HOMES = {
    "activations": ("Activations", "harvest"),
    "adapter": ("Adapter", "fit"),
    "api": ("ApiExpert",),
    "bridge": ("Bridge", "Bridged"),
    "errors": ("ChassisError",),
    "experts": ("BiasExpert", "SyntheticExpert", "load_expert"),
    "features": ("Features",),
    "foreign": ("ForeignExpert",),
    "metrics": ("choose_rank", "evaluate", "interval"),
    "models": ("LanguageModel", "bundled", "load"),
    "probes": ("Probes", "passages", "probe_set", "written"),
    "records": ("Records", "read_records"),
    "solve": ("Gram", "ridge"),
    "statistics": ("Statistics", "gather"),
    "tokens": ("token_bytes",),
}
__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: torch and transformers take seconds, a wrong option none."""
    for module, names in _HOMES.items():
        if name in names:
            return import_module(f".{module}", __name__).__dict__[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
