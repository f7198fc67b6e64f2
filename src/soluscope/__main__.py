"""`python -m soluscope train ...` is `soluscope train ...`."""

from soluscope.commands import main

if __name__ == "__main__":
    main()
