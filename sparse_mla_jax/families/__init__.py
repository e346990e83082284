"""One file per published model family, with its config keys and its tensor names only."""
