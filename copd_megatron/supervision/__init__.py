"""Processes of a run: started, watched, ended, and started again after a failure."""
