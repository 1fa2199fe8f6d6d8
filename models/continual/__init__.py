"""Learners on streams: what was learned is to stay, and to make the next faster to learn."""
