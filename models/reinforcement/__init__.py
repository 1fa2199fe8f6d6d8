"""Learners that act in environments, and strategies that need no training."""
