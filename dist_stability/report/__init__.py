"""What a run leaves for people: the event log, figures, and a self-contained page."""
