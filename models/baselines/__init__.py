"""What every few-shot learner is compared with."""
