"""One page that shows a run, or compares two: read from the run's folder, without torch."""
