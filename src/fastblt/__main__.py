"""`python -m fastblt`, and the command `fastblt`."""

import sys


def main() -> None:
    """Run the command. An interrupt while it is being imported ends it without a traceback."""
    try:
        from fastblt.benchmarks.cli import app
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
