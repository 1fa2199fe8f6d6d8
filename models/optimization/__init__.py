"""Learners that adapt parameters by gradient steps."""
