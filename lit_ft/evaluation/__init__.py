"""What a fine-tune gained and what it cost: one file for each section of the report, and the report itself."""
