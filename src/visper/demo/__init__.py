"""A browser page to chat with a model about an image and to see what its layers predict."""
