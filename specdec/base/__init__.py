"""What everything stands on: errors, options, settings, the terminal, and what this machine is. Knows no model."""
