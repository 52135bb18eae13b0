"""What a checkpoint carries: configurations, modeling, processing, box geometry."""

# First of all: importing transformers registers our classes, and that imports the modules of this folder. Were it left
# to one of them, that one would be met half-imported.
import transformers as transformers
