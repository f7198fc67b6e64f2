"""A worker that evaluates the runs that are described on its stdin: `python -m soluscope.evaluation`."""

from __future__ import annotations

import sys

from soluscope.garbage import collect_rarely
from soluscope.workers import STOPPED, works

if __name__ == "__main__":
    collect_rarely()  # before the imports of the evaluation
    from soluscope.evaluation.one_run import evaluate_described

    try:
        for line in works():
            evaluate_described(line)
    except KeyboardInterrupt:
        sys.exit(STOPPED)  # without a message, because the launching process prints one
