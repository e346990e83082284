"""One file per published model family: its config keys and its tensor names, nothing else."""
