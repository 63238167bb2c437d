"""Long work on many rows, as commands share it: tasks here, with Slurm or on Ray, and files that say what is done."""
