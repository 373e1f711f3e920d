"""What a training run needs besides its mathematics: flags, processes, state, safe files, logs.

Read in this order: cli, settings, distributed, state, checkpoint, log, run.
None of them knows what is trained.
"""
