"""Readers of text: JSON lines, Parquet, plain text and tables; local, compressed, on the web or on the Hugging Face hub."""
