"""Where the steps of a labelling run: processes of this machine, or Ray. The files they leave are the same."""
