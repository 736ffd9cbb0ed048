"""Where snapshots are kept so that a later process finds them, and the way back.

``tier`` is what all places have in common; ``shared_memory`` and ``checkpoints`` are places; ``courier`` brings sealed
slots to the slow ones beside the training; ``record`` and ``form`` are how a slot is described for another process.
"""
