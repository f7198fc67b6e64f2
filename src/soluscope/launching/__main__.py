"""One of the processes that train one job of a sweep together: `torchrun ... -m soluscope.launching CONFIG`."""

from __future__ import annotations

import sys

from soluscope.config import load_config
from soluscope.launching.jobs import execute

if __name__ == "__main__":
    try:
        sys.exit(0 if execute(load_config(sys.argv[1:])) else 1)
    except KeyboardInterrupt:
        sys.exit(130)  # without a message, because the launching process prints one
