"""`fastblt bench serve`: load on any server that speaks OpenAI's completions API, measured in bytes."""
