from .loop import Learnt as Learnt
from .loop import count_updates as count_updates
from .loop import learn as learn
from .snapshots import Shelf as Shelf
from .snapshots import Snapshots as Snapshots
from .snapshots import snapshots_of as snapshots_of
