"""Continuous batching around one jitted step: pages, scheduler, sampling, engine."""
