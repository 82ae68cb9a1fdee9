"""What a run would do, found out without its weights: of SFT, DPO and judges, of PPO and GRPO, and of its memory."""
