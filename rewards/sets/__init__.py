"""What set rewards stand on: Gaussian statistics, references, incremental states."""
