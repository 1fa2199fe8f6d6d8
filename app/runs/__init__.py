"""What a run leaves behind: its directory, checkpoints, metrics, results, the record of every test task."""
