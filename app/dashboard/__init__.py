"""Which pictures and films a run shows, and Weights & Biases."""
