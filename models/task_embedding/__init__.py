"""Learners that place a task among others."""
