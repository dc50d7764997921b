"""Post-training: reinforcement learning with GRPO in the environments of the task set."""
