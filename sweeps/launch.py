"""`python sweeps/launch.py ...` is `soluscope sweep ...`: run a sweep."""

from soluscope.commands import run

if __name__ == "__main__":
    run("sweep")
