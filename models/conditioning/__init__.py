"""Learners whose initialisation, optimizer or features a task embedding sets."""
