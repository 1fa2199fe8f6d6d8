"""Functions of one variable."""
