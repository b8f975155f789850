"""The life of a checkpoint: what is written, how it is committed and verified, and how it is read again."""
