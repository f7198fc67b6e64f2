"""`python eval/report.py ...` is `soluscope report ...`: write a study's report."""

from soluscope.commands import run

if __name__ == "__main__":
    run("report")
