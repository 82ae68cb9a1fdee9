"""Lightning callbacks: what a person sees while training, and what an interruption leaves behind."""
