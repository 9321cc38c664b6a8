from .activations import Activations as Activations
from .activations import HiddenExpert as HiddenExpert
from .activations import harvest as harvest
from .adapter import Adapter as Adapter
from .adapter import fit as fit
from .bridge import Bridge as Bridge
from .bridge import Bridged as Bridged
from .errors import ChassisError as ChassisError
from .features import Features as Features
from .foreign import ForeignExpert as ForeignExpert
from .metrics import evaluate as evaluate
from .models import LanguageModel as LanguageModel
from .models import bundled as bundled
from .models import load as load
from .port import Port as Port
from .probes import Probes as Probes
from .probes import passages as passages
from .probes import probe_set as probe_set
from .solve import Gram as Gram
from .solve import ridge as ridge
from .statistics import Statistics as Statistics
from .statistics import gather as gather
from .tokens import token_bytes as token_bytes

__version__: str
__all__: list[str]
