"""Pages and model cards that runs, searches and evaluations leave behind."""
