"""What concerns no single experiment, and what a run would cost."""
