"""The base of all learners and of their families, and what they share."""
