"""`fastblt eval`: evaluates the quality of completions, through any server's HTTP endpoint."""
