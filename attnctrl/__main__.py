"""`python -m attnctrl` is the command `attnctrl`."""

from __future__ import annotations

from attnctrl.cli import main

if __name__ == "__main__":
    main()
