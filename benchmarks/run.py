"""All benchmarks, one after another, as Markdown: `python benchmarks/run.py` (about 40 minutes on two cores)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

for name in ("step_time.py", "gates.py", "penalties.py", "end_to_end.py"):
    subprocess.run([sys.executable, str(Path(__file__).with_name(name))], check=True)
    print(flush=True)
