"""What several test modules share: inputs and oracles per operator, and the harness that compares implementations."""
