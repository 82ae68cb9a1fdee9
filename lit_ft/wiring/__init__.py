"""The parts of a run, each made from the settings: `train` puts them together, a preview looks at them."""
