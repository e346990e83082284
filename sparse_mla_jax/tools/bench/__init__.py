"""Times kernels and models: `run` for the cases, `model` for a checkpoint, `report` for tables, `device_timing`."""
