"""Numbers in, matplotlib figure out; one file for each kind of picture."""
