"""What a data set holds and what is wrong with it: faults, statistics, duplicates, contact sheets, leaks."""
