"""Studies: the paper's figures and the questions they leave open, each a list of runs and a way to show them."""
