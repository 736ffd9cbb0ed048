"""What can be said about a model before, or beside, its training. Nothing here knows the controller."""
