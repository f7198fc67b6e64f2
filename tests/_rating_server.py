"""A server of the rating page on made-up neurons, as a separate process that a test may kill.

python tests/_rating_server.py FOLDER N   # N neurons per arm; prints the page's address on stdout
"""

from __future__ import annotations

import sys
from pathlib import Path

from _rating import MadeUp

from soluscope.rating.serve import serve
from soluscope.rating.settings import RatingConfig

if __name__ == "__main__":
    n_neurons = int(sys.argv[2])
    serve(Path(sys.argv[1]), MadeUp(), RatingConfig(n_neurons=n_neurons, n_examples=10))
