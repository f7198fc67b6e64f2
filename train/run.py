"""`python train/run.py ...` is `soluscope train ...`: train one model."""

from soluscope.commands import run

if __name__ == "__main__":
    run("train")
