"""Files of text and where they are stored: JSON lines, Parquet, plain text; local, compressed, remote."""
