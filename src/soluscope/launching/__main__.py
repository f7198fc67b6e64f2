"""A process that trains jobs of a sweep.

With a configuration, `torchrun ... -m soluscope.launching CONFIG`, it is one of the processes that train one job
together. Without one, it is a worker (workers.py), which does the tasks that it reads from stdin.
"""

from __future__ import annotations

import sys

from soluscope.config import load_config
from soluscope.garbage import collect_rarely
from soluscope.launching.jobs import Task, execute
from soluscope.training.progress import NoProgress
from soluscope.workers import STOPPED, tell_step, works


def main() -> None:
    """Train the job of a configuration, or do the tasks that are described on stdin."""
    if len(sys.argv) > 1:
        sys.exit(0 if execute(Task(load_config(sys.argv[1:]))) else 1)
    for line in works():
        task = Task.from_json(line)
        execute(task, NoProgress(), tell_step)  # the launching process shows the bars


if __name__ == "__main__":
    collect_rarely()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(STOPPED)  # without a message, because the launching process prints one
