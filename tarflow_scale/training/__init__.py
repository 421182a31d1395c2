"""Training with DeepSpeed. Only this package imports deepspeed. Start reading at `tarflow_scale.training.loop`.

`engine` wraps the flow in DeepSpeed, `loop` is the training loop, `checkpoint` and `upload` save the state of a run,
`ema` averages weights, `schedule` and `optimizers` update them, `noise` prepares inputs, `spikes` and `validation`
monitor the loss, `meter` measures speed, `zero` makes the DeepSpeed configuration, `folder` describes the run folder.
Output goes to ``logging.path``, and copies of checkpoints to ``checkpoint.upload_path``. A run resumes from its newest
complete checkpoint, on any number of ranks and at any ZeRO stage.
"""
