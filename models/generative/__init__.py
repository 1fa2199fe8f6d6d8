"""Learners with a generator of images."""
