"""Training: one optimizer step, the loop around it, its metrics, and checkpoints from which a run goes on to the bit."""
