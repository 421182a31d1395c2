"""Training under DeepSpeed; the only user of deepspeed. See `tarflow_scale.training.loop` for the story.

`engine` wraps the flow in DeepSpeed, `loop` is the loop, `checkpoint` and `upload` keep it, `ema` averages weights,
`schedule` and `optimizers` move them, `noise` makes the input, `spikes` and `validation` watch, `meter` tells speed,
`zero` and `plan` do the arithmetic beforehand, `folder` keeps the run folder to one run. What is written is below
``logging.path``, and copies of checkpoints at ``checkpoint.upload_path``; a run resumes from its newest whole
checkpoint, on any number of ranks and at any ZeRO stage.
"""
