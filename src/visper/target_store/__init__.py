"""Teachers' targets computed once, stored and read back."""
