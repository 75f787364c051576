"""One file per job, to be submitted with `ray job submit -- python -m jobs.NAME`."""
