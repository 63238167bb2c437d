"""Jobs over many rows: tasks on this machine, with Slurm or on Ray, and files that record finished rows."""
