"""Learners of a posterior over parameters."""
