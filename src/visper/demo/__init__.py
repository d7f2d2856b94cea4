"""A page in the browser: chat with a model about an image, and see what its layers predict."""
