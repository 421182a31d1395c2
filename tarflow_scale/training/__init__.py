"""Training with DeepSpeed; the only user of deepspeed. Start to read at `tarflow_scale.training.loop`.

`engine` wraps the flow in DeepSpeed, `loop` is the training loop, `checkpoint` and `upload` save it, `ema` averages
weights, `schedule` and `optimizers` update them, `noise` prepares inputs, `spikes` and `validation` monitor, `meter`
measures speed, `zero` makes the DeepSpeed configuration, `folder` locks the run folder. Output goes to
``logging.path``, and copies of checkpoints to ``checkpoint.upload_path``; a run resumes from its newest complete
checkpoint, on any number of ranks and at any ZeRO stage.
"""
