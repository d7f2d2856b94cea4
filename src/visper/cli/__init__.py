"""One file per verb: parse, call one function, exit code."""
