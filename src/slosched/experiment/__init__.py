"""Published experiments as one command: which runs a figure needs, on which hosts, and its drawing.

`figures.py` is the one table of Figures 5 to 11. Its runs are made by one of three engines: on named hosts
over SSH, on this host (the same code less ssh), or in virtual time. `run.py` makes one live run, `campaign.py`
all of an experiment's.
"""
