"""data - what goes into a run and what comes out of it.  Each module stands alone; README.md lists
them."""
