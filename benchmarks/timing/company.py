"""How busy other processes kept the processor meanwhile."""

import os
import time
from pathlib import Path

# From this share on the figures are not to be relied on.
BUSY = 0.05


class Company:
    """The share of the processor that other processes take meanwhile."""

    def __init__(self):
        self._begun = _read()

    def share(self):
        """From 0 to 1, or `None` where the system does not tell."""
        if self._begun is None:
            return None
        others, total = (b - a for a, b in zip(self._begun, _read()))
        return max(0.0, others / total) if total > 0 else 0.0


def _read():
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return None
    ticks = [int(word) for word in line.split()[1:9]]
    second = os.sysconf("SC_CLK_TCK")
    idle = (ticks[3] + ticks[4]) / second
    total = sum(ticks) / second
    return total - idle - time.process_time(), total
