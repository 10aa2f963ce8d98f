"""An HTTP server with OpenAI's interface in front of the engine (extra ``serve``)."""
