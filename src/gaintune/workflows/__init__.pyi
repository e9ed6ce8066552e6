from .adaptation import AdaptResult as AdaptResult
from .adaptation import ClassifierResult as ClassifierResult
from .adaptation import adapt as adapt
from .adaptation import adapt_classifier as adapt_classifier
from .merge import check_out as check_out
from .merge import merge_adapter as merge_adapter
from .sequence import run_sequence as run_sequence
