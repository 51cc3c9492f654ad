"""The command line: one file for each group of commands, wired together in `app.py`.

Everything that costs time to import (sockets, torch, plots) is imported inside the commands, so
that `--help` answers at once and a machine without those packages still has the rest.
"""
