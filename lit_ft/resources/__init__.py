"""What a run takes, and what this machine has: memory, arithmetic, threads, energy."""
