"""`python eval/run.py ...` is `soluscope probe ...`: probe models."""

from soluscope.commands import run

if __name__ == "__main__":
    run("probe")
