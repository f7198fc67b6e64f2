"""`python train/export.py ...` is `soluscope export ...`: export a finished run."""

from soluscope.commands import run

if __name__ == "__main__":
    run("export")
