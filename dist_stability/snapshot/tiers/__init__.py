"""Where snapshots are kept so that a later process finds them: their files, their seals, and the way back."""
