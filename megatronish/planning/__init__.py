"""What fits where, what it sends and how fast it goes, from configurations alone: nothing here needs torch or a GPU."""
