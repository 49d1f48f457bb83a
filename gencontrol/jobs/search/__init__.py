"""`search`: its options, the job, and what it leaves in the run folder."""
