"""What people look at: progress, pictures, reports, judgements on the host."""
