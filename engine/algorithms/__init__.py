"""The maths of the training objectives: pure functions on tensors, one idea per file. No Ray, no config, no I/O."""
