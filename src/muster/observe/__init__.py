"""What can be seen of a run: records, progress lines, trackers, the machine's peak. Knows records only."""
