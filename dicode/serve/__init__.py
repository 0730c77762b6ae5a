"""`dicode serve`: an HTTP API in the shape of OpenAI's `/v1/videos`, a queue that outlives processes, and a page."""
