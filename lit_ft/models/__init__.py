"""Models: where they come from, how they are loaded, adapted and made to score packed batches."""

import logging

# Where bitsandbytes is installed, PEFT imports it in every run, and it then says that a kernel for answering, which
# nothing here uses, could not be had.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
