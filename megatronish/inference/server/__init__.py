"""An HTTP server with OpenAI's protocol."""
