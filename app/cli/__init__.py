"""The command line: parser, building from a configuration or from a checkpoint."""
