"""`fastblt bench serve`: load tests of any server with OpenAI's completions API, measured in bytes."""
