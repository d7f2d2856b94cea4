"""Hidden states and teacher targets become losses."""
