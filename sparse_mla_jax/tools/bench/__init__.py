"""Times kernels and models: `run` the cases, `model` a checkpoint, `report` tables, `device_timing`."""
