from .loop import TrainedStage as TrainedStage
from .loop import count_updates as count_updates
from .loop import train_stage as train_stage
from .snapshots import Shelf as Shelf
from .snapshots import Snapshots as Snapshots
from .snapshots import snapshots_of as snapshots_of
