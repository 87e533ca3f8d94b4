"""`copd compare`: methods side by side over seeds, from whole runs, with what each has cost."""
