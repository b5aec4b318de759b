"""The nodes, a file per family."""
