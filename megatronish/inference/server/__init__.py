"""A server of one model that speaks OpenAI's protocol."""
