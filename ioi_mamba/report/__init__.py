"""One offline page out of a run's tables."""
