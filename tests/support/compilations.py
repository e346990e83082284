"""Counts what a function traces or compiles."""

import jax


def count_compilations(function):
    """How often `function` traced or compiled anything."""
    events = []

    def listener(name, duration, **_):
        if "compile" in name or "trace" in name:
            events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    return len(events)
