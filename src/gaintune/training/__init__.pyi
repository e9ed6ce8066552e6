from .loop import Snapshots as Snapshots
from .loop import TrainedStage as TrainedStage
from .loop import check_snapshots as check_snapshots
from .loop import checkpoint_activations as checkpoint_activations
from .loop import count_updates as count_updates
from .loop import newest_checkpoint as newest_checkpoint
from .loop import snapshots_of as snapshots_of
from .loop import train_stage as train_stage
