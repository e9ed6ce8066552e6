from .optim import GATES as GATES
from .optim import AdapterOptimizerMixin as AdapterOptimizerMixin
from .optim import create_disel_optimizer as create_disel_optimizer
from .optim import parameter_groups as parameter_groups
from .registry import register as register
from .targets import SHAPES_ALONE as SHAPES_ALONE
from .targets import matched_modules as matched_modules
from .targets import with_named_targets as with_named_targets
