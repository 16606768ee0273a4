"""What is learned: losses and their metrics, a kind a file; each gives a `Task`."""
