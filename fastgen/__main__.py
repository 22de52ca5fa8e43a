"""`python -m fastgen` is the `fastgen` program."""

from fastgen.cli import run_main

if __name__ == "__main__":
    run_main()
