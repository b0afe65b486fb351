"""`python -m fastblt`: the command `fastblt`."""

from fastblt.benchmarks.cli import main

if __name__ == "__main__":
    main()
