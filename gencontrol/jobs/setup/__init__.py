"""What jobs share before they start: settings, checks, models, prompts, devices, the run folder."""
