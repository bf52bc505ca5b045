"""The command line: `vistoken demo`, `prune`, `methods`, `inspect`."""
