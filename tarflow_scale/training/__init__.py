"""Training under DeepSpeed; the only user of deepspeed. See `tarflow_scale.training.loop` for the story.

`engine` wraps the flow in DeepSpeed and `loop` is the training loop. `checkpoint` and `upload` save its state, `ema`
averages weights, `schedule` and `optimizers` update them, `noise` makes the model's input, `spikes` and `validation`
watch the loss, `meter` measures speed, `zero` makes DeepSpeed's configuration, `course` finds where a run continues,
`folder` and `run_log` write the run folder. Files are written below ``logging.path``, and copies of checkpoints to
``checkpoint.upload_path``. A run resumes from its newest complete checkpoint, on any number of ranks and at any ZeRO
stage.
"""
