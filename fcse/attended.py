"""`python -m fcse.attended ...` is `fcse ...` that ends with the process that started it."""

import os
import threading

from fcse.cli import main


def _end_with_parent() -> None:
    """Wait for the end of standard input: a pipe ends however its other side died."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main()
