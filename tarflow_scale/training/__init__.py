"""Training under DeepSpeed; the only user of deepspeed. See `tarflow_scale.training.loop` for the story."""
