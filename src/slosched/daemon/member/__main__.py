"""`python -m slosched.daemon.member DESCRIPTOR`: see main.py."""

from __future__ import annotations

import sys

from slosched.daemon.member.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
