"""Text that is read, shuffled, tokenised and packed while training runs."""
